"""Import large packages without the garbage collector searching them, over and over, for garbage."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def first_import_of(module: str) -> Iterator[None]:
    """For the block that imports `module` for the first time: no collection in it, and none of what is alive after it.

    Modules live as long as the process. Walking through a million of their objects takes a third of the time of
    importing Transformers, and as much with every full collection later. Does nothing once `module` is imported, or
    where the collector is off.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
