"""The functions a template may call: Go's own and the ones Ollama adds.

`and` and `or` are not here: they evaluate their arguments lazily, so the executor holds them. Go's `js` and `call` are
known to the parser but refused when called; nothing in Ollama's library uses them.
"""

from __future__ import annotations

import datetime
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from ollatune.templates.go.lexer import GoTemplateError
from ollatune.templates.go.printf import sprint, sprintf, sprintln
from ollatune.templates.go.values import (
    Struct,
    Uint,
    encoded,
    is_true,
    plain,
    to_json,
    type_name,
)

Function = Callable[..., Any]


def _length(value: Any) -> int:
    value = plain(value)
    if isinstance(value, str):
        return len(encoded(value))
    if isinstance(value, list | dict):
        return len(value)
    raise GoTemplateError(f"error calling len: len of type {type_name(value)}")


def _position(index: Any, length: int, *, function: str, last: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise GoTemplateError(
            f"error calling {function}: cannot index slice/array with type {type_name(index)}"
        )
    if not 0 <= index <= last:
        raise GoTemplateError(f"error calling {function}: index out of range: {index}")
    return int(index)


def _index(value: Any, *indices: Any) -> Any:
    for index in indices:
        value = plain(value)
        if isinstance(value, dict):
            if not isinstance(index, str):
                raise GoTemplateError(
                    f"error calling index: value has type {type_name(index)}; should be string"
                )
            value = value.get(index)
        elif isinstance(value, list):
            at = _position(index, len(value), function="index", last=len(value) - 1)
            value = value[at]
        elif isinstance(value, str):
            data = encoded(value)
            value = Uint(data[_position(index, len(data), function="index", last=len(data) - 1)])
        elif value is None:
            raise GoTemplateError("error calling index: index of untyped nil")
        else:
            raise GoTemplateError(
                f"error calling index: can't index item of type {type_name(value)}"
            )
    return value


def _slice(value: Any, *indices: Any) -> Any:
    value = plain(value)
    if len(indices) > 2:
        raise GoTemplateError("A slice with a capacity in the Go template is not supported.")
    if not isinstance(value, str | list):
        raise GoTemplateError(f"error calling slice: can't slice item of type {type_name(value)}")
    data = encoded(value) if isinstance(value, str) else value
    bounds = [_position(i, len(data), function="slice", last=len(data)) for i in indices]
    start, end = (bounds + [0, len(data)][len(bounds) :])[:2]
    if start > end:
        raise GoTemplateError(f"error calling slice: invalid slice index: {start} > {end}")
    part = data[start:end]
    return part.decode("utf-8", "surrogateescape") if isinstance(part, bytes) else part


_MISMATCH = "incompatible types for comparison"


def _kind(value: Any) -> str:
    value = plain(value)
    if isinstance(value, Struct | list | dict) or value is None:
        return "none"
    if isinstance(value, bool):
        return "bool"
    return (
        "integer" if isinstance(value, int) else "float" if isinstance(value, float) else "string"
    )


def _equal(first: Any, *others: Any) -> bool:
    if not others:
        raise GoTemplateError("error calling eq: missing argument for comparison")
    kind = _kind(first)
    for other in others:
        if _kind(other) != kind:
            if first is not None and other is not None:
                raise GoTemplateError(f"error calling eq: {_MISMATCH}")
        elif kind == "none" and not (first is None or other is None):
            raise GoTemplateError(f"error calling eq: non-comparable type {type_name(first)}")
        elif (first is None and other is None) if kind == "none" else first == other:
            return True
    return False


def _less(first: Any, second: Any) -> bool:
    kinds = {_kind(first), _kind(second)}
    if kinds & {"none", "bool"}:
        raise GoTemplateError("error calling lt: invalid type for comparison")
    if len(kinds) > 1:
        raise GoTemplateError(f"error calling lt: {_MISMATCH}")
    if isinstance(first, str):
        return encoded(first) < encoded(second)
    return bool(first < second)


def _printf(template: Any, *values: Any) -> str:
    if not isinstance(template, str):
        raise GoTemplateError(f"wrong type for value; expected string; got {type_name(template)}")
    return sprintf(template, list(values))


def _html(*values: Any) -> str:
    text = sprint([value if value is not None else "<no value>" for value in values])
    for character, escape in (("&", "&amp;"), ('"', "&#34;"), ("'", "&#39;"), ("<", "&lt;"), (">", "&gt;"),
                              ("\0", "\ufffd")):  # fmt: skip
        text = text.replace(character, escape)
    return text


def _urlquery(*values: Any) -> str:
    text = sprint([value if value is not None else "<no value>" for value in values])
    return urllib.parse.quote_plus(encoded(text), safe="-_.~")


def _refused(name: str) -> Function:
    def refuse(*_: Any) -> Any:
        raise GoTemplateError(f"The Go template calls `{name}`, which is not supported here.")

    return refuse


BUILTINS: Mapping[str, Function] = {
    "call": _refused("call"),
    "eq": _equal,
    "ge": lambda first, second: not _less(first, second),
    "gt": lambda first, second: not (_less(first, second) or _equal(first, second)),
    "html": _html,
    "index": _index,
    "js": _refused("js"),
    "le": lambda first, second: _less(first, second) or _equal(first, second),
    "len": _length,
    "lt": _less,
    "ne": lambda first, second: not _equal(first, second),
    "not": lambda value: not is_true(value),
    "print": lambda *values: sprint(list(values)),
    "printf": _printf,
    "println": lambda *values: sprintln(list(values)),
    "slice": _slice,
    "urlquery": _urlquery,
}
LAZY = ("and", "or")

_TYPESCRIPT = {
    "string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null",
    "array": "any[]", "object": "Record<string, any>",
}  # fmt: skip


def _typescript_type(value: Any) -> str:
    """Ollama's rendering of a tool property's type, used by the gpt-oss template."""
    if not (isinstance(value, Struct) and value.type_name == "api.ToolProperty"):
        return "any"
    if alternatives := value.fields["AnyOf"]:
        return " | ".join(_typescript_type(alternative) for alternative in alternatives)
    return " | ".join(_TYPESCRIPT.get(name, "any") for name in value.fields["Type"]) or "any"


def ollama_functions(today: datetime.date) -> dict[str, Function]:
    """What Ollama's template package adds to Go's functions, with `today` as the server's date."""
    return {
        "json": to_json,
        "currentDate": lambda *_: today.isoformat(),
        "yesterdayDate": lambda *_: (today - datetime.timedelta(days=1)).isoformat(),
        "toTypeScriptType": _typescript_type,
    }
