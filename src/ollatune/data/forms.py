"""The forms that records are written in, and what a source's records had beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ollatune.base.text import did_you_mean


@dataclass(frozen=True)
class RecordForm:
    """A way to write a record: the fields it must have, and those it may have."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return self.required + self.optional


_COMMON = ("system", "tools", "score")
CONTEXT_NAMES = ("context", "input")
"""Two names of the same: which goes with `response` and which with `output` is mixed up often."""
FORMS = (
    RecordForm("messages", ("messages",), _COMMON),
    RecordForm("sharegpt", ("conversations",), _COMMON),
    RecordForm("instruction", ("instruction", "response"), (*CONTEXT_NAMES, "history", *_COMMON)),
    RecordForm("alpaca", ("instruction", "output"), (*CONTEXT_NAMES, "history", *_COMMON)),
    RecordForm("prompt-completion", ("prompt", "completion"), _COMMON),
    RecordForm("text", ("text",), ("score",)),
)
"""In the order they are tried; the first whose required fields are all there is taken."""

MAPPABLE_FIELDS = tuple(dict.fromkeys(name for form in FORMS for name in form.fields))
"""What `data.columns` may map."""

TEXT_FILE = "text file"


_CONTEXT_FIELDS = frozenset({*CONTEXT_NAMES, "history"})
MAX_NOTED = 50


@dataclass
class Seen:
    """What the records of a source had beside what is trained on; filled in while they are read."""

    forms: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    """Fields that no part of the record's form is (the first 50)."""
    columns: set[str] = field(default_factory=set)
    """Those of `data.columns` that some record had."""

    def add(self, other: Seen) -> None:
        """Take over what another reading met."""
        self.forms |= other.forms
        self.unused |= other.unused
        self.columns |= other.columns

    def warnings(self, source: str, columns: Mapping[str, str] | None) -> list[str]:
        """Likely mistakes: a context that nobody trains on, a mapped column that no record has."""
        found = [
            f"{source}: `{name}` is no field of the {' and '.join(sorted(self.forms))} form and is not trained on. "
            "Name it in `data.columns`, or put it into the question."
            for name in sorted(self.unused & _CONTEXT_FIELDS)
        ]
        if self.forms == {TEXT_FILE}:
            return found
        return found + [
            f"{source}: no record has the column `{theirs}` (mapped to `{ours}` in `data.columns`)."
            f"{did_you_mean(theirs, sorted(self.unused))}"
            for ours, theirs in sorted((columns or {}).items())
            if theirs not in self.columns
        ]


def has_form(value: Mapping[str, Any]) -> bool:
    """Whether a record has all required fields of a form."""
    return any(all(name in value for name in form.required) for form in FORMS)


def forms_in_words() -> str:
    """What a record must have, form by form."""
    return "; ".join(" + ".join(f"`{name}`" for name in form.required) for form in FORMS)
