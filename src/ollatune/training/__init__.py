"""Floor 4: the training loop and what it needs."""
