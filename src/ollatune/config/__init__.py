"""Floor 1: the configuration schema and how it is loaded."""
