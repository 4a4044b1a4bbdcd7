"""Answering one request: policies, strategies, HTTP. Knows nothing of Ray or of engines."""
