"""What a conversation is made of, and what a rendered conversation is cut into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` are mappings `{"function": {"name", "arguments"}}` (OpenAI's and Ollama's form)."""

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_name: str = ""
    tool_call_id: str = ""
    """Which call a tool's message answers. Some Jinja templates write it (Mistral's)."""


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation; loss is taken on the tokens of target segments only."""

    text: str
    is_target: bool


def joined(segments: Sequence[Segment]) -> str:
    """The text that `segments` are the pieces of."""
    return "".join(segment.text for segment in segments)


def shared_start(first: str, second: str) -> str:
    """What both texts begin with."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:index]
    return min(first, second, key=len)


def merge_consecutive(messages: Sequence[Message]) -> list[Message]:
    """Messages of one role in a row become one, joined by an empty line; tool messages stay apart.

    Ollama does this before any Go template sees the messages (`collate` in its template package).
    """
    merged: list[Message] = []
    for message in messages:
        previous = merged[-1] if merged else None
        if previous is not None and previous.role == message.role != "tool":
            merged[-1] = Message(
                previous.role,
                f"{previous.content}\n\n{message.content}",
                previous.thinking,
                previous.tool_calls,
                previous.tool_name,
            )
        else:
            merged.append(message)
    return merged
