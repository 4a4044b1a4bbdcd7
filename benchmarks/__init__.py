"""Measurements. Each script prints what it measured and writes it under ``docs/results``."""
