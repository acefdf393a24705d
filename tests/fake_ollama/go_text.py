"""How Go writes things: JSON with escaped HTML, numbers for people, Modelfile quoting, times."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import numpy as np

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip


def go_json(value: Any) -> str:
    """encoding/json: compact, `<`, `>`, `&` escaped; mappings keep their order, as structs do."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def go_map_json(value: dict[str, Any]) -> str:
    """A Go map: keys sorted, and a line end as json.Encoder leaves it."""
    return go_json(dict(sorted(value.items()))) + "\n"


def human_number(count: int) -> str:
    """format.HumanNumber: 134515008 is `134.52M`."""
    for unit, suffix, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            number = count / unit
            return (
                f"{number:.0f}{suffix}" if number == int(number) else f"{number:.{digits}f}{suffix}"
            )
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def short_float(value: float) -> float:
    """A float32 as Go prints it: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def go_float(value: float) -> str:
    """A number out of JSON as fmt prints it: shortest digits, with an exponent from 1e+06 on and below 1e-04."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return repr(float(value)).removesuffix(".0")
    digits, _, exponent = f"{Decimal(repr(float(value))).normalize():e}".partition("e")
    return f"{digits}e{int(exponent):+03d}"


def quoted(text: str) -> str:
    """parser.quote: what `ollama show --modelfile` puts around a value."""
    if "\n" in text or text.startswith(" ") or text.endswith(" "):
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


def now() -> str:
    """RFC 3339 with nanoseconds."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"
