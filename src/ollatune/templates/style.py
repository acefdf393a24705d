"""Reading off a chat template how it writes each kind of turn, by rendering marks in the place of contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ollatune.base.errors import InputError
from ollatune.templates.messages import Message, shared_start

_MARKS = {name: f"Zq{name}Qz" for name in ("S", "A", "B", "C", "T")}
_PADDING = " \n\t "

Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Wrapper:
    """The text around a content, and whether the content loses its outer white space."""

    before: str
    after: str
    is_trimmed: bool = False


@dataclass(frozen=True)
class Thinking:
    """The text around an earlier answer's thinking, and what a prompt goes on with when thinking is switched off."""

    before: str
    after: str
    is_always_shown: bool  # else only after the last user message
    switched_off: str


@dataclass(frozen=True)
class ChatStyle:
    """How a template writes a conversation.

    `system_place` is `own` (a turn of its own), `first_user` or `last_user` (inside that message, before its text) or
    `none` (the template refuses system messages).
    """

    opening: str  # before the first user where no system message leads
    system_place: str
    system: Wrapper  # the leading system message
    later_system: (
        Wrapper | None
    )  # a system message after other turns; None where the template leaves it out
    user: Wrapper
    assistant: Wrapper
    generation: str  # what follows the last user's wrapper in a prompt
    writes_empty_system: bool
    thinking: Thinking | None


