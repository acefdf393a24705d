"""Floor 2: records → examples → batches."""
