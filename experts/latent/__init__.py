"""Latent collaboration: experts that read each other's hidden states while one of them writes."""
