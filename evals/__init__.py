"""Is it any good: tasks, outcome tables, metrics, reports."""
