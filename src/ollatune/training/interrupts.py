"""Ctrl-C and SIGTERM while the loop runs: the first asks it to stop after the step in progress, the second leaves."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType

from ollatune.base.errors import Interrupted
from ollatune.base.signals import first_signal, handling, name_of


def stopped_before_training(signal_number: int) -> Interrupted:
    """The error of a run that was stopped when it had not done a step yet."""
    return Interrupted(
        f"Stopped by {name_of(signal_number)} before the first step; data that was prepared is kept.",
        signal_number=signal_number,
        hint="Run the same command again.",
    )


class StopRequest:
    """A context manager that turns the first SIGINT or SIGTERM into `signal_number` (see `base.signals`).

    Args:
        speaks: whether to say that the signal has arrived. Of several processes, which all get it, one does.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self._speaks = speaks
        self.signal_number: int | None = None
        self._handling = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        self.signal_number = first_signal()  # one that came just before and could not end anything
        self._handling.enter_context(handling(self._note))
        return self

    def _note(self, number: int) -> None:
        self.signal_number = number
        if self._speaks:
            sys.stderr.write(
                f"\n{name_of(number)}: saving after this step. Press Ctrl-C again to leave at once.\n"
            )
            sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._handling.close()
