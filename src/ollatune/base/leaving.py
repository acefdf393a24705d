"""The end of this process."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from ollatune.base.errors import OllatuneError

_PATIENCE_SECONDS = 3.0


def is_one_of_several() -> bool:
    """Whether torchrun (or the like) started this process and others with it."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first_process() -> bool:
    """Whether this process speaks for all that were started together. What a signal ends, it alone tells of."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def first_process_speaks() -> Iterator[None]:
    """An error in the block, before the processes know of each other, is the first one's to tell.

    It most likely has the same one. Any other process waits a moment to be ended with it, and only then tells its own.
    """
    try:
        yield
    except OllatuneError:
        if not is_first_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # without a word
            time.sleep(_PATIENCE_SECONDS)
        raise


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
