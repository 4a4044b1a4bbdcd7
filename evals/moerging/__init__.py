"""Methods that recycle a library of adapters, compared on the same questions."""
