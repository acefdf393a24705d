"""Shortening a conversation before it is rendered, so that the template's own markup stays whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ollatune.data.conversation import ChatMessage, Conversation

_SHORTEST_REST = 16
"""Characters of a message that are left standing: less says nothing."""
_MAX_TRIALS = 14
_UNFILLED = 50
"""One token in so many of a window may stay empty: filling it would need more trials."""


class FitSearch:
    """Looks for the fewest characters to cut so that a conversation has at most `limit` tokens.

    Ask for the next number to try until it is None, and tell how many tokens each left.
    """

    def __init__(self, limit: int, num_tokens: int, num_characters: int) -> None:
        self._limit = limit
        self._tolerance = max(1, limit // _UNFILLED)
        self._all = num_characters
        self._too_few, self._tokens_above = 0, num_tokens
        self._enough: int | None = None
        self._tokens_below = 0
        self._characters_per_token = num_characters / num_tokens
        self._num_trials = 0

    def next_cut(self) -> int | None:
        """Characters to cut in the next trial."""
        above = self._tokens_above - self._limit
        if self._enough is None:
            guess = self._too_few + int(1.02 * above * self._characters_per_token) + 2
            return min(guess, self._all) if self._too_few < self._all else None
        gap = self._enough - self._too_few
        is_full = self._tokens_below >= self._limit - self._tolerance
        if is_full or gap <= 1 or self._num_trials >= _MAX_TRIALS:
            return None
        share = 0.5  # every third time, where interpolation is led astray by whole turns
        if self._num_trials % 3:
            share = (above + self._tolerance / 2) / (self._tokens_above - self._tokens_below)
        return self._too_few + min(gap - 1, max(1, round(gap * share)))

    def tell(self, cut: int, num_tokens: int) -> bool:
        """Take note of a trial. Returns whether it fits."""
        self._num_trials += 1
        if num_tokens <= self._limit:
            self._enough, self._tokens_below = cut, num_tokens
            return True
        self._too_few, self._tokens_above = cut, num_tokens
        return False


def shortened(
    conversation: Conversation, excess: int, where: Literal["middle", "left", "error"]
) -> Conversation | None:
    """The conversation with `excess` characters of context less, or None where there is no context to cut.

    It is fewer where there are no more, and more where the last of the dropped turns is longer.

    `left` first drops the oldest turns, as Ollama does when a chat outgrows its context, then the beginning of the
    longest message that is not the assistant's. `middle` cuts the middle out of that message, then of the next longest.
    """
    size = num_characters(conversation)
    current, gone = conversation, 0
    while gone < excess and (shorter := _step(current, excess - gone, where)) is not None:
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
