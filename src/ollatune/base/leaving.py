"""The end of this process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with the exit code `code`.

    One of several processes skips the interpreter's own end. There a thread of torch's, still letting go of a tensor it
    has sent, waits for the interpreter's lock in vain and aborts: the finished run would count as failed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)
