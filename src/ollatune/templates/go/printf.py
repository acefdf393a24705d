"""Go's fmt.Sprint, Sprintln and the Sprintf verbs that templates use. What fmt would mark as an error is refused."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from ollatune.templates.go.lexer import GoTemplateError
from ollatune.templates.go.values import encoded, plain, printed

_DIRECTIVE = re.compile(r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+)?)?(.?)", re.DOTALL)
_LARGEST_WIDTH = 1000
_QUOTED_ESCAPES = {
    "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v",
    "\\": "\\\\", '"': '\\"',
}  # fmt: skip


def sprint(values: list[Any]) -> str:
    """fmt.Sprint: a blank between two operands of which neither is a string."""
    pieces: list[str] = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            pieces.append(" ")
        pieces.append(_operand(value))
    return "".join(pieces)


def sprintln(values: list[Any]) -> str:
    """fmt.Sprintln: a blank between all operands and a line end."""
    return " ".join(_operand(value) for value in values) + "\n"


def _operand(value: Any) -> str:
    return printed(value, nested=True)


def sprintf(template: str, values: list[Any]) -> str:
    """fmt.Sprintf for %v %s %q %d %x %X %o %b %c %f %e %g %t %%, with flags, width and precision.

    Raises GoTemplateError for anything else, and where verb and operand do not fit.
    """
    pieces: list[str] = []
    position = used = 0
    for match in _DIRECTIVE.finditer(template):
        pieces.append(template[position : match.start()])
        position = match.end()
        verb = match.group(4)
        if verb == "%":
            pieces.append("%")
            continue
        if used >= len(values) or "*" in (match.group(2) or "", match.group(3) or ""):
            raise _unsupported(template, match.group())
        pieces.append(_formatted(match, values[used], template))
        used += 1
    if used != len(values):
        raise GoTemplateError(
            f'printf "{template}" in the Go template is given {len(values)} values for {used} verbs.'
        )
    return "".join(pieces) + template[position:]


def _unsupported(template: str, directive: str) -> GoTemplateError:
    return GoTemplateError(
        f'printf "{template}" in the Go template: `{directive}` is not supported for the value it is given.'
    )


def _formatted(match: re.Match[str], value: Any, template: str) -> str:
    flags, width, precision, verb = match.groups()
    has_precision = "." in match.group()
    digits = int(precision or 0) if has_precision else None
    if max(int(width or 0), digits or 0) > _LARGEST_WIDTH:
        raise _unsupported(template, match.group())
    text = _verb(verb, value, digits, flags)
    if text is None:
        raise _unsupported(template, match.group())
    is_number = isinstance(plain(value), int | float) and not isinstance(value, bool)
    if is_number and not text.startswith("-") and verb not in "qc":
        text = ("+" if "+" in flags else " " if " " in flags else "") + text
    missing = int(width or 0) - len(text)
    if missing <= 0:
        return text
    if "-" in flags:
        return text + " " * missing
    if "0" in flags and is_number:
        sign = text[0] if text[0] in "+- " else ""
        return sign + "0" * missing + text[len(sign) :]
    return " " * missing + text


def _verb(verb: str, value: Any, precision: int | None, flags: str) -> str | None:
    """The bare text of one operand, or None where verb, operand or flag is not supported."""
    if "#" in flags or (precision is not None and verb not in "sqfeEg"):
        return None
    if verb == "v":
        return printed(value, nested=True)
    if isinstance(value, str):
        if verb == "s":
            return value if precision is None else value[:precision]
        if verb == "q":
            return quoted(value if precision is None else value[:precision])
        if verb in "xX":
            return encoded(value).hex() if verb == "x" else encoded(value).hex().upper()
        return None
    if isinstance(value, bool):
        return printed(value) if verb == "t" else None
    if isinstance(value, int):
        return _integer(verb, value)
    if isinstance(value, float) and verb in "feE":
        return f"{value:.{6 if precision is None else precision}{verb}}"
    if isinstance(value, float) and verb == "g" and precision is None:
        return printed(value)
    is_text = verb == "s" and value is not None and not isinstance(value, int | float | list | dict)
    return printed(value) if is_text else None


def _integer(verb: str, value: int) -> str | None:
    if verb == "c" and 0 <= value <= 0x10FFFF:
        return chr(value)
    formats = {"d": "d", "x": "x", "X": "X", "o": "o", "b": "b"}
    return format(int(value), formats[verb]) if verb in formats else None


def is_printable(character: str) -> bool:
    """Go's strconv.IsPrint: letters, marks, numbers, punctuation, symbols, and the ASCII blank."""
    return character == " " or unicodedata.category(character)[0] in "LMNPS"


def quoted(text: str) -> str:
    """Go's strconv.Quote."""
    return '"' + "".join(_quoted_character(character) for character in text) + '"'


def _quoted_character(character: str) -> str:
    code = ord(character)
    if character in _QUOTED_ESCAPES:
        return _QUOTED_ESCAPES[character]
    if 0xDC80 <= code < 0xDD00:
        return f"\\x{code - 0xDC00:02x}"
    if is_printable(character):
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
