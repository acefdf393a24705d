"""Cutting a Go template into tokens, with its trim markers (`{{-`, `-}}`) and comments already applied.

The language is the one of Go's text/template (https://pkg.go.dev/text/template); `tests/data/go-template-goldens.jsonl`
holds what real Ollama servers made of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollatune.base.errors import InputError

_TRIMMED = " \t\r\n"
KEYWORDS = frozenset(
    [
        "block",
        "break",
        "continue",
        "define",
        "else",
        "end",
        "if",
        "nil",
        "range",
        "template",
        "with",
    ]
)
_SPACE = re.compile(r"[ \t\r\n]+")
_NAME = re.compile(r"[^\W\d]\w*|\w+")
_NUMBER = re.compile(
    r"[+-]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+"
    r"|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)"
)
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"')
_CHARACTER = re.compile(r"'(?:[^'\\\n]|\\[^\n])*'")
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL
)
_SIMPLE_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"',
}  # fmt: skip
_TERMINATORS = frozenset(".,|:)(} \t\r\n")


class GoTemplateError(InputError):
    """A template that Go's engine refuses, or a construct that this engine does not render."""


def syntax_error(line: int, reason: str) -> GoTemplateError:
    """The words Ollama's server answers with for a template that does not parse."""
    return GoTemplateError(f"template error: template: :{line}: {reason}")


@dataclass(frozen=True)
class Token:
    """`kind` is the punctuation or keyword itself, or one of text, field, variable, name, number, string, char,
    space, eof."""

    kind: str
    value: str
    line: int


def unquote(literal: str, line: int) -> str:
    """The value of a quoted or raw Go string. Bytes that are no UTF-8 (`\\xff`) become surrogate escapes."""
    if literal[0] == "`":
        return literal[1:-1].replace("\r", "")
    pieces: list[bytes] = []
    position = 1
    body = literal[:-1]
    for match in _ESCAPE.finditer(body, 1):
        pieces.append(body[position : match.start()].encode())
        pieces.append(_escaped(match, line))
        position = match.end()
    pieces.append(body[position:].encode())
    return b"".join(pieces).decode("utf-8", "surrogateescape")


def _escaped(match: re.Match[str], line: int) -> bytes:
    hex_byte, short, long, octal, simple = match.groups()
    if hex_byte:
        return bytes([int(hex_byte, 16)])
    if octal and int(octal, 8) < 256:
        return bytes([int(octal, 8)])
    if short or long:
        code = int(short or long, 16)
        if code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
            return chr(code).encode()
    if simple in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[simple].encode()
    raise syntax_error(line, "invalid syntax")


class _Lexer:
    def __init__(self, source: str) -> None:
        self.source = source
        self.position = 0
        self.line = 1
        self.tokens: list[Token] = []

    def emit(self, kind: str, end: int) -> None:
        value = self.source[self.position : end]
        self.tokens.append(Token(kind, value, self.line))
        self.line += value.count("\n")
        self.position = end

    def skip(self, end: int) -> None:
        self.line += self.source.count("\n", self.position, end)
        self.position = end

    def run(self) -> list[Token]:
        source = self.source
        while True:
            start = source.find("{{", self.position)
            if start < 0:
                if self.position < len(source):
                    self.emit("text", len(source))
                self.emit("eof", len(source))
                return self.tokens
            is_trimmed = source[start + 2 : start + 3] == "-" and source[start + 3 : start + 4] in (
                *_TRIMMED,
            )
            end = start
            if is_trimmed:
                end = self.position + len(source[self.position : start].rstrip(_TRIMMED))
            if end > self.position:
                self.emit("text", end)
            self.skip(start)
            after_marker = start + (4 if is_trimmed else 2)
            if source.startswith("/*", after_marker):
                self.comment(after_marker)
            else:
                self.emit("{{", start + 2)
                self.skip(after_marker)
                self.action()

    def right_delimiter(self, at: int) -> int:
        """The position after a right delimiter at `at` with what its marker trims, or -1 where there is none."""
        source = self.source
        if source.startswith("}}", at):
            return at + 2
        if source[at : at + 1] in (*_TRIMMED,) and source.startswith("-}}", at + 1):
            end = at + 4
            return end + len(source[end:]) - len(source[end:].lstrip(_TRIMMED))
        return -1

    def comment(self, start: int) -> None:
        end = self.source.find("*/", start)
        if end < 0:
            raise syntax_error(self.line, "unclosed comment")
        after = self.right_delimiter(end + 2)
        if after < 0:
            self.skip(end)
            raise syntax_error(self.line, "comment ends before closing delimiter")
        self.skip(after)

    def action(self) -> None:
        source = self.source
        depth = 0
        while True:
            after = self.right_delimiter(self.position)
            if after >= 0:
                if depth:
                    raise syntax_error(self.line, "unclosed left paren")
                self.emit("}}", self.position + (2 if source[self.position] == "}" else 4))
                self.skip(after)
                return
            if self.position >= len(source):
                raise syntax_error(self.line, "unclosed action")
            character = source[self.position]
            if character == "(":
                depth += 1
            elif character == ")":
                depth -= 1
                if depth < 0:
                    raise syntax_error(self.line, "unexpected right paren")
            self.token(character)

    def token(self, character: str) -> None:
        source, at = self.source, self.position
        if match := _SPACE.match(source, at):
            end = match.end()
            # A blank that begins ` -}}` belongs to the delimiter.
            if source.startswith("-}}", end):
                end -= 1
            self.emit("space", end)
        elif character in "|(),":
            self.emit(character, at + 1)
        elif source.startswith(":=", at):
            self.emit(":=", at + 2)
        elif character == "=":
            self.emit("=", at + 1)
        elif character == '"':
            self.matched("string", _QUOTED.match(source, at), "unterminated quoted string")
        elif character == "`":
            end = source.find("`", at + 1)
            if end < 0:
                raise syntax_error(self.line, "unterminated raw quoted string")
            self.emit("string", end + 1)
        elif character == "'":
            self.matched("char", _CHARACTER.match(source, at), "unterminated character constant")
        elif character == "$" or (character == "." and not source[at + 1 : at + 2].isdigit()):
            name = _NAME.match(source, at + 1)
            end = name.end() if name else at + 1
            kind = "variable" if character == "$" else "field" if name else "."
            self.word(kind, end)
        elif (number := _NUMBER.match(source, at)) and character in "+-.0123456789":
            if source[number.end() : number.end() + 1].isalnum():
                raise syntax_error(
                    self.line, f'bad number syntax: "{source[at : number.end() + 1]}"'
                )
            self.emit("number", number.end())
        elif name := _NAME.match(source, at):
            self.word(name.group() if name.group() in KEYWORDS else "name", name.end())
        else:
            raise syntax_error(
                self.line, f"unrecognized character in action: U+{ord(character):04X} '{character}'"
            )

    def matched(self, kind: str, match: re.Match[str] | None, problem: str) -> None:
        if match is None:
            raise syntax_error(self.line, problem)
        self.emit(kind, match.end())

    def word(self, kind: str, end: int) -> None:
        following = self.source[end : end + 1]
        if following and following not in _TERMINATORS:
            raise syntax_error(self.line, f"bad character U+{ord(following):04X} '{following}'")
        self.emit(kind, end)


def tokenize(source: str) -> list[Token]:
    """The tokens of `source`, ending with eof. Raises GoTemplateError in Go's words."""
    return _Lexer(source).run()
