"""The two things every record becomes: a conversation to answer in, or a document to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class ChatMessage:
    """One turn. Has the fields the chat templates read; `tool_calls` holds {"function": {"name", "arguments"}, …}."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_name: str = ""
    is_trained: bool = True
    """False for an assistant turn with `"weight": 0`: context, not target."""
    tool_call_id: str = ""
    """Which call a tool's message answers."""


@dataclass(slots=True)
class Conversation:
    """Messages of which at least one is the assistant's; `score` orders a curriculum."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    score: float = 0.0
    metadata: Mapping[str, Any] | None = None
    """Fields that no record form knows."""
    question_parts: tuple[str, str] = ("", "")
    """Instruction and context that the only user message was joined from, where the record had them apart."""

    def digest(self) -> int:
        """64-bit digest of everything the model would see: equal for exact duplicates."""
        hasher = hashlib.blake2b(digest_size=8)
        for message in self.messages:
            for part in (message.role, message.content, message.thinking, message.tool_name):
                encoded = part.encode()
                # Lengths keep ("ab", "c") and ("a", "bc") apart.
                hasher.update(b"%d:" % len(encoded))
                hasher.update(encoded)
            if not message.is_trained:
                hasher.update(b"context only")
            if message.tool_calls:
                hasher.update(_canonical(message.tool_calls))
        if self.tools:
            hasher.update(_canonical(self.tools))
        return int.from_bytes(hasher.digest(), "little")

    def prompt_digest(self) -> int:
        """64-bit digest of all that precedes the last answer: equal where the same question is asked."""
        last = max(i for i, message in enumerate(self.messages) if message.role == "assistant")
        return Conversation(self.messages[:last], self.tools).digest()


@dataclass(slots=True)
class Document:
    """Plain text; of a long file, a piece that may go on where another ended and be gone on with."""

    text: str
    begins: bool = True
    ends: bool = True
    score: float = 0.0
    metadata: Mapping[str, Any] | None = None
    """Fields that no record form knows."""

    def digest(self) -> int:
        """64-bit digest of the text."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "little")

    def prompt_digest(self) -> int:
        """A document is its own prompt."""
        return self.digest()


Sample = Conversation | Document


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
