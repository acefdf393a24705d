"""What happens to bad records: stop at the first, or set them aside up to a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.files import staged_file
from ollatune.data.position import FileError, RecordError

MAX_REJECTED_FRACTION = 0.05
"""With `--skip-bad`: a data set with a larger share of bad records is refused."""

_EARLY_STOP_COUNT = 1000
"""From so many bad records on, the share is checked while reading, not only at the end."""


class Rejections:
    """The bad records of one reading. Call it with an error: it raises, or notes it when `skip_bad` is set."""

    def __init__(self, *, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.errors: list[RecordError] = []
        self.num_good = 0

    def __call__(self, error: RecordError) -> None:
        if not self.skip_bad or isinstance(error, FileError):
            raise error
        self.errors.append(error)
        if len(self.errors) >= _EARLY_STOP_COUNT:
            self.check()

    def add(self, other: Rejections) -> None:
        """Take over what another reading (a worker's) counted."""
        self.errors.extend(other.errors)
        self.num_good += other.num_good

    @property
    def fraction(self) -> float:
        """Bad records over all records."""
        return len(self.errors) / max(1, len(self.errors) + self.num_good)

    def check(self) -> None:
        """Raises InputError where too many records were bad."""
        if self.fraction > MAX_REJECTED_FRACTION:
            first = self.errors[0]
            raise InputError(
                f"{len(self.errors)} of {len(self.errors) + self.num_good} records are bad "
                f"({self.fraction:.1%}, at most {MAX_REJECTED_FRACTION:.0%} may be skipped). "
                f"The first: {first.message}",
                hint=f"{first.cure} Correct the data rather than skipping it.",
            )

    def rows(self) -> list[dict[str, Any]]:
        """One row per bad record: position, reason, cure."""
        return [
            {
                "position": str(error.position),
                **{k: v for k, v in error.position._asdict().items() if v not in (0, -1)},
                "reason": error.cause,
                "cure": error.cure,
            }
            for error in self.errors
        ]

    def write(self, path: Path) -> None:
        """Write `rejected.jsonl`. Raises StorageError."""
        with staged_file(path) as stream:
            for row in self.rows():
                stream.write((json.dumps(row, ensure_ascii=True) + "\n").encode())
