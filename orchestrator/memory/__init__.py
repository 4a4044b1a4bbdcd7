"""What outlives a request: values, counters and logs in a store, and what is kept there."""
