"""Text and units: human sizes and durations, nearest names, safe printing."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(size_bytes: float) -> str:
    """`format_bytes(98_362_432)` is '93.8 MiB'."""
    value = float(size_bytes)
    for unit in _BYTE_UNITS:
        if abs(value) < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """`format_duration(3725)` is '1h 02m 05s'."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest_seconds = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m {rest_seconds:02d}s"
    if minutes:
        return f"{minutes}m {rest_seconds:02d}s"
    return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"


def format_count(number: float) -> str:
    """`format_count(134_515_008)` is '134.5M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was probably meant to be, or None where nothing is near."""
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """' Did you mean `x`?' or ''. Begins with a blank so that it can follow a sentence."""
    found = nearest(name, choices)
    return f" Did you mean `{found}`?" if found else ""


def printable(text: str, *, limit: int = 200) -> str:
    """`text` safe for a terminal: control characters escaped, at most `limit` characters."""
    cut = text[:limit]
    safe = "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in cut
    )
    return safe + ("…" if len(text) > limit else "")
