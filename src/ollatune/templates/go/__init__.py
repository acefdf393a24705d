"""The part of Go's text/template that Ollama's chat templates use, engine only: it knows nothing of chats."""

from __future__ import annotations
