"""Floor 0: errors and exit codes, durable files and hashes, text and units, logging."""
