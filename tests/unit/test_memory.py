"""Peak resident memory is this process's own."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from ollatune.base.memory import forget_peak, peak_resident_bytes, recent_peak_bytes

SIZE = 128 << 20
READ = "from ollatune.base.memory import peak_resident_bytes; print(peak_resident_bytes())"
PARENT = f"""
import subprocess, sys
held = bytearray({SIZE})
print(subprocess.run([sys.executable, "-c", {READ!r}], stdout=subprocess.PIPE, text=True).stdout)
"""


def touch(size: int) -> None:
    block = mmap.mmap(-1, size)  # not from malloc, which may have kept as much
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    block.close()


def printed(program: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it may be inherited")
def test_the_memory_of_the_process_that_started_this_one_does_not_count() -> None:
    alone = printed(READ)
    assert 5 << 20 < alone < SIZE
    assert abs(printed(PARENT) - alone) < SIZE // 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux can begin anew")
def test_a_peak_that_was_forgotten_is_still_the_whole_processs() -> None:
    forget_peak()
    touch(SIZE)
    peak = peak_resident_bytes()
    start = forget_peak()
    assert start + SIZE // 2 < peak <= peak_resident_bytes()
    assert recent_peak_bytes() < peak - SIZE // 2
    touch(SIZE // 4)
    assert start + SIZE // 5 < recent_peak_bytes() < start + SIZE // 2
