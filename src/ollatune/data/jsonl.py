"""JSON Lines and JSON arrays, each record with its exact line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ollatune.base.text import format_bytes, printable
from ollatune.data.position import FileError, Position, Record, RecordError
from ollatune.data.streams import damage_reported

Reject = Callable[[RecordError], None]

MAX_RECORD_BYTES = 32 << 20
"""A longer record is an error: it is a broken file far more often than a training example."""

_SPACES = " \t\r\n"
_OTHER_QUOTES = "'`\u2018\u2019\u201c\u201d\u201e"
_CHUNK_CHARACTERS = 1 << 20


class _BadConstant(ValueError):
    pass


class _DuplicateKey(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key)
            seen.add(key)
    return record


def _constant(name: str) -> Any:
    raise _BadConstant(name)


_Scan = Callable[[str, int], tuple[Any, int]]
_scan_fast: _Scan = json.JSONDecoder(parse_constant=_constant).scan_once  # type: ignore[attr-defined]
_scan_checked: _Scan = json.JSONDecoder(  # type: ignore[attr-defined]
    object_pairs_hook=_pairs, parse_constant=_constant
).scan_once


def _keys_and_colons(value: dict[str, Any]) -> tuple[int, int]:
    """Keys of an object and of the objects in its lists (all there are in most records); colons in its texts."""
    num_keys = len(value)
    num_colons = 0
    for item in value.values():
        if type(item) is str:
            num_colons += item.count(":")
        elif type(item) is list:
            for inner in item:
                if type(inner) is dict:
                    num_keys += len(inner)
                    for text in inner.values():
                        if type(text) is str:
                            num_colons += text.count(":")
    return num_keys, num_colons


def _may_repeat_a_key(text: str, value: Any) -> bool:
    """Whether a key of `text` can have been lost in `value`. Several times as fast as looking at every key.

    A colon of `text` follows a key or stands inside a string. Where there are just as many as the keys and texts that
    are left in `value` account for, no key is gone - unless a text's colon is written as an escape.
    """
    if type(value) is not dict:
        return True
    num_written = text.count(":")
    if num_written == len(value):
        return False  # no key is gone, and none stands deeper
    num_keys, num_colons = _keys_and_colons(value)
    if num_written != num_keys + num_colons:
        return True
    return num_colons > 0 and "\\u003" in text and ("\\u003a" in text or "\\u003A" in text)


def scan(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends. Raises what `json` raises, and for repeated keys."""
    value, end = _scan_fast(text, start)
    if _may_repeat_a_key(text[start:end], value):
        return _scan_checked(text, start)
    return value, end


