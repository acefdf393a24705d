"""Floor 2: Ollama's names, store, Modelfile and HTTP API."""
