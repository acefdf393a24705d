"""The progress bar: step, loss, learning rate, tokens per second, time left. On stderr, main process only."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

from ollatune.training.reports import StepReport
from ollatune.training.state import RunState

_WINDOW_STEPS = 10


class Progress:
    """A tqdm bar over optimiser steps; without a terminal it prints a line now and then instead of redrawing."""

    def __init__(self, total_steps: int, first_step: int, *, is_shown: bool) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)
        self._bar: Any = None
        if is_shown:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first_step, desc="Training", unit="step", file=sys.stderr,
                dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 15.0,
            )  # fmt: skip

    def step(self, state: RunState, report: StepReport) -> None:
        """Show one finished step; tokens per second are over the last few."""
        self._recent.append((report.num_tokens, report.seconds))
        if self._bar is None:
            return
        tokens = sum(count for count, _ in self._recent)
        seconds = sum(taken for _, taken in self._recent)
        self._bar.set_postfix_str(
            f"loss {report.loss:.4f}, lr {report.learning_rate:.2e}, {tokens / seconds:.0f} tokens/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
