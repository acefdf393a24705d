"""Ollatune: fine-tune the models Ollama serves, and put them back, proved."""

__version__ = "0.1.0"
