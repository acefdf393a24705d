"""The learning rate as a pure function of the step: nothing to save, nothing to drift on resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["linear", "cosine", "polynomial", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then `name`.

    Attributes:
        peak: learning rate after the warm-up.
        warmup_steps: steps until the peak; 0 starts there.
        total_steps: optimiser steps of the whole run.
        end_fraction: fraction of the peak at the last step (not for `constant`).
        power: exponent of `polynomial`.
    """

    name: ScheduleName
    peak: float
    warmup_steps: int
    total_steps: int
    end_fraction: float = 0.0
    power: float = 1.0

    def at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return self.peak
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        if self.name == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.name == "linear":
            shape = 1 - progress
        else:
            shape = (1 - progress) ** self.power
        return self.peak * (self.end_fraction + (1 - self.end_fraction) * shape)
