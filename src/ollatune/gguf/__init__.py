"""Floor 2: the GGUF container, its block codecs and its tokenizers."""
