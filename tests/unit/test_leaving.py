"""The end of a process: exit code, pending output and exit handlers, with or without the interpreter's own end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from ollatune.base.leaving import leave

class Last:
    def __del__(self):
        print("finalised", flush=True)

last = Last()
atexit.register(lambda: print("handler"))
sys.stdout.write("pending\\n")
leave(3)
"""


@pytest.mark.parametrize(
    ("count", "expected"),
    [("1", ["pending", "handler", "finalised"]), ("2", ["pending", "handler"])],
)
def test_one_of_several_processes_skips_the_interpreters_end_alone(
    count: str, expected: list[str]
) -> None:
    environment = os.environ | {"WORLD_SIZE": count}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (3, expected), done.stderr
