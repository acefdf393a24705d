"""Dated result files: what was measured, when, and on which machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ollatune.base.processor import processor_name

FOLDER = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """The machine and the versions that decide a figure."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }  # fmt: skip


def result_path(name: str) -> Path:
    """Where `save` puts a result of today."""
    return FOLDER / f"{datetime.date.today().isoformat()}-{name}.json"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write `result` with date and machine to `results/DATE-NAME.json`; one of the same day is replaced."""
    path = result_path(name)
    path.parent.mkdir(exist_ok=True)
    content = {"benchmark": name, "date": path.name[:10], "machine": machine(), **result}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def with_earlier(
    name: str, rows: list[dict[str, Any]], keys: Sequence[str], order: Iterable[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """`rows`, and those that today's saved result has under other `keys`, in the table's `order`."""
    path = result_path(name)
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    found = {tuple(row[key] for key in keys): row for row in [*earlier, *rows]}
    return [found[place] for place in order if place in found]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--save`, for `publish`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument("--save", action="store_true", help="write a dated file to results/")


def publish(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Save and print `result` as `arguments` ask: as one JSON object, or its `rows` one a line, or all its values."""
    if arguments.save:
        print(save(name, result), file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    elif "rows" in result:
        for row in result["rows"]:
            print("  ".join(f"{key}={value}" for key, value in row.items()))
    else:
        for key, value in result.items():
            print(f"{key}: {json.dumps(value)}")
