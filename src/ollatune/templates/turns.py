"""Cutting a rendered conversation into what the model is given and what it must say.

An answer's target is everything the server's prompt does not already hold: the assistant's content as the template
writes it, and the text that ends a turn, because generation stops only where the model has learnt to end it. What that
text is comes from rendering: marks stand in for contents, and what the template writes around them is read off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ollatune.base.errors import InputError
from ollatune.base.text import printable
from ollatune.templates.messages import Message, Segment

KNOWN_END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "</s>", "<|endoftext|>",
    "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>",
    "<|EOT|>",
)  # fmt: skip
"""End-of-turn texts of published models, looked for beside those the tokenizer names."""

Renderer = Callable[[Sequence[Message], bool], str]

# Letters only: no template trims, splits or escapes them.
_ANSWER_MARK = "ZqAnswerMarkQz"
_USER_MARK = "ZqUserMarkQz"


@dataclass(frozen=True)
class Turn:
    """One answer: the prompt before it, what the model says, how it ends, and what follows outside the model's say."""

    prompt: str
    body: str
    ending: str
    trailing: str
    is_ending_in_template: bool

    @property
    def answer(self) -> str:
        return self.body + self.ending


class TurnReader:
    """Finds answers in what `render` makes of conversations.

    `render(messages, is_prompt)` gives the text with the prompt of the next answer (`is_prompt`) or without.
    """

    def __init__(
        self,
        render: Renderer,
        *,
        end_of_turn_texts: Sequence[str],
        eos_text: str,
        shows_prompt_after_answer: bool,
    ) -> None:
        self.render = render
        texts = [*end_of_turn_texts, eos_text, *KNOWN_END_OF_TURN]
        self.end_of_turn_texts = [text for text in dict.fromkeys(texts) if text]
        self.eos_text = eos_text
        # Go templates know no difference between a prompt and a closed conversation: what follows the last answer there
        # may be the next prompt, and is not part of this conversation.
        self.shows_prompt_after_answer = shows_prompt_after_answer
        self._surroundings: dict[tuple[object, ...], tuple[str, str, str]] = {}

    def read(self, history: Sequence[Message], answer: Message) -> Turn:
        """The turn in which `answer` follows `history`. Raises InputError where prompt and rendering disagree."""
        prompt = self.render(history, True)
        full = self.render([*history, answer], False)
        if not full.startswith(prompt):
            raise _not_a_prefix(prompt, full)
        rest = full[len(prompt) :]
        key = (*(m.role for m in history), bool(answer.thinking), len(answer.tool_calls))
        known = self._surroundings.get(key)
        if known is None or not _is_surrounded(rest, answer.content, known):
            known = self._surroundings[key] = self._probe(history, answer, prompt)
        _, after, between = known
        if not rest.endswith(after):
            after = self._own_ending(rest)
        body = rest[: len(rest) - len(after)]
        ending, trailing = self._split_ending(after)
        is_in_template = True
        if not ending:
            ending, _ = self._split_ending(between)
            trailing = ""
        if not ending:
            is_in_template = False
            ending = self.eos_text
        if not ending:
            raise InputError(
                "The chat template ends an answer with no end-of-turn token and the tokenizer names none, so the "
                "model could not learn to stop.",
                hint="Set the tokenizer's eos token, or use another template.",
            )
        if self.shows_prompt_after_answer:
            trailing = ""
        return Turn(prompt, body, ending, trailing, is_in_template)

    def _probe(
        self, history: Sequence[Message], answer: Message, prompt: str
    ) -> tuple[str, str, str]:
        """What the template writes before and after a last answer's content, and between it and a next user's."""
        marked = replace(answer, content=_ANSWER_MARK)
        closed = self.render([*history, marked], False)
        at = closed.rfind(_ANSWER_MARK)
        if not closed.startswith(prompt) or at < len(prompt):
            raise InputError(
                "The chat template does not show the assistant's last message, so there is nothing to train on.",
                hint="Use a template with .Messages or .Response.",
            )
        before, after = closed[len(prompt) : at], closed[at + len(_ANSWER_MARK) :]
        try:
            continued = self.render([*history, marked, Message("user", _USER_MARK)], True)
        except InputError:  # the template has no place for a user here, after a tool call say
            return before, after, ""
        start, end = continued.rfind(_ANSWER_MARK), continued.rfind(_USER_MARK)
        between = continued[start + len(_ANSWER_MARK) : end] if 0 <= start < end else ""
        return before, after, between

    def _split_ending(self, after: str) -> tuple[str, str]:
        """`after` cut behind the first end-of-turn text in it; an empty ending where there is none."""
        found = [
            (after.index(text), -len(text), text)
            for text in self.end_of_turn_texts
            if text in after
        ]
        if not found:
            return "", after
        at, _, text = min(found)
        return after[: at + len(text)], after[at + len(text) :]

    def _own_ending(self, rest: str) -> str:
        """How a rendering ends that differs from the one with a mark, as tool calls make it."""
        visible = rest.rstrip()
        for text in self.end_of_turn_texts:
            if visible.endswith(text):
                return text + rest[len(visible) :]
        raise InputError(
            f"Cannot find where the assistant's message ends in its rendering: {printable(rest)!r}.",
            hint="Expected it to end with one of the tokenizer's end-of-turn tokens.",
        )

    def segments(
        self, messages: Sequence[Message], *, is_every_answer_target: bool
    ) -> list[Segment] | None:
        """`messages`, which end with an answer, as segments.

        None where every answer is wanted but the prompt of the last one shows an earlier one otherwise than the model
        said it (thinking removed, say): such answers can only be trained as examples of their own.
        """
        last = self.read(messages[:-1], messages[-1])
        segments: list[Segment] = []
        position = 0
        if is_every_answer_target:
            for index, message in enumerate(messages[:-1]):
                if message.role != "assistant":
                    continue
                turn = self.read(messages[:index], message)
                said = turn.prompt + turn.answer
                if not turn.is_ending_in_template or not last.prompt.startswith(said):
                    return None
                segments.append(Segment(last.prompt[position : len(turn.prompt)], False))
                segments.append(Segment(turn.answer, True))
                position = len(said)
        segments.append(Segment(last.prompt[position:], False))
        segments.append(Segment(last.answer, True))
        if last.trailing:
            segments.append(Segment(last.trailing, False))
        return segments


def _is_surrounded(rest: str, content: str, known: tuple[str, str, str]) -> bool:
    before, after, _ = known
    inner = rest[len(before) : len(rest) - len(after)]
    return (
        rest.startswith(before)
        and rest.endswith(after)
        and len(before) + len(after) <= len(rest)
        and inner in (content, content.strip())
    )


def _not_a_prefix(prompt: str, full: str) -> InputError:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b),
        min(len(prompt), len(full)),
    )
    return InputError(
        "The chat template writes a finished answer otherwise than the prompt for it: the prompt goes on with "
        f"{printable(prompt[same : same + 40])!r} where the conversation has {printable(full[same : same + 40])!r}. "
        "What would be trained is not what would be served.",
        hint="Use another template, for example the TEMPLATE of the same model from Ollama.",
    )
