"""Learning from what users say of answers, and comparing routes by it. All of it off by default."""
