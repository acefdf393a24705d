"""Where a record stands, and the error that says so."""

from __future__ import annotations

from typing import Any, NamedTuple

from ollatune.base.errors import InputError
from ollatune.base.text import printable


class Position(NamedTuple):
    """A place in a data file. Lines and columns count from 1; Parquet's row groups and rows from 0, as pyarrow's do."""

    path: str
    line: int = 0
    column: int = 0
    row_group: int = -1
    row: int = -1

    def __str__(self) -> str:
        path = printable(self.path, limit=1000)
        if self.row >= 0:
            return f"{path}: row group {self.row_group}, row {self.row}"
        if self.row_group >= 0:
            return f"{path}: row group {self.row_group}"
        if self.column:
            return f"{path}:{self.line}:{self.column}"
        return f"{path}:{self.line}" if self.line else path

    def at(self, column: int) -> Position:
        """The same line, at `column` (from 1)."""
        return self._replace(column=column)


class Record(NamedTuple):
    """One record as the file holds it: a mapping of its fields, or the text of a plain document."""

    value: Any
    position: Position


class RecordError(InputError):
    """One record cannot be used; `--skip-bad` may leave it out and go on."""

    def __init__(self, position: Position, cause: str, cure: str) -> None:
        super().__init__(f"{position}: {cause}.", hint=cure)
        self.position = position
        self.cause = cause
        self.cure = cure

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders
        return (type(self), (self.position, self.cause, self.cure))


class FileError(RecordError):
    """A file cannot be read at all or to its end, so nobody knows what is lost: never skipped."""
