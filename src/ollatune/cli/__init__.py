"""Floor 7: the commands a user types."""

from ollatune.cli.tree import app, entry, main

__all__ = ["app", "entry", "main"]
