"""Checking single fields of a record."""

from __future__ import annotations

from typing import Any

from ollatune.data.position import Position, RecordError


def text_of(value: Any, name: str, position: Position) -> str:
    """`value` as clean text. Raises RecordError for null, other types, NUL characters and lone surrogates."""
    if type(value) is not str:
        found = {
            type(None): "null",
            bool: "a truth value",
            int: "a number",
            float: "a number",
            list: "a list",
            dict: "an object",
        }
        raise RecordError(
            position,
            f"`{name}` must be text, found {found.get(type(value), type(value).__name__)}",
            "Write it as a string, or remove the record.",
        )
    if "\x00" in value:
        raise RecordError(position, f"`{name}` contains a NUL character", "Remove it.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise RecordError(
                position,
                f"`{name}` contains half of a character (lone surrogate \\u{code:04x})",
                "Write the character itself, or remove it.",
            ) from None
    return value


def optional_text(value: Any, name: str, position: Position) -> str:
    """Like `text_of`, with '' for null."""
    return "" if value is None else text_of(value, name, position)


def answer_of(value: Any, name: str, position: Position) -> str:
    """Like `text_of`; text without any visible character is an error too."""
    text = text_of(value, name, position)
    if not text or text.isspace():
        raise RecordError(
            position, f"`{name}` is empty: nothing to learn", "Fill it in or remove the record."
        )
    return text
