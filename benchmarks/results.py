"""Dated result files: what was measured, when, and on which machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """The machine and the versions that decide a figure."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
