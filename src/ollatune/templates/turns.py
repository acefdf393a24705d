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
from ollatune.templates.messages import Message, Segment, shared_start

KNOWN_END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "</s>", "<|endoftext|>",
    "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>",
    "<|EOT|>",
)  # fmt: skip
"""End-of-turn texts of published models, looked for beside those the tokenizer names."""

Renderer = Callable[[Sequence[Message], bool], str]
"""`render(messages, is_prompt)`: the text with the prompt of the next answer, or without."""

# Letters only: no template trims, splits or escapes them.
ANSWER_MARK = "ZqAnswerMarkQz"
LAST_MARK = "ZqLastMarkQz"


@dataclass(frozen=True)
class Turn:
    """One answer: the prompt before it, what the model says, how it ends, and what the template writes after that."""

    prompt: str
    body: str
    ending: str
    trailing: str
    is_ending_in_template: bool

    @property
    def answer(self) -> str:
        return self.body + self.ending


@dataclass(frozen=True)
class _Surroundings:
    """What a template writes around an answer: between prompt and content, at the end, and before a next user."""

    lead: str
    after: str
    between: str
    keeps_prompt: bool  # the finished conversation begins with the prompt, word for word


class TurnReader:
    """Finds answers in what a template makes of conversations."""

    def __init__(
        self,
        render: Renderer,
        *,
        end_of_turn_texts: Sequence[str],
        eos_text: str,
        closes_conversations: bool,
    ) -> None:
        self.render = render
        texts = [*end_of_turn_texts, eos_text, *KNOWN_END_OF_TURN]
        self.end_of_turn_texts = [text for text in dict.fromkeys(texts) if text]
        self.eos_text = eos_text
        # Go templates know only prompts: what stands there after a last answer belongs to the prompt for the next one.
        self.closes_conversations = closes_conversations
        self._known: dict[tuple[object, ...], _Surroundings] = {}

    def read(self, history: Sequence[Message], answer: Message) -> Turn:
        """The turn in which `answer` follows `history`. Raises InputError where prompt and rendering disagree."""
        prompt = self.render(history, True)
        full = self.render([*history, answer], False)
        if answer.tool_calls:
            return self._tool_call_turn(history, answer, prompt, full)
        key = (*(m.role for m in history), bool(answer.thinking))
        around = self._known.get(key)
        body = None if around is None else _plain_body(prompt, full, answer.content, around)
        if around is None or body is None:
            around, body = self._probe(history, answer, prompt, full)
            self._known[key] = around
        return self._turn(prompt, body, around.after, around.between)

    def _tool_call_turn(
        self, history: Sequence[Message], answer: Message, prompt: str, full: str
    ) -> Turn:
        """A turn with tool calls, in which a mark for the content may not show: read from its two ends."""
        said = full[len(prompt) :]
        if not full.startswith(prompt):
            said = self._after_last_message(history, answer)
        visible = said.rstrip()
        for text in self.end_of_turn_texts:
            if visible.endswith(text):
                end = len(visible) - len(text)
                return self._turn(prompt, said[:end], said[end:], "")
        continued = self.render(
            [*history, answer, Message("tool", LAST_MARK, tool_call_id="000000000")], True
        )
        between = continued[len(full) :] if continued.startswith(full) else ""
        return self._turn(prompt, said, "", between)

    def _turn(self, prompt: str, body: str, after: str, between: str) -> Turn:
        ending, trailing = self._split_ending(after)
        is_in_template = bool(ending)
        if not ending:
            # Go templates leave a last answer open; how it ends shows only where a user goes on.
            ending, _ = self._split_ending(between)
            is_in_template = bool(ending)
            trailing = ""
        ending = ending or self.eos_text
        if not ending:
            raise InputError(
                "The chat template ends an answer with no end-of-turn token and the tokenizer names none, so the "
                "model could not learn to stop.",
                hint="Set the tokenizer's eos token, or use another template.",
            )
        is_next_prompt = bool(trailing.strip()) and prompt.endswith(trailing.lstrip())
        if is_next_prompt or not self.closes_conversations:
            trailing = ""
        return Turn(prompt, body, ending, trailing, is_in_template)

    def _probe(
        self, history: Sequence[Message], answer: Message, prompt: str, full: str
    ) -> tuple[_Surroundings, str]:
        """The surroundings of `answer`, and what the model says up to its end-of-turn text."""
        marked = replace(answer, content=ANSWER_MARK)
        before, found, after = self.render([*history, marked], False).rpartition(ANSWER_MARK)
        if not found:
            raise InputError(
                "The chat template does not show the assistant's last message, so there is nothing to train on.",
                hint="Use a template with .Messages or .Response.",
            )
        lead = before[len(prompt) :]
        keeps_prompt = before.startswith(prompt)
        if not keeps_prompt:
            lead = self._after_last_message(history, marked).partition(ANSWER_MARK)[0]
        if not full.startswith(before) or not full.endswith(after):
            raise _not_a_prefix(before, full)
        content = full[len(before) : len(full) - len(after)]
        between = self._between(history, marked)
        return _Surroundings(lead, after, between, keeps_prompt), lead + content

    def _after_last_message(self, history: Sequence[Message], answer: Message) -> str:
        """What an answer adds to its prompt, where the finished conversation does not begin with the prompt.

        Some templates write an earlier message otherwise once it is answered (Mistral moves the system message to the
        last user). What counts is that after the last message the conversation goes on as the prompt does.
        """
        if not history:
            raise _not_a_prefix(self.render(history, True), self.render([answer], False))
        marked = [*history[:-1], replace(history[-1], content=LAST_MARK)]
        prompt_tail = self.render(marked, True).rpartition(LAST_MARK)[2]
        full_tail = self.render([*marked, answer], False).rpartition(LAST_MARK)[2]
        if full_tail.startswith(prompt_tail):
            return full_tail[len(prompt_tail) :]
        # A line end at the very end of a Go template stands behind the prompt, and behind the answer too.
        visible = prompt_tail.rstrip()
        shared = shared_start(prompt_tail, full_tail)
        if len(shared) < len(visible) or full_tail[len(shared) :][:1].isspace():
            raise _not_a_prefix(prompt_tail, full_tail.partition(ANSWER_MARK)[0])
        return full_tail[len(shared) :]

    def _between(self, history: Sequence[Message], marked: Message) -> str:
        """What stands between an answer and the user message after it; '' where no user can follow."""
        try:
            text = self.render([*history, marked, Message("user", LAST_MARK)], True)
        except InputError:
            return ""
        return (
            text.rpartition(LAST_MARK)[0].rpartition(ANSWER_MARK)[2] if ANSWER_MARK in text else ""
        )

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


def _plain_body(prompt: str, full: str, content: str, around: _Surroundings) -> str | None:
    """What the model says, where the rendering is plainly prompt, lead, content, after; None where it is not."""
    for shown in (content, content.strip()):
        body = around.lead + shown
        if full.endswith(body + around.after) and (
            not around.keeps_prompt or full == prompt + body + around.after
        ):
            return body
    return None


def _not_a_prefix(prompt: str, full: str) -> InputError:
    same = len(shared_start(prompt, full))
    return InputError(
        "The chat template writes a finished answer otherwise than the prompt for it: the prompt goes on with "
        f"{printable(prompt[same : same + 40])!r} where the conversation has {printable(full[same : same + 40])!r}. "
        "What would be trained is not what would be served.",
        hint="Use another template, for example the TEMPLATE of the same model from Ollama.",
    )
