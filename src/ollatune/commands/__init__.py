"""Floor 6: one verb a file."""
