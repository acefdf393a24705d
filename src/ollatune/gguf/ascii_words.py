"""Splitting ASCII text into words with the standard library's `re`, as the pre-tokenizers' expressions do.

Words are encoded one by one and most of them come again and again, so with fast splitting a table of known words
encodes plain English several times as fast as the library that runs the whole pipeline for every text. Beyond ASCII
the two regex engines could differ over what a letter is, so only ASCII text is split into words here; other text is
cut where every expression begins a new word.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ASCII = frozenset(map(chr, range(128)))
_SPACES = frozenset(" \t\n\v\f\r")
_SYMBOLS = frozenset("$+<=>^`|~")
_PROPERTIES = {
    "L": frozenset(string.ascii_letters),
    "N": frozenset(string.digits),
    "M": frozenset[str](),
    "P": frozenset(string.punctuation) - _SYMBOLS,
    "S": _SYMBOLS,
}
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t"}
_NEVER = r"[^\x00-\x7f]"
"""What a class without ASCII characters becomes: it matches nothing in ASCII text."""


# Letters of every Unicode version, of which none is among the letters that DeepSeek's own list leaves out.
_PLAIN_LETTERS = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u03b1-\u03c9\u0410-\u044f"
_WORD_START = re.compile(f" (?<=\\S )(?=[{_PLAIN_LETTERS}])")


def independent_pieces(text: str) -> list[str]:
    """`text` cut before every blank that stands between a character that is none and a plain letter.

    In every expression such a blank begins a word: blanks and letters make no word in this order with what is before
    them, and nothing looks back. So the words of the pieces are those of the whole.
    """
    cuts = [match.start() for match in _WORD_START.finditer(text)]
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True) if i < j]


class AsciiWords:
    """The words of ASCII text under expressions in Oniguruma's syntax, applied in turn as `PreTokenizer` says."""

    def __init__(self, expressions: Sequence[str]) -> None:
        translated = [ascii_expression(expression) for expression in expressions]
        self._splits = [re.compile(f"({expression})", re.ASCII) for expression in translated]

    def split(self, text: str) -> list[str]:
        """The words of `text`, which must be ASCII; joined they are the text."""
        pieces = [text] if text else []
        for split in self._splits:
            found: list[str] = []
            for piece in pieces:
                # What was matched and what stands between, in turn; empty where two matches touch.
                found += split.split(piece)
            pieces = [piece for piece in found if piece]
        return pieces


def ascii_expression(expression: str) -> str:
    """`expression` in the syntax of `re`, equal to the original on ASCII text."""
    parts: list[str] = []
    at = 0
    while at < len(expression):
        if expression[at] == "[":
            members, at = _read_class(expression, at)
            parts.append(_written(members))
        elif expression[at] == "(" and expression[at + 1 : at + 2] != "?":
            raise AssertionError("a group that captures would add pieces to what is split")
        elif expression[at] == "\\":
            escape = expression[at : at + 2]
            parts.append(r"\Z" if escape == r"\z" else escape)
            at += 2
        else:
            parts.append(expression[at])
            at += 1
    return "".join(parts)


def _written(members: frozenset[str]) -> str:
    if not members:
        return _NEVER
    return "[" + "".join(f"\\x{ord(character):02x}" for character in sorted(members)) + "]"


def _read_class(expression: str, at: int) -> tuple[frozenset[str], int]:
    """The ASCII characters of the class that opens at `at`, and the place after it. Knows `^`, `&&` and nesting."""
    at += 1
    if is_negated := expression[at] == "^":
        at += 1
    operands: list[frozenset[str]] = []
    current: frozenset[str] = frozenset()
    while expression[at] != "]":
        if expression.startswith("&&", at):
            operands.append(current)
            current = frozenset()
            at += 2
        elif expression[at] == "[":
            inner, at = _read_class(expression, at)
            current |= inner
        else:
            members, first, at = _read_member(expression, at)
            if first is not None and expression[at] == "-" and expression[at + 1] != "]":
                _, last, at = _read_member(expression, at + 1)
                assert last is not None, "a range ends with a character"
                members = frozenset(map(chr, range(first, min(last, 127) + 1)))
            current |= members
    for operand in operands:
        current &= operand
    return (_ASCII - current if is_negated else current), at + 1


def _read_member(expression: str, at: int) -> tuple[frozenset[str], int | None, int]:
    """One member of a class: its ASCII characters, its code point (None for a set of them), the place after it."""
    if expression[at] != "\\":
        return frozenset(expression[at]) & _ASCII, ord(expression[at]), at + 1
    kind = expression[at + 1]
    if kind == "s":
        return _SPACES, None, at + 2
    if kind == "p":
        end = expression.index("}", at)
        return _PROPERTIES[expression[at + 3 : end]], None, end + 1
    if kind == "x":
        end = expression.index("}", at)
        code = int(expression[at + 3 : end], 16)
        return frozenset(chr(code)) & _ASCII, code, end + 1
    assert not kind.isalnum() or kind in _ESCAPES, f"unknown escape \\{kind}"
    character = _ESCAPES.get(kind, kind)
    return frozenset(character), ord(character), at + 2
