"""What of a conversation its rendering shows: a template that has no place for something leaves it out silently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ollatune.data.conversation import ChatMessage, Conversation
from ollatune.data.position import Position, RecordError
from ollatune.data.protocols import SegmentLike

_WORD = re.compile(r"\w+")
_NUM_WORDS = 50


@dataclass(frozen=True)
class Hidden:
    """Parts of a conversation that the served model would never see either."""

    system: bool = False
    thinking: bool = False
    turns: bool = False
    """A message of the user or a tool."""


NOTHING_HIDDEN = Hidden()


def _is_shown(content: str, text: str) -> bool:
    """Whether `text` holds `content`, trimmed or escaped perhaps."""
    return content.strip() in text or all(
        word in text for word in _WORD.findall(content)[:_NUM_WORDS]
    )


def _calls_are_shown(messages: Sequence[ChatMessage], text: str) -> bool:
    return all(call["function"]["name"] in text for m in messages for call in m.tool_calls)


def find_hidden(
    conversation: Conversation,
    examples: Sequence[Sequence[SegmentLike]],
    position: Position,
    *,
    is_last_only: bool,
) -> Hidden:
    """What the rendered `examples` of a conversation leave out.

    Raises RecordError where tools or tool calls are left out: what would be learned in their place is an empty answer,
    and Ollama refuses requests with tools for such a template.
    """
    text = "".join([segment.text for segments in examples for segment in segments])
    tools = conversation.tools
    if tools and not any(tool["function"]["name"] in text for tool in tools):
        raise _no_place(position, "tools")
    messages = conversation.messages
    if not _calls_are_shown(messages, text):
        raise _no_place(position, "tool calls")
    # What a template shows of earlier thinking is its own affair; of an answer that is learned it must be there.
    learned = messages[-1:] if is_last_only else messages
    system = thinking = turns = False
    for message in messages:
        if message.role == "assistant" or _is_shown(message.content, text):
            continue
        system = system or message.role == "system"
        turns = turns or message.role != "system"
    for message in learned:
        thinking = thinking or not (not message.thinking or _is_shown(message.thinking, text))
    if not (system or thinking or turns):
        return NOTHING_HIDDEN
    return Hidden(system, thinking, turns)


def _no_place(position: Position, what: str) -> RecordError:
    return RecordError(
        position,
        f"the chat template has no place for {what}: the served model would never see them",
        f"Remove the {what} from the record, or train a base model whose template has them "
        "(`ollatune data` shows what is rendered).",
    )
