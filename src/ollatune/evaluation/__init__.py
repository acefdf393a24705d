"""Floor 4: serving an export, scoring it, and proving that it is what was trained."""
