"""Modelfiles: read and written exactly as Ollama's own parser does (its `parser/parser.go`).

    # comment
    INSTRUCTION value              case of the instruction does not matter
    PARAMETER name value           MESSAGE role value

A value is bare to the end of its line, `"…"`, or three quotes; quoted ones may span lines and end at the first line end
at which the quotes are closed. There are no escapes, and characters that are not printable are dropped. So some values
cannot be written at all; `render` checks each by reading it back and refuses what would come out changed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.text import nearest, printable
from ollatune.ollama.parameters import (
    DEPRECATED_PARAMETERS,
    parameter_text,
    parameter_value,
)

INSTRUCTIONS = (
    "from", "adapter", "draft", "template", "system", "license", "parameter", "message", "renderer", "parser",
    "requires",
)  # fmt: skip
MESSAGE_ROLES = ("system", "user", "assistant")

_ALPHA = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_PARAMETER_CHARACTERS = _ALPHA | frozenset("0123456789_")
_BLANKS = " \t"
_NEWLINES = "\r\n"
# Go's BOMOverride: a byte order mark decides the encoding, UTF-8 otherwise.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Command:
    """One instruction, its name in lower case. `key` is a parameter's name or a message's role, else empty."""

    name: str
    value: str
    key: str = ""
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Modelfile:
    """The instructions of a Modelfile in their order; the properties give what Ollama makes of them."""

    commands: tuple[Command, ...]

    @classmethod
    def parse(cls, source: str | bytes, *, path: str = "Modelfile") -> Modelfile:
        """Read a Modelfile. Raises InputError with `path:line` where Ollama would refuse it."""
        commands = tuple(_Reader(_decode(source), path).read())
        if not any(command.name == "from" for command in commands):
            raise InputError(
                f"{path}: no FROM line.", hint="Begin with FROM and a model name or a .gguf file."
            )
        return cls(commands)

    @classmethod
    def build(
        cls,
        source: str,
        *,
        template: str | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        messages: Iterable[Mapping[str, Any]] = (),
        licenses: Sequence[str] = (),
        adapter: str | None = None,
        renderer: str = "",
        parser: str = "",
        requires: str = "",
    ) -> Modelfile:
        """A Modelfile from its parts; `source` is what FROM names. A parameter with a list becomes several lines."""
        commands = [Command("from", source)]
        if adapter is not None:
            commands.append(Command("adapter", adapter))
        for name, text in (("template", template), ("system", system)):
            if text is not None:
                commands.append(Command(name, text))
        for name, text in (("renderer", renderer), ("parser", parser), ("requires", requires)):
            if text:
                commands.append(Command(name, text))
        for key, value in (parameters or {}).items():
            for item in value if isinstance(value, list | tuple) else [value]:
                commands.append(Command("parameter", parameter_text(item), key))
        for message in messages:
            commands.append(Command("message", str(message["content"]), str(message["role"])))
        commands += [Command("license", text) for text in licenses]
        return cls(tuple(commands))

    def render(self, *, comment: str = "") -> str:
        """The text, one instruction after the other, `comment` above. Raises InputError for what cannot be said."""
        lines = [f"# {line}".rstrip() + "\n" for line in comment.splitlines()]
        if lines:
            lines.append("\n")
        return "".join(lines + [_render_command(command) for command in self.commands])

    @property
    def source(self) -> str:
        """What the last FROM names: a model, or a file's path."""
        return self._last("from") or ""

    @property
    def template(self) -> str | None:
        return self._last("template")

    @property
    def system(self) -> str | None:
        return self._last("system")

    @property
    def adapter(self) -> str | None:
        """The last ADAPTER: Ollama ignores earlier ones without a word."""
        return self._last("adapter")

    @property
    def renderer(self) -> str:
        return self._last("renderer") or ""

    @property
    def parser(self) -> str:
        return self._last("parser") or ""

    @property
    def requires(self) -> str:
        return self._last("requires") or ""

    @property
    def licenses(self) -> tuple[str, ...]:
        return tuple(command.value for command in self.commands if command.name == "license")

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        return tuple(
            {"role": command.key, "content": command.value}
            for command in self.commands
            if command.name == "message"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters with the types Ollama gives them; `stop` is a list. Raises InputError for unknown ones and values
        of another type; deprecated ones are left out."""
        parameters: dict[str, Any] = {}
        for command in self.commands:
            if command.name != "parameter" or command.key in DEPRECATED_PARAMETERS:
                continue
            value = parameter_value(command.key, command.value, place=f"Modelfile:{command.line}")
            if command.key == "stop":
                parameters.setdefault("stop", []).append(value)
            else:
                parameters[command.key] = value
        return parameters

    def _last(self, name: str) -> str | None:
        values = [command.value for command in self.commands if command.name == name]
        return values[-1] if values else None


class _Reader:
    """Ollama's state machine, with names for what it does."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.position = 0

    def read(self) -> Iterable[Command]:
        while self._skip_to_instruction():
            line = self._line()
            if not self.text[self.position].isprintable():
                self.position += (
                    1  # one such character before an instruction is dropped, not refused
                )
            name = self._word(_ALPHA, "an instruction").lower()
            if name not in INSTRUCTIONS:
                near = nearest(name, INSTRUCTIONS)
                raise self._error(
                    f"`{printable(name.upper(), limit=40)}` is not an instruction.",
                    f"Did you mean {near.upper()}?"
                    if near
                    else f"Known: {', '.join(INSTRUCTIONS).upper()}.",
                )
            key = ""
            if name == "parameter":
                key = self._word(_PARAMETER_CHARACTERS, "a parameter's name")
            elif name == "message":
                key = self._word(_ALPHA, "a role")
                if key not in MESSAGE_ROLES:
                    raise self._error(
                        f"message role `{printable(key, limit=40)}`, expected {', '.join(MESSAGE_ROLES)}."
                    )
            yield Command(name, self._value(line), key, line)

    def _skip_to_instruction(self) -> bool:
        text = self.text
        while self.position < len(text):
            if text[self.position] == "#":
                while self.position < len(text) and text[self.position] not in _NEWLINES:
                    self.position += 1
            elif text[self.position] in _BLANKS + _NEWLINES:
                self.position += 1
            else:
                return True
        return False

    def _word(self, characters: frozenset[str], what: str) -> str:
        """A word and the one blank after it."""
        start = self.position
        while self.position < len(self.text) and self.text[self.position] in characters:
            self.position += 1
        word = self.text[start : self.position]
        after = self.text[self.position : self.position + 1]
        if not word or not after or after not in _BLANKS:
            found = printable(self.text[start : self.position + 1]) or "the end of the file"
            raise self._error(f"`{found}` where {what}, then a blank and a value were expected.")
        self.position += 1
        return word

    def _value(self, start_line: int) -> str:
        """Everything up to the first line end at which the value's quotes, if any, are closed."""
        kept: list[str] = []
        while self.position < len(self.text):
            character = self.text[self.position]
            self.position += 1
            if character in _NEWLINES:
                value = _unquote("".join(kept))
                if value is not None:
                    return value
                kept.append(character)
            elif character == "\t" or character.isprintable():
                kept.append(character)
        value = _unquote("".join(kept))
        if value is None:
            raise InputError(
                f"{self.path}:{start_line}: the quotes that begin here are not closed.",
                hint="Close them at the end of a line.",
            )
        return value

    def _line(self) -> int:
        before = self.text[: self.position].replace("\r\n", "\n")
        return 1 + before.count("\n") + before.count("\r")

    def _error(self, problem: str, hint: str = "") -> InputError:
        return InputError(f"{self.path}:{self._line()}: {problem}", hint=hint)


def _decode(source: str | bytes) -> str:
    if isinstance(source, str):
        return source.removeprefix("\ufeff")
    for mark, encoding in _MARKS:
        if source.startswith(mark):
            return source[len(mark) :].decode(encoding, errors="replace")
    return source.decode("utf-8", errors="replace")


def _unquote(text: str) -> str | None:
    """The value that `text` stands for, or None while its quotes are open."""
    text = text.strip(_BLANKS + _NEWLINES)
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            is_closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if is_closed else None
    return text


def _render_command(command: Command) -> str:
    head = f"{command.name.upper()} {command.key} " if command.key else f"{command.name.upper()} "
    value = command.value
    prefers_quotes = command.name in ("template", "system", "license") or "\n" in value
    bare, quoted, tripled = value, f'"{value}"', f'"""{value}"""'
    for form in (tripled, quoted, bare) if prefers_quotes else (bare, quoted, tripled):
        text = f"{head}{form}\n"
        try:
            if tuple(_Reader(text, "").read()) == (command,):
                return text
        except InputError:
            continue
    raise _inexpressible(command)


def _inexpressible(command: Command) -> InputError:
    what = f"{command.name.upper()} {command.key}".strip()
    dropped = next((c for c in command.value if not c.isprintable() and c not in "\t\r\n"), None)
    if dropped is not None:
        reason = f"Ollama's parser drops the character U+{ord(dropped):04X}"
    else:
        reason = "its quotes would end early, and Modelfiles have no escapes"
    return InputError(
        f"{what} cannot be written in a Modelfile: {reason} (`{printable(command.value, limit=60)}`).",
        hint="Remove it from the text, or create the model through the server, which takes any text.",
    )


def sources(text: str, instruction: str = "FROM") -> list[str]:
    """What the FROM (or ADAPTER) lines of a generated Modelfile name: in `/api/show` the blobs' paths on the server.

    Read line by line, up to the texts: the server quotes licences and templates in ways that its own parser does not
    always undo.
    """
    found: list[str] = []
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word.upper() in ("TEMPLATE", "SYSTEM", "LICENSE"):
            break
        if word.upper() == instruction:
            found.append(_unquote(rest) or "")
    return found
