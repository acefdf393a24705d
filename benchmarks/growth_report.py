"""What `growth.py` leaves behind: a dated JSON file and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.speed_report import result_path

KEYS = {"size": "shape", "length": "tokens", "data": "records", "ranks": "ranks"}
"""What a row of each kind is told apart by."""
_SHOWN = {
    "size": ("shape", "parameters", "seconds_per_step", "tokens_per_second", "loaded_mb", "steps_mb"),
    "length": ("tokens", "seconds_per_step", "tokens_per_second", "loaded_mb", "steps_mb"),
    "data": (
        "records", "megabytes", "seconds_cold", "seconds_warm", "prepare_seconds", "tree_mb_cold",
        "tree_mb_warm", "cache_mb", "seconds_per_step",
    ),
    "ranks": ("ranks", "threads_each", "tokens_per_second", "tree_mb", "loss"),
}  # fmt: skip


def exponent(rows: list[dict[str, Any]], cost: str) -> float | None:
    """Slope of log(cost) over log(tokens) between the two longest; 1 is linear.

    `cost` is a key, or `memory`: the peak of the steps beyond the loaded model.
    """
    if len(rows) < 2:
        return None
    first, last = sorted(rows, key=lambda row: int(row["tokens"]))[-2:]

    def of(row: dict[str, Any]) -> float:
        return float(row["steps_mb"] - row["loaded_mb"] if cost == "memory" else row[cost])

    grown = of(last) / max(1e-9, of(first))
    return round(math.log(grown) / math.log(last["tokens"] / first["tokens"]), 3)


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` laid over `old`: a row takes the place of its like; the exponents are those of all rows."""
    result = (old or {}) | {key: value for key, value in new.items() if key not in KEYS}
    for kind, key in KEYS.items():
        rows = {row[key]: row for found in (old or {}, new) for row in found.get(kind, [])}
        if rows:
            order = {"135m": 0, "360m": 1, "1b": 2}
            result[kind] = sorted(rows.values(), key=lambda row: order.get(row[key], row[key]))
    lengths = result.get("length", [])
    result["memory_exponent"] = exponent(lengths, "memory")
    result["time_exponent"] = exponent(lengths, "seconds_per_step")
    return result


def save(result: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Add to `growth-DATE-MACHINE.json` and write `.md`; returns the path, and all."""
    path = result_path(result, folder, "growth")
    merged = merge(json.loads(path.read_text()) if path.is_file() else None, result)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(merged))
    return path, merged


def tables(result: dict[str, Any]) -> str:
    """A Markdown table for each kind."""
    lines = [f"{result['date']}, {result['machine']}."]
    for kind, columns in _SHOWN.items():
        if kind not in result:
            continue
        heads = [column.replace("_", " ") for column in columns]
        lines += ["", f"By {kind}:", "", "| " + " | ".join(heads) + " |"]
        lines += ["|" + " ---: |" * len(columns)]
        lines += [
            "| " + " | ".join(_text(row[column]) for column in columns) + " |"
            for row in result[kind]
        ]
    lines.append("")
    for name in ("memory_exponent", "time_exponent"):
        if result[name] is not None:
            lines.append(f"- `{name}`, from the second longest to the longest: {result[name]}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
