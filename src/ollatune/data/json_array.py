"""`.json` files: an array of records, or records one after the other; read in pieces, never as a whole."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ollatune.base.text import format_bytes
from ollatune.data.forms import has_form
from ollatune.data.jsonl import MAX_RECORD_BYTES, Reject, explain_json, scan
from ollatune.data.position import FileError, Position, Record, RecordError
from ollatune.data.streams import damage_reported

_SPACES = " \t\r\n"
_CHUNK_BYTES = 1 << 20
_LONGEST_TOKEN = 16  # `-Infinity` and `\\ud83d\\ude00` can be cut by the end of a piece


class _Text:
    """A window over the decoded file that knows its line and column."""

    def __init__(self, stream: BinaryIO, path: Path, here: list[int]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._path = str(path)
        self._here = here
        self.text = ""
        self.at = 0
        self.line = 1
        self._column_base = 0  # characters of the current line that were already dropped
        self._num_bytes = 0
        self.ended = False
        self.fill()
        if self.text.startswith("\ufeff"):
            self.at = 1

    def position(self) -> Position:
        return Position(
            self._path,
            self.line,
            self.at
            - self.text.rfind("\n", 0, self.at)
            + (self._column_base if "\n" not in self.text[: self.at] else 0),
        )

    def fill(self) -> bool:
        """Append the next piece of the file; False at its end. Raises FileError for bytes that are not UTF-8."""
        chunk = self._stream.read(_CHUNK_BYTES)
        pending = self._decoder.getstate()[0]
        try:
            self.text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            whole = pending + chunk
            good = self.text + whole[: error.start].decode()
            line = self.line + good.count("\n", self.at)
            column = len(good) - good.rfind("\n")
            raise FileError(
                Position(self._path, line, column),
                f"byte 0x{error.object[error.start]:02x} is not UTF-8",
                "Save the file as UTF-8: `iconv -f LATIN1 -t UTF-8 FILE > NEW` if it is Latin-1.",
            ) from None
        self.ended = not chunk
        return bool(chunk)

    def advance(self, to: int) -> None:
        """Everything before `to` is done with."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to
        self._here[0] = self.line
        if to > _CHUNK_BYTES:
            line_start = self.text.rfind("\n", 0, to) + 1
            self._column_base = to - line_start + (0 if line_start else self._column_base)
            self.text, self.at = self.text[to:], 0

    def skip_spaces(self) -> str:
        """The next character that is no space, or '' at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in _SPACES:
                end += 1
            self.advance(end)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""


def _may_be_incomplete(error: Exception, text: str) -> bool:
    """Whether more text could repair `error`: it is at the very end, or inside a string that has no end yet."""
    if isinstance(error, StopIteration):
        return int(error.value) >= len(text) - _LONGEST_TOKEN
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated string")


def _located(window: _Text) -> FileError:
    rest, start = window.text[window.at :], window.position()
    try:
        scan(rest, 0)
    except (ValueError, StopIteration, RecursionError) as error:
        explained = explain_json(rest, error, start)
        where = explained.position
        if where.line == start.line and where.column:
            where = where.at(where.column + start.column - 1)
        return FileError(where, explained.cause, explained.cure)
    raise AssertionError("the same text was refused a moment ago")


def _next_value(window: _Text) -> Any:
    """The value that begins at the window's place. Raises FileError: after a syntax error nothing can be trusted."""
    while True:
        try:
            value, end = scan(window.text, window.at)
        except (ValueError, StopIteration, RecursionError) as error:
            if not window.ended and _may_be_incomplete(error, window.text):
                if len(window.text) - window.at > MAX_RECORD_BYTES:
                    raise FileError(
                        window.position(),
                        f"a record is longer than {format_bytes(MAX_RECORD_BYTES)}, or its end is missing",
                        "Split it into shorter records.",
                    ) from None
                # Doubling keeps the repeated scans of one long record linear in its length.
                wanted = 2 * (len(window.text) - window.at)
                while len(window.text) - window.at < wanted and window.fill():
                    pass
                continue
            raise _located(window) from None
        if end == len(window.text) and window.fill():
            continue  # a number could go on in the next piece
        window.advance(end)
        return value


def read_json(stream: BinaryIO, path: Path, reject: Reject) -> Iterator[Record]:
    """Records of a JSON file: the elements of its array, or the objects that follow one another.

    A syntax error ends the reading even with `--skip-bad`: where the next record begins is not known then.
    """
    here = [1]
    with damage_reported(path, here):
        window = _Text(stream, path, here)
        is_array = window.skip_spaces() == "["
        if is_array:
            window.advance(window.at + 1)
        is_first = True
        while True:
            character = window.skip_spaces()
            if is_array and character == "]":
                window.advance(window.at + 1)
                if window.skip_spaces():
                    raise FileError(
                        window.position(), "text after the end of the array", "Remove it."
                    )
                return
            if not character:
                if is_array:
                    raise FileError(
                        window.position(),
                        "the array has no end (was the file cut off?)",
                        "Copy or download the file again.",
                    )
                return
            if is_array and not is_first:
                if character != ",":
                    raise FileError(
                        window.position(),
                        "expected `,` or `]` between records",
                        "Correct the array.",
                    )
                window.advance(window.at + 1)
                if not (following := window.skip_spaces()):
                    continue
                if following == "]":
                    raise FileError(
                        window.position(), "a comma before the closing ]", "Remove the comma."
                    )
            is_first = False
            position = window.position()
            value = _next_value(window)
            if type(value) is not dict:
                reject(
                    RecordError(
                        position, "expected a JSON object", 'Write {"text": "…"} or the like.'
                    )
                )
                continue
            _refuse_wrapped(value, is_array, position)
            yield Record(value, position)


def _refuse_wrapped(value: dict[str, Any], is_array: bool, position: Position) -> None:
    if is_array or len(value) > 3 or has_form(value):
        return
    lists = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    # Turns of a chat in a column with a name of its own are a record, too.
    if lists and not any("role" in value[name][0] or "from" in value[name][0] for name in lists):
        raise FileError(
            position,
            f"the records stand under the key `{lists[0]}` instead of at the top",
            f"Make the list the whole file: `jq '.{lists[0]}' FILE > NEW`.",
        )
