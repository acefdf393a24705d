"""Floor 2: talking with Ollama: names, the store on disk, Modelfiles, the HTTP client, publishing."""
