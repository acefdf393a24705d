"""Ctrl-C and SIGTERM: the first asks the loop to stop after the step in progress, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType


class StopRequest:
    """A context manager that turns SIGINT and SIGTERM into `signal_number`, restored on exit.

    Outside the main thread it installs nothing: signals never arrive there.

    Args:
        speaks: whether to say that the signal has arrived. Of several processes, which all get it, one does.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self.signal_number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)  # no clean-up on purpose: finished files are already durable
        self.signal_number = number
        if not self._speaks:
            return
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        sys.stderr.write(
            f"\n{name}: saving after this step. Press Ctrl-C again to leave at once.\n"
        )
        sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
