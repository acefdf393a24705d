"""Floor 3: GGUF → model, packed weights, LoRA, the fast path, memory estimates."""
