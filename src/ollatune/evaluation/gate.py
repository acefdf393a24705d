"""A gate on measured values: `--require "exact_match>=0.7"`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ollatune.base.errors import UsageError, VerificationError
from ollatune.base.text import did_you_mean

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_REQUIREMENT = re.compile(
    r"\s*(?P<name>[A-Za-z_][\w.]*)\s*(?P<sign>>=|<=|==|>|<)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)


@dataclass(frozen=True)
class Requirement:
    """`name` must stand in the relation `sign` to `bound`."""

    name: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read `exact_match>=0.7` or `exact_match >= 70%`. Raises UsageError."""
        found = _REQUIREMENT.fullmatch(text)
        if found is None:
            raise UsageError(
                f"The requirement {text!r} cannot be read.",
                hint='Write a name, one of >= > <= < ==, and a number: --require "exact_match>=0.7".',
            )
        bound = float(found["number"]) / (100 if found["percent"] else 1)
        return cls(found["name"], found["sign"], bound)

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"

    def is_met(self, values: Mapping[str, float]) -> bool:
        """Whether the measured value meets it; NaN never does. Raises UsageError where it was not measured."""
        if self.name not in values:
            raise UsageError(
                f"The requirement `{self}` names what was not measured.{did_you_mean(self.name, values)}",
                hint=f"Measured: {', '.join(sorted(values))}.",
            )
        return _OPERATORS[self.sign](values[self.name], self.bound)


def require(requirements: Iterable[str | Requirement], values: Mapping[str, float]) -> None:
    """Raise VerificationError naming every requirement that is not met, with what was measured."""
    parsed = [Requirement.parse(item) if isinstance(item, str) else item for item in requirements]
    failed = [item for item in parsed if not item.is_met(values)]
    if failed:
        listed = "; ".join(
            f"{item} required, {item.name} is {values[item.name]:.4g}" for item in failed
        )
        raise VerificationError(
            f"The model does not meet what is required of it: {listed}.",
            hint="Train longer or on more data, or lower the requirement.",
        )
