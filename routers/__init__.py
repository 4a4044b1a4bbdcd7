"""Who would answer well: predicts quality, decides nothing."""
