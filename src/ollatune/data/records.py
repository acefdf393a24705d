"""Record forms: recognised from the first record of a file, then required of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ollatune.base.errors import UsageError
from ollatune.base.text import did_you_mean, printable
from ollatune.data.conversation import ChatMessage, Conversation, Document, Sample
from ollatune.data.fields import answer_of, optional_text, text_of
from ollatune.data.forms import (
    CONTEXT_NAMES,
    FORMS,
    MAPPABLE_FIELDS,
    MAX_NOTED,
    RecordForm,
    Seen,
    forms_in_words,
)
from ollatune.data.messages import check_turns, parse_messages, parse_tools
from ollatune.data.position import Position, Record, RecordError
from ollatune.data.sources import TextPiece


class RecordReader:
    """Turns the records of one file into conversations and documents.

    `columns` maps our field names to the source's own; `system` is given to conversations without a system message.
    """

    def __init__(
        self, *, columns: Mapping[str, str] | None = None, system: str | None = None
    ) -> None:
        self._columns = dict(columns or {})
        for name, theirs in self._columns.items():
            first = next(ours for ours, its in self._columns.items() if its == theirs)
            if first != name:
                raise UsageError(
                    f"`data.columns` maps `{printable(theirs, limit=40)}` to both `{first}` and `{name}`.",
                    hint="Every column can be one field only.",
                )
            if name not in MAPPABLE_FIELDS:
                raise UsageError(
                    f"`data.columns` maps `{printable(name, limit=40)}`, which is no field of a record."
                    f"{did_you_mean(name, MAPPABLE_FIELDS)}",
                    hint=f"Our names stand on the left, yours on the right. Ours: {', '.join(MAPPABLE_FIELDS)}.",
                )
        self._system = ChatMessage("system", system) if system else None
        self.form: RecordForm | None = None
        self.first: Position | None = None
        self.seen = Seen()
        self._known: frozenset[str] = frozenset()
        self._convert: Callable[[dict[str, Any], Position], Sample] = self._text

    def __call__(self, record: Record) -> Sample:
        """The record in normal form. Raises RecordError."""
        value, position = record
        if type(value) is TextPiece:
            text_of(value.text, "text", position)
            return Document(value.text, value.begins, value.ends)
        if self._columns:
            value = self._renamed(value, position)
        form = self.form
        if form is None:
            form = self._recognise(value, position)
        for field in form.required:
            if field not in value:
                raise self._differs(form, field, value, position)
        sample = self._convert(value, position)
        if "score" in value:
            sample.score = _score(value["score"], position)
        if len(value) > len(form.required):
            rest = {k: v for k, v in value.items() if k not in self._known}
            if rest:
                sample.metadata = rest
                unused = self.seen.unused
                if len(unused) < MAX_NOTED and not unused.issuperset(rest):
                    unused.update(rest)
        return sample

    def fix_form(self, name: str, first: Position) -> None:
        """Require the form called `name`, which the record at `first` had, from the start."""
        self._use(next(form for form in FORMS if form.name == name))
        self.first = first

    def _use(self, form: RecordForm) -> None:
        converters: dict[str, Callable[[dict[str, Any], Position], Sample]] = {
            "messages": self._messages,
            "sharegpt": self._sharegpt,
            "instruction": self._instruction,
            "alpaca": self._alpaca,
            "prompt-completion": self._prompt_completion,
            "text": self._text,
        }
        self.form = form
        self._known = frozenset(form.fields)
        self._convert = converters[form.name]

    def _recognise(self, value: Mapping[str, Any], position: Position) -> RecordForm:
        for form in FORMS:
            if all(field in value for field in form.required):
                self._use(form)
                self.first = position
                return form
        keys = ", ".join(f"`{printable(str(key), limit=40)}`" for key in list(value)[:8]) or "none"
        guess = ""
        for form in FORMS:
            for field in form.required:
                if field not in value and not guess:
                    guess = did_you_mean(field, [str(k) for k in value if k not in form.fields])
                    guess = guess and f" Is {guess.split('mean ')[1][:-1]} meant to be `{field}`?"
        raise RecordError(
            position,
            f"the fields ({keys}) are those of no known record form",
            f"Expected {forms_in_words()}; or name your columns: "
            f"`data.columns: {{instruction: YOUR_COLUMN, response: YOUR_COLUMN}}`.{guess}",
        )

    def _renamed(self, value: Mapping[str, Any], position: Position) -> dict[str, Any]:
        renamed = dict(value)
        picked = {}
        for ours, theirs in self._columns.items():
            if theirs in renamed:
                picked[ours] = renamed.pop(theirs)
                self.seen.columns.add(theirs)
            elif ours not in ("context", "input", "system", "tools", "score", "history"):
                keys = [str(key) for key in value]
                raise RecordError(
                    position,
                    f"no column `{printable(theirs, limit=40)}` (mapped to `{ours}` in `data.columns`)",
                    f"The record has: {', '.join(keys[:12])}.{did_you_mean(theirs, keys)}",
                )
        return {**renamed, **picked}

    def _differs(
        self, form: RecordForm, field: str, value: Mapping[str, Any], position: Position
    ) -> RecordError:
        as_in = f" as in the first record ({self.first})" if self.first else ""
        other = next(
            (f for f in FORMS if f is not form and all(k in value for k in f.required)), None
        )
        if other is not None:
            return RecordError(
                position,
                f"a record in the `{other.name}` form among records in the `{form.name}` form{as_in}",
                "Put the two forms into two files.",
            )
        keys = [str(key) for key in value if key not in form.fields]
        return RecordError(
            position,
            f"the field `{field}` is missing{as_in}",
            f"Add it.{did_you_mean(field, keys)}",
        )

    def _start(self, value: Mapping[str, Any], position: Position) -> list[ChatMessage]:
        """The system message, from the record or from the configuration."""
        if value.get("system"):
            return [ChatMessage("system", text_of(value["system"], "system", position))]
        return [self._system] if self._system else []

    def _tools(self, value: Mapping[str, Any], position: Position) -> tuple[Mapping[str, Any], ...]:
        tools = value.get("tools")
        return parse_tools(tools, position) if tools else ()

    def _exchange(
        self, value: Mapping[str, Any], question: str, answer: str, position: Position
    ) -> Conversation:
        messages = self._start(value, position)
        messages.append(ChatMessage("user", question))
        messages.append(ChatMessage("assistant", answer))
        return Conversation(tuple(messages), self._tools(value, position))

    def _context(self, value: Mapping[str, Any], position: Position) -> str:
        found = [optional_text(value.get(name), name, position) for name in CONTEXT_NAMES]
        if all(found) and found[0] != found[1]:
            raise RecordError(
                position,
                "`context` and `input` are both filled in, and only one can follow the instruction",
                "Join them in one field, or rename the other.",
            )
        return found[0] or found[1]

    def _with_context(
        self, value: Mapping[str, Any], answer_field: str, position: Position
    ) -> Conversation:
        question = text_of(value["instruction"], "instruction", position)
        answer = answer_of(value[answer_field], answer_field, position)
        parts = (question, context := self._context(value, position))
        if context:
            question = f"{question}\n\n{context}" if question else context
        if not question or question.isspace():
            raise RecordError(
                position, "`instruction` is empty", "Write the task or remove the record."
            )
        conversation = self._exchange(value, question, answer, position)
        conversation.question_parts = parts
        if history := value.get("history"):
            return _with_history(conversation, history, position)
        return conversation

    def _instruction(self, value: dict[str, Any], position: Position) -> Sample:
        return self._with_context(value, "response", position)

    def _alpaca(self, value: dict[str, Any], position: Position) -> Sample:
        return self._with_context(value, "output", position)

    def _prompt_completion(self, value: dict[str, Any], position: Position) -> Sample:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):  # both may be chat messages
            return self._chat(value, [*prompt, *completion], "prompt + completion", position)
        question = answer_of(prompt, "prompt", position)
        return self._exchange(
            value, question, answer_of(completion, "completion", position), position
        )

    def _messages(self, value: dict[str, Any], position: Position) -> Sample:
        return self._chat(value, value["messages"], "messages", position)

    def _sharegpt(self, value: dict[str, Any], position: Position) -> Sample:
        return self._chat(value, value["conversations"], "conversations", position)

    def _chat(self, value: Mapping[str, Any], turns: Any, name: str, position: Position) -> Sample:
        messages = parse_messages(turns, name, position)
        if messages[0].role != "system":
            messages = self._start(value, position) + messages
            check_turns(messages, name, position)
        elif value.get("system") not in (None, "", messages[0].content):
            raise RecordError(
                position,
                f"there are two system messages, `system` and the first of `{name}`",
                "Keep one of them.",
            )
        return Conversation(tuple(messages), self._tools(value, position))

    def _text(self, value: dict[str, Any], position: Position) -> Sample:
        return Document(answer_of(value["text"], "text", position))


def _with_history(conversation: Conversation, history: Any, position: Position) -> Conversation:
    """The conversation with earlier [question, answer] pairs before its question."""
    earlier: list[ChatMessage] = []
    for index, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(
                position, f"`history[{index}]` must be a [question, answer] pair", "Correct it."
            )
        earlier.append(ChatMessage("user", text_of(pair[0], f"history[{index}][0]", position)))
        earlier.append(
            ChatMessage("assistant", answer_of(pair[1], f"history[{index}][1]", position))
        )
    at = 1 if conversation.messages[0].role == "system" else 0
    messages = (*conversation.messages[:at], *earlier, *conversation.messages[at:])
    return Conversation(messages, conversation.tools)


def _score(value: Any, position: Position) -> float:
    try:
        score = float("nan") if isinstance(value, bool) else float(value)  # CSV has it as text
    except (TypeError, ValueError):
        score = float("nan")
    if not math.isfinite(score):
        found = "null" if value is None else printable(repr(value), limit=40)
        raise RecordError(
            position, f"`score` must be a number, found {found}", "Correct it or rename the field."
        )
    return score
