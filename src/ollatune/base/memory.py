"""Resident memory of this process, now and at its highest."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_forgotten = {"peak": 0}


def resident_bytes() -> int:
    """What is resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The highest resident memory since the process began, `forget_peak` or not."""
    return max(_forgotten["peak"], recent_peak_bytes())


def recent_peak_bytes() -> int:
    """The highest resident memory since `forget_peak`, where the system can forget, else since the process began.

    On Linux it is not what getrusage says: that begins with the peak of the process which started this one (exec
    keeps `maxrss`), however little this one needs.
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if (peak := _high_water_mark()) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> int:
    """Begin `recent_peak_bytes` anew; returns where it begins: what is resident, or the old peak if that cannot be."""
    _forgotten["peak"] = peak_resident_bytes()
    try:
        _CLEAR.write_text("5")
    except OSError:
        return recent_peak_bytes()  # only growth beyond the old peak is seen
    return resident_bytes()


def _high_water_mark() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
