"""Floor 5: plots and pages from what runs wrote."""
