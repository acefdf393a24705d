"""Shortening a conversation before it is rendered, so that the template's own markup stays whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ollatune.data.conversation import ChatMessage, Conversation

_SHORTEST_REST = 16
"""Characters of a message that are left standing: less says nothing."""
_SURE = 0.8
"""Share of the estimated excess that is taken away at once."""


def shortened(
    conversation: Conversation, excess: int, where: Literal["middle", "left", "error"]
) -> Conversation | None:
    """The conversation with about `excess` characters of context less, or None when no context is left to cut.

    `left` first drops the oldest turns, as Ollama does when a chat outgrows its context, then the beginning of the
    longest message that is not the assistant's. `middle` cuts the middle out of that message, then of the next longest.
    """
    size = num_characters(conversation)
    current, gone = conversation, 0
    # Characters only foretell tokens: near the goal it is better to look again than to drop a turn too many.
    while gone < _SURE * excess and (shorter := _step(current, excess - gone, where)) is not None:
        current, gone = shorter, size - num_characters(shorter)
    return current if gone else None


def num_characters(conversation: Conversation) -> int:
    """Characters of all messages."""
    return sum(len(message.content) for message in conversation.messages)


def _step(
    conversation: Conversation, excess: int, where: Literal["middle", "left", "error"]
) -> Conversation | None:
    """One turn dropped, or one message cut by up to `excess` characters."""
    if where == "left":
        dropped = without_oldest_turn(conversation)
        if dropped is not None:
            return dropped
    index = max(
        (i for i, message in enumerate(conversation.messages) if message.role != "assistant"),
        key=lambda i: len(conversation.messages[i].content),
        default=-1,
    )
    if index < 0:
        return None
    content = conversation.messages[index].content
    keep = max(_SHORTEST_REST, len(content) - excess)
    if keep >= len(content):
        return without_oldest_turn(conversation)
    if where == "left":
        content = content[len(content) - keep :]
    else:
        head = keep // 2
        content = content[:head] + content[len(content) - (keep - head) :]
    messages = list(conversation.messages)
    messages[index] = replace(messages[index], content=content)
    return replace(conversation, messages=tuple(messages))


def without_oldest_turn(conversation: Conversation) -> Conversation | None:
    """The conversation without its first exchange (the system message stays), or None if there is only one."""
    messages = conversation.messages
    start = 1 if messages[0].role == "system" else 0
    later_users = [i for i in range(start + 1, len(messages)) if messages[i].role == "user"]
    for index in later_users:
        rest: tuple[ChatMessage, ...] = messages[:start] + messages[index:]
        if any(message.role == "assistant" and message.is_trained for message in rest):
            return replace(conversation, messages=rest)
    return None
