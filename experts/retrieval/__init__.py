"""Retrieval as an expert: documents to passages, an index over them, and who answers from it."""
