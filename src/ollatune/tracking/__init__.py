"""Floor 2: where metrics go."""
