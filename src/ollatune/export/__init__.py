"""Floor 4: checkpoint + base → what Ollama serves."""
