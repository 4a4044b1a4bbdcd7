"""A library of experts: adapters and fine-tuned models that others made, listed and checked."""
