"""The memory of a process and all it starts, seen from outside."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil


def tree_memory(root: psutil.Process) -> tuple[int, int]:
    """(RSS, PSS) in bytes of a process and all its descendants; PSS is 0 where the system does not tell."""
    rss = pss = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            rss += process.memory_info().rss
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            pss += next(int(line.split()[1]) for line in rollup.splitlines() if line[:4] == "Pss:")
        except (psutil.Error, OSError, StopIteration):
            continue
    return rss, pss << 10


def watch(
    process: subprocess.Popen[bytes], every: float, timeout: float | None = None
) -> tuple[int, int]:
    """The highest (RSS, PSS) in bytes of its tree until it ends. Kills it and raises TimeoutExpired after `timeout`."""
    root, peak_rss, peak_pss = psutil.Process(process.pid), 0, 0
    deadline = None if timeout is None else time.monotonic() + timeout
    while process.poll() is None:
        try:
            rss, pss = tree_memory(root)
        except psutil.Error:
            break
        peak_rss, peak_pss = max(peak_rss, rss), max(peak_pss, pss)
        if deadline is not None and time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise subprocess.TimeoutExpired(process.args, timeout or 0.0)
        time.sleep(every)
    process.wait()
    return peak_rss, peak_pss
