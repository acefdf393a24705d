"""What the operating system says about the processor."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def processor_flags() -> str:
    """The instruction sets of the first core, blanks between their names; '' where the system has no list of them."""
    return _field("flags", "Features")


def processor_name() -> str:
    """What the processor is called, such as `AMD EPYC 9354P`."""
    return _field("model name") or platform.processor() or platform.machine()


def _field(*names: str) -> str:
    """The value of the first line of /proc/cpuinfo that has one of `names`."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
