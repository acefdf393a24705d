"""The allocator's settings, in a process of their own: they cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy
from ollatune.base.allocator import keep_freed_memory
from ollatune.base.memory import peak_resident_bytes

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = peak_resident_bytes()
said = keep_freed_memory(256 << 20)
assert keep_freed_memory(1) == said
touched = peak_resident_bytes() - before
assert touched < 20 << 20, f"{touched} bytes were touched"
for _ in range(3):
    numpy.ones(16 << 20, dtype=numpy.uint8)
start = faults()
for _ in range(10):
    numpy.ones(16 << 20, dtype=numpy.uint8)
assert faults() - start < 1000, f"{faults() - start} page faults for memory that was there"
print(said)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these settings"
)
def test_freed_memory_is_kept_and_none_is_touched() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("freed memory is kept")