def decode_line(line: bytes, position: Position) -> str:
    """UTF-8 text of `line`. Raises RecordError with the column of the first bad byte."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        before = line[: error.start].decode()
        cure = "Save the file as UTF-8: `iconv -f LATIN1 -t UTF-8 FILE > NEW` if it is Latin-1."
        if b"\x00" in line[:4]:
            cure = "Convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`."
        raise RecordError(
            position.at(len(before) + 1), f"byte 0x{line[error.start]:02x} is not UTF-8", cure
        ) from None


def explain_json(text: str, error: Exception, position: Position) -> RecordError:
    """The error a user sees for JSON that cannot be parsed; `text` begins at `position`."""

    def at(offset: int) -> Position:
        line = position.line + text.count("\n", 0, offset)
        return position._replace(line=line, column=offset - text.rfind("\n", 0, offset))

    if isinstance(error, _BadConstant):
        name = str(error)
        found = re.search(rf"(?<![\w\"]){re.escape(name)}(?![\w\"])", text)
        return RecordError(
            at(found.start() if found else 0), f"{name} is not JSON", "Write null or a number."
        )
    if isinstance(error, _DuplicateKey):
        key = json.dumps(str(error), ensure_ascii=False)
        hits = [m.start() for m in re.finditer(re.escape(key) + r"\s*:", text)]
        where = at(hits[1]) if len(hits) == 2 else position
        return RecordError(
            where, f"the key {printable(key)} stands twice in one record", "Keep one of them."
        )
    if isinstance(error, RecursionError):
        return RecordError(position, "nested too deeply to be read", "Flatten the record.")
    if isinstance(error, json.JSONDecodeError):
        return _explain_syntax(text, error, at)
    if isinstance(error, StopIteration):
        offset = int(error.value)
        if offset >= (end := len(text.rstrip())):
            return _cut_off(at(end))
        return RecordError(
            at(offset),
            f"expected a JSON value, found {printable(text[offset])!r}",
            "Correct the line.",
        )
    digits = re.search(r"\d{4300,}", text)  # the interpreter's own limit on converting integers
    where = at(digits.start()) if digits else position
    return RecordError(where, "a number with thousands of digits", "Write it as a string.")


def _cut_off(position: Position) -> RecordError:
    return RecordError(
        position,
        "the record ends in the middle (was the file cut off?)",
        "Copy or download the file again, or delete this line.",
    )


def _explain_syntax(
    text: str, error: json.JSONDecodeError, at: Callable[[int], Position]
) -> RecordError:
    end = len(text.rstrip())
    if error.pos >= end or error.msg.startswith("Unterminated string"):
        return _cut_off(at(min(error.pos, end)))
    if error.msg.startswith("Invalid control character"):
        code = ord(text[error.pos])
        what = "NUL byte" if code == 0 else f"control character 0x{code:02x}"
        return RecordError(
            at(error.pos), f"raw {what} inside a string", f"Write it as \\u{code:04x} or remove it."
        )
    if text[error.pos] in _OTHER_QUOTES:
        cause, cure = (
            f"the quote {text[error.pos]} is not JSON's",
            'Write straight double quotes: ".',
        )
        return RecordError(at(error.pos), cause, cure)
    if text[error.pos] in "}]" and text[: error.pos].rstrip().endswith(","):
        return RecordError(
            at(error.pos), f"a comma before the closing {text[error.pos]}", "Remove the comma."
        )
    cause = error.msg[:1].lower() + error.msg[1:]
    return RecordError(at(error.pos), f"not valid JSON: {cause}", "Correct the line.")


def _parse(text: str, start: int, position: Position) -> tuple[Any, int]:
    try:
        return scan(text, start)
    except (ValueError, StopIteration, RecursionError) as error:
        raise explain_json(text, error, position) from None


def parse_line(line: bytes, position: Position) -> dict[str, Any]:
    """One JSON object from one line. Raises RecordError."""
    text = decode_line(line, position)
    start = 0
    if text[:1] == "\ufeff" and position.line == 1:
        start = 1  # a byte-order mark, harmless at the very beginning
    while start < len(text) and text[start] in _SPACES:
        start += 1
    if start < len(text) and text[start] == "\x00":
        raise RecordError(position.at(start + 1), "NUL bytes instead of text", "Remove the line.")
    if position.line == 1 and text[start:].rstrip(_SPACES) in ("{", "[", "[{"):
        raise FileError(
            position,
            "the record goes on in the next line: this is JSON, not JSON Lines",
            "Rename the file so that it ends in `.json`.",
        )
    try:
        value, end = _parse(text, start, position)
    except RecordError as error:
        is_cut_at_end = error.position.column > len(
            text.rstrip()
        )  # and not in the middle of a text
        if position.line == 1 and is_cut_at_end and text.rstrip().endswith((",", "[", "{")):
            raise RecordError(
                position,
                "the record goes on in the next line: this is JSON, not JSON Lines",
                "Rename the file so that it ends in `.json`.",
            ) from error
        raise
    if type(value) is not dict:
        raise _not_an_object(value, position)
    if end != len(text) and text[end:] != "\n" and (rest := text[end:].strip(_SPACES)):
        column = text.index(rest, end) + 1
        if text[end:].lstrip(" \t").startswith("\r"):
            cause = "a second record after a bare carriage return"
            cure = "Convert the line ends: `tr '\\r' '\\n' < FILE > NEW`."
        else:
            cause, cure = "text after the end of the record", "Put each record on its own line."
        raise RecordError(position.at(column), cause, cure)
    return value


def _not_an_object(value: Any, position: Position) -> RecordError:
    if isinstance(value, list) and position.line == 1:
        return FileError(
            position,
            "this is a JSON array, not JSON Lines",
            "Rename the file so that it ends in `.json`.",
        )
    kind = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    found = kind.get(type(value), "a number")
    return RecordError(
        position, f"expected a JSON object, found {found}", 'Write a record such as {"text": "…"}.'
    )


def read_jsonl(
    stream: BinaryIO,
    path: Path,
    reject: Reject,
    *,
    start_line: int = 1,
    num_bytes: int | None = None,
) -> Iterator[Record]:
    """Records of a JSON Lines stream; blank lines are passed over.

    `num_bytes` ends the reading at the first line that begins so many bytes on (a part of a file).
    """
    name = str(path)
    readline = stream.readline
    limit = MAX_RECORD_BYTES + 1
    number = start_line - 1
    here = [number]
    consumed = 0
    with damage_reported(path, here):
        while num_bytes is None or consumed < num_bytes:
            line = readline(limit)
            if not line:
                return
            number += 1
            here[0] = number
            consumed += len(line)
            try:
                if len(line) == limit and line[-1] != 10:
                    while (rest := readline(limit)) and rest[-1] != 10:
                        consumed += len(rest)
                    consumed += len(rest)
                    raise RecordError(
                        Position(name, number),
                        f"the line is longer than {format_bytes(MAX_RECORD_BYTES)}",
                        "Split it into shorter records.",
                    )
                if line.isspace():
                    continue
                position = Position(name, number)
                value = parse_line(line, position)
            except RecordError as error:
                reject(error)
                continue
            yield Record(value, position)
