"""Ray Serve wiring: the only package that imports ray."""