class StyleReader:
    """`render(messages)` gives prompts, `render_without_thinking` those of a request that switches thinking off.

    `end_of_turn_texts` tell where one turn's text ends and the next's begins.
    """

    def __init__(
        self, render: Render, render_without_thinking: Render, end_of_turn_texts: Sequence[str]
    ) -> None:
        self.render = render
        self.render_without_thinking = render_without_thinking
        self.end_of_turn_texts = [text for text in end_of_turn_texts if text]

    def read(self) -> ChatStyle:
        """The style. Raises InputError where the template writes turns in no way known here."""
        conversation = [_message("user", "A"), _message("assistant", "B"), _message("user", "C")]
        opening, first_tail, second_head, last_tail = self._between(conversation, "A", "B", "C")
        user_after = self._turn_end(first_tail, last_tail)
        assistant_after = self._turn_end(second_head, None)
        user_before = second_head[len(assistant_after) :]
        if (
            assistant_after == second_head
        ):  # no end-of-turn text: the user's beginning is what both places share
            user_before = _common_suffix(opening, second_head)
            assistant_after = second_head[: len(second_head) - len(user_before)]
        if not opening.endswith(user_before):
            raise InputError("The chat template begins the first user's turn in a way of its own.")
        user = Wrapper(user_before, user_after, self._is_trimmed("user"))
        assistant = Wrapper(
            first_tail[len(user_after) :], assistant_after, self._is_trimmed("assistant")
        )
        place, system = self._system(opening, user, second_head)
        return ChatStyle(
            opening=opening[: len(opening) - len(user_before)],
            system_place=place,
            system=system,
            later_system=self._later_system(system, assistant, user),
            user=user,
            assistant=assistant,
            generation=last_tail[len(user_after) :],
            writes_empty_system=place == "own" and self._writes_empty_system(system, user),
            thinking=self._thinking(),
        )

    def _between(self, conversation: Sequence[Message], *names: str) -> list[str]:
        """The pieces of the rendering before, between and after the marks, which must stand once each and in order."""
        text = self.render(conversation)
        pieces = []
        for name in names:
            piece, found, text = text.partition(_MARKS[name])
            if not found:
                raise InputError("The chat template leaves out a message, or changes their order.")
            pieces.append(piece)
        return [*pieces, text]

    def _turn_end(self, text: str, other: str | None) -> str:
        """The part of `text` that belongs to the turn before: up to an end-of-turn text and the white space after it,
        or what `text` and `other` begin with alike."""
        ends = [text.index(end) + len(end) for end in self.end_of_turn_texts if end in text]
        if ends:
            end = min(ends)
            part = text[:end] + text[end : len(text) - len(text[end:].lstrip())]
            if other is None or other.startswith(part):
                return part
        return text if other is None else shared_start(text, other)

    def _is_trimmed(self, role: str) -> bool:
        padded = Message(role, f"{_PADDING}{_MARKS['T']}{_PADDING}")
        if role == "assistant":
            text = self.render([_message("user", "A"), padded, _message("user", "C")])
        elif role == "system":
            text = self.render([padded, _message("user", "A")])
        else:
            text = self.render([padded])
        return padded.content not in text

    def _system(self, opening: str, user: Wrapper, second_head: str) -> tuple[str, Wrapper]:
        lead = [_message("system", "S"), _message("user", "A")]
        try:
            text = self.render(lead)
        except InputError:
            return "none", Wrapper("", "")
        if _MARKS["S"] not in text:
            return "none", Wrapper("", "")
        before, after, _ = self._between(lead, "S", "A")
        is_trimmed = self._is_trimmed("system")
        turns = [*lead, _message("assistant", "B"), _message("user", "C")]
        long_text = self.render(turns)
        if long_text.index(_MARKS["S"]) > long_text.index(_MARKS["B"]):
            head, inner = self._between(turns, "A", "B", "S", "C")[2:4]
            if not head.startswith(second_head):
                raise InputError(
                    "The chat template puts the system message into the last turn in a new way."
                )
            return "last_user", Wrapper(head[len(second_head) :], inner, is_trimmed)
        if user.before and after.endswith(user.before):
            return "own", Wrapper(before, after[: len(after) - len(user.before)], is_trimmed)
        if not before.startswith(opening):
            raise InputError(
                "The chat template puts the system message before the first turn in a new way."
            )
        return "first_user", Wrapper(before[len(opening) :], after, is_trimmed)

    def _later_system(self, leading: Wrapper, assistant: Wrapper, user: Wrapper) -> Wrapper | None:
        conversation = [
            _message("user", "A"),
            _message("assistant", "B"),
            _message("system", "S"),
            _message("user", "C"),
        ]
        try:
            text = self.render(conversation)
        except InputError:
            return leading  # refused, so that it does not matter
        if _MARKS["S"] not in text:
            return None
        _, _, head, tail, _ = self._between(conversation, "A", "B", "S", "C")
        if not (head.startswith(assistant.after) and tail.endswith(user.before)):
            raise InputError("The chat template writes a later system message in a new way.")
        padded = Message("system", f"{_PADDING}{_MARKS['T']}{_PADDING}")
        is_kept = padded.content in self.render([*conversation[:2], padded, conversation[3]])
        return Wrapper(
            head[len(assistant.after) :], tail[: len(tail) - len(user.before)], not is_kept
        )

    def _thinking(self) -> Thinking | None:
        """How thinking is written; None where the template never shows any, or cannot switch it off and on."""
        answer = Message("assistant", _MARKS["B"], thinking=_MARKS["T"])
        question = _message("user", "A")
        for is_always, last in ((True, [_message("user", "C")]), (False, [])):
            try:
                text = self.render([question, answer, *last])
                without = self.render(
                    [question, Message("assistant", _MARKS["B"]), _message("user", "C")]
                )
            except InputError:
                continue
            before, found, after = text.partition(_MARKS["T"])
            if not found or _MARKS["B"] not in after:
                continue
            plain = without.partition(_MARKS["B"])[0]
            if not before.startswith(plain):
                return None
            on, off = self.render([question]), self.render_without_thinking([question])
            switched_off = off[len(on) :] if off.startswith(on) else ""
            return Thinking(
                before[len(plain) :], after.partition(_MARKS["B"])[0], is_always, switched_off
            )
        return None

    def _writes_empty_system(self, system: Wrapper, user: Wrapper) -> bool:
        try:
            text = self.render([Message("system", ""), _message("user", "A")])
        except InputError:
            return True  # refused, so that it does not matter
        return text.startswith(f"{system.before}{system.after}{user.before}{_MARKS['A']}")


def _message(role: str, name: str) -> Message:
    return Message(role, _MARKS[name])


def _common_suffix(first: str, second: str) -> str:
    return shared_start(first[::-1], second[::-1])[::-1]
