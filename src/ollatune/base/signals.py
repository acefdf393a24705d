"""Ctrl-C and SIGTERM, from a command's first line to its last.

The first one either raises `StopSignal` wherever the command is, so that what is half-written is taken back on the
way out, or is noted by what can stop at a better moment (`training.interrupts`). The second one leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(BaseException):
    """A signal asked this process to end. Not an Exception: nothing that handles errors may go on after it."""

    def __init__(self, number: int) -> None:
        super().__init__(name_of(number))
        self.number = number

    @property
    def message(self) -> str:
        return (
            f"Stopped by {self}. What was half-written is taken back, what was there before is intact. "
            "Run the same command again."
        )

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def name_of(number: int) -> str:
    """What a user calls the signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class _Arrivals:
    """The first signal since the outermost block began, and how many blocks there are."""

    first: int | None = None
    depth = 0


def first_signal() -> int | None:
    """The signal that has arrived in the innermost or an outer block of `handling`, if one has."""
    return _Arrivals.first if _Arrivals.depth else None


@contextlib.contextmanager
def handling(on_first: Callable[[int], None]) -> Iterator[None]:
    """Inside the block the first SIGINT or SIGTERM calls `on_first`, and any later one ends the process at once.

    Blocks may lie in one another: the innermost hears of the first signal, all of them count it. Outside the main
    thread nothing is installed: signals never arrive there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if _Arrivals.first is not None:
            os._exit(128 + number)  # no clean-up on purpose: finished files are already durable
        _Arrivals.first = number
        on_first(number)

    if not _Arrivals.depth:
        _Arrivals.first = None
    _Arrivals.depth += 1
    previous = {number: signal.getsignal(number) for number in _NUMBERS}
    try:
        for number in _NUMBERS:
            signal.signal(number, handle)
        yield
    finally:
        _Arrivals.depth -= 1
        for number, handler in previous.items():
            if handler is not None:  # None: not installed from Python, and cannot be put back
                signal.signal(number, handler)


def raise_stop(number: int) -> None:
    """For `handling`: leave everything that is being done."""
    raise StopSignal(number)
