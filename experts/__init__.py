"""Who can answer: one streaming interface over every engine. Knows nothing of routing."""
