"""Floor 3: what a checkpoint is, and the store that never loses one."""
