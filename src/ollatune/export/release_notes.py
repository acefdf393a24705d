"""Release notes: what changed in base, data, configuration and metrics since the parent version, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ollatune.base.text import format_bytes

_CELL_CHARACTERS = 80
_DIGEST_CHARACTERS = 12
_ABSENT = "–"
_INTERVAL_ENDS = (".low", ".high")
_DATA_KEYS = ("forms", "splits", "num_duplicates", "num_rejected")
"""What of the data report of a run stands in release notes."""


def release_notes(release: Mapping[str, Any], parent: Mapping[str, Any] | None) -> str:
    """Notes of `release` against `parent` (both as `registry.Release` fields); None for a first version."""
    lines = [f"# {release['name']} {release['tag']}", ""]
    if release["summary"]:
        lines += [release["summary"], ""]
    since = "First version." if parent is None else f"Follows {parent['tag']}."
    lines += [f"Released {release['created']}. {since}", ""]
    lines += ["## Origin", "", *_origin(release, parent), ""]
    lines += _data(release["data"], parent)
    lines += _metrics(release["metrics"], parent)
    if parent is not None:
        lines += _configuration(release, parent)
    lines += ["## Files", "", "| file | size | sha256 |", "| --- | --- | --- |"]
    for name, facts in sorted(release["files"].items()):
        lines.append(f"| {name} | {format_bytes(facts['size_bytes'])} | `{facts['sha256']}` |")
    return "\n".join(lines) + "\n"


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` with the value, for every leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _origin(release: Mapping[str, Any], parent: Mapping[str, Any] | None) -> list[str]:
    lines = []
    for what, digest_of in (("Base model", _base_text), ("Training data", _data_text)):
        now = digest_of(release)
        before = None if parent is None else digest_of(parent)
        change = "" if before is None else " (unchanged)" if before == now else f" (was {before})"
        lines.append(f"- {what}: {now}{change}")
    if release["run_id"]:
        lines.append(f"- Run: {release['run_id']}")
    return lines


def _base_text(release: Mapping[str, Any]) -> str:
    base = release["base"]
    return (
        f"{_cell(base['name']) or 'unknown'} `{base['digest'][:_DIGEST_CHARACTERS] or 'unknown'}`"
    )


def _data_text(release: Mapping[str, Any]) -> str:
    return f"`{release['data']['digest'][:_DIGEST_CHARACTERS] or 'unknown'}`"


def _data(data: Mapping[str, Any], parent: Mapping[str, Any] | None) -> list[str]:
    """What the run counted in its data: all of it for a first version, what changed for a later one."""
    new = _counts(data)
    old = {} if parent is None else _counts(parent["data"])
    if parent is None:
        rows = [f"| {key} | {_cell(value)} |" for key, value in sorted(new.items())]
        head = ["| count | value |", "| --- | --- |"]
    else:
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        rows = [
            f"| {key} | {_cell(old.get(key, _ABSENT))} | {_cell(new.get(key, _ABSENT))} |"
            for key in changed
        ]
        head = [f"| count | {parent['tag']} | this version |", "| --- | --- | --- |"]
    return ["## Data", "", *head, *rows, ""] if rows else []


def _counts(data: Mapping[str, Any]) -> dict[str, Any]:
    report = data.get("report") or {}
    kept = {key: report[key] for key in _DATA_KEYS if key in report}
    return {
        key: value
        for key, value in flattened(kept)
        if not isinstance(value, Mapping | list | tuple)
    }


def _metrics(now: Mapping[str, float], parent: Mapping[str, Any] | None) -> list[str]:
    before: Mapping[str, float] = {} if parent is None else parent["metrics"]
    names = sorted(name for name in {*now, *before} if not name.endswith(_INTERVAL_ENDS))
    if not names:
        return []
    if parent is None:
        rows = [f"| {name} | {_number(now.get(name))} |" for name in names]
        return ["## Metrics", "", "| metric | value |", "| --- | --- |", *rows, ""]
    rows = []
    for name in names:
        old, new = before.get(name), now.get(name)
        change = f"{new - old:+.4g}" if old is not None and new is not None else _ABSENT
        rows.append(f"| {name} | {_number(old)} | {_number(new)} | {change} |")
    head = f"| metric | {parent['tag']} | this version | change |"
    return ["## Metrics", "", head, "| --- | --- | --- | --- |", *rows, ""]


def _configuration(release: Mapping[str, Any], parent: Mapping[str, Any]) -> list[str]:
    old, new = dict(flattened(parent["config"])), dict(flattened(release["config"]))
    changed = sorted(key for key in {*old, *new} if old.get(key, _ABSENT) != new.get(key, _ABSENT))
    if not changed:
        return ["## Configuration", "", f"As in {parent['tag']}.", ""]
    rows = [
        f"| {key} | {_cell(old.get(key, _ABSENT))} | {_cell(new.get(key, _ABSENT))} |"
        for key in changed
    ]
    head = f"| key | {parent['tag']} | this version |"
    return ["## Configuration", "", head, "| --- | --- | --- |", *rows, ""]


def _number(value: float | None) -> str:
    return _ABSENT if value is None or not math.isfinite(value) else f"{value:.4g}"


def _cell(value: Any) -> str:
    """A value that cannot break its table."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _CELL_CHARACTERS else f"{text[:_CELL_CHARACTERS]}…"
