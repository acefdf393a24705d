"""Go's values as Python objects: how they print, marshal to JSON, compare, and what counts as true.

    Go                      here
    string                  str (bytes that are no UTF-8 as surrogate escapes)
    int, uint8, float64     int, Uint, float
    bool, nil interface     bool, None
    slice, map              list, dict
    struct                  Struct
    types with String()     Text: the value, and what it prints as

Go's rules are those of fmt's %v, encoding/json and text/template at the versions Ollama is built with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ollatune.templates.go.lexer import GoTemplateError

_JSON_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f",
    "<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029",
}  # fmt: skip
_JSON_TABLE = {
    **{code: f"\\u{code:04x}" for code in range(0x20)},
    **{ord(character): escape for character, escape in _JSON_ESCAPES.items()},
    **dict.fromkeys(range(56448, 56576), "\\ufffd"),
}


class Uint(int):
    """An unsigned integer: what indexing a string gives."""


class Struct:
    """A Go struct: named fields, and the JSON keys they marshal under (None: left out where empty)."""

    def __init__(
        self,
        type_name: str,
        fields: Mapping[str, Any],
        json_keys: Mapping[str, str] | None = None,
        omitted_when_empty: frozenset[str] = frozenset(),
    ) -> None:
        self.type_name = type_name
        self.fields = fields
        self.json_keys = json_keys
        self.omitted_when_empty = omitted_when_empty


class OneOrMany(list[str]):
    """A list of names that prints and marshals as its only one where it has one (the type of a tool's parameter)."""


class PrintsAsJSON:
    """A slice, map or struct whose String() method is its JSON."""

    def __init__(self, value: Any) -> None:
        self.value = value


def plain(value: Any) -> Any:
    """The slice, map or struct inside a value with a String() method; other values as they are."""
    return value.value if isinstance(value, PrintsAsJSON) else value


def encoded(text: str) -> bytes:
    """The bytes Go would hold for `text`."""
    return text.encode("utf-8", "surrogateescape")


def is_true(value: Any) -> bool:
    """Go's truth of a template value: zero, empty and nil are false, every struct is true."""
    value = plain(value)
    return True if isinstance(value, Struct) else bool(value)


def type_name(value: Any) -> str:
    """The Go type of `value` as error messages name it."""
    value = plain(value)
    if isinstance(value, Struct):
        return value.type_name
    if value is None:
        return "nil"
    names = [(bool, "bool"), (Uint, "uint8"), (int, "int"), (float, "float64"), (str, "string"),
             (list, "slice"), (dict, "map")]  # fmt: skip
    return next(name for kind, name in names if isinstance(value, kind))


def printed(value: Any, *, nested: bool = False) -> str:
    """What `{{ value }}` writes: fmt's %v, and `<no value>` for nothing at all."""
    if isinstance(value, str):
        return value
    if value is None:
        return "<nil>" if nested else "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, PrintsAsJSON):
        return to_json(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return printed_float(value)
    if isinstance(value, OneOrMany) and len(value) < 2:
        return "".join(value)
    if isinstance(value, list):
        return "[" + " ".join(printed(item, nested=True) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{key}:{printed(item, nested=True)}" for key, item in sorted_items(value))
        return "map[" + " ".join(items) + "]"
    raise GoTemplateError(
        f"The Go template prints a whole {type_name(value)}; Ollama's versions differ in how that looks.",
        hint="Name its fields (`.Role`, `.Content`, …) or use `json`.",
    )


def printed_float(value: float) -> str:
    """fmt's %v of a float64: the shortest digits, with an exponent where strconv's %g has one."""
    if math.isnan(value) or math.isinf(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return _formatted_float(value, smallest=-4, beyond=6)


def _formatted_float(value: float, *, smallest: int, beyond: int) -> str:
    mantissa, _, power = f"{value!r}".partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0").rstrip("0")
    if not digits:
        return sign + "0"
    # value = 0.DIGITS × 10^point
    point = (
        len(whole) + int(power or 0) - (len(whole + fraction) - len((whole + fraction).lstrip("0")))
    )
    exponent = point - 1
    if exponent < smallest or exponent >= beyond:
        tail = f".{digits[1:]}" if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{tail}e{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if point >= len(digits):
        return sign + digits + "0" * (point - len(digits))
    return f"{sign}{digits[:point]}.{digits[point:]}"


def sorted_items(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Items in the order Go ranges over, prints and marshals a map: by the bytes of the key."""
    return iter(sorted(mapping.items(), key=lambda item: encoded(item[0])))


def to_json(value: Any) -> str:
    """encoding/json's Marshal: compact, map keys sorted, `<`, `>` and `&` escaped. Raises GoTemplateError."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.translate(_JSON_TABLE) + '"'
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _json_float(value)
    if isinstance(value, OneOrMany) and len(value) == 1:
        return to_json(value[0])
    if isinstance(value, list):
        return "[" + ",".join(to_json(item) for item in value) + "]"
    if isinstance(value, OrderedMap):
        pairs = (f"{to_json(key)}:{to_json(item)}" for key, item in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, dict):
        pairs = (f"{to_json(key)}:{to_json(item)}" for key, item in sorted_items(value))
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Struct) and value.json_keys is not None:
        pairs = (
            f"{to_json(key)}:{to_json(value.fields[name])}"
            for name, key in value.json_keys.items()
            if name not in value.omitted_when_empty or is_true(value.fields[name])
        )
        return "{" + ",".join(pairs) + "}"
    raise GoTemplateError(
        f"The Go template calls `json` on a whole {type_name(value)}, which differs between Ollama's versions.",
        hint="Call it on a field, such as `.Function.Arguments`.",
    )


class OrderedMap(dict[str, Any]):
    """A map that marshals in the order it was written (Ollama's ordered map), not by key."""


def _json_float(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        raise GoTemplateError(
            "Go's JSON has no NaN or infinity, and a tool's schema or arguments hold one."
        )
    text = _formatted_float(value, smallest=-6, beyond=21)
    # encoding/json writes e-9, where fmt writes e-09.
    head, mark, power = text.partition("e-0")
    return f"{head}e-{power}" if mark else text
