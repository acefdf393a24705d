"""The fast path: the parts of the training step that replace Transformers' own where that is exact."""
