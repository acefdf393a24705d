"""Loss spikes: a step whose loss lies far above those of the steps before it.

What is far is told by the last steps that were taken, as in OLMo's skip-step optimiser: more than six standard
deviations above their mean. The verdict depends on the losses in the window alone, which are part of every checkpoint.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

WINDOW = 128
"""Steps that the mean and the deviation are of."""
SIGMAS = 6.0
MIN_STEPS = 32
"""Steps that must have been taken before one is judged: the deviation of a few losses says little."""
MIN_SIGMA = 0.01
"""Least deviation, per target token and relative to a mean above 1: losses that hardly vary would alarm on noise."""


@dataclass(frozen=True)
class Spike:
    """A loss, with the mean and the deviation (never below the floor) of the `num_steps` before it."""

    loss: float
    mean: float
    sigma: float
    num_steps: int

    def __str__(self) -> str:
        far = (self.loss - self.mean) / self.sigma
        return (
            f"loss {self.loss:.4f} is {far:.1f} standard deviations above the mean of the last {self.num_steps} "
            f"steps ({self.mean:.4f} ± {self.sigma:.4f})"
        )


@dataclass
class SpikeWatch:
    """The losses of the last steps taken, oldest first; steps that were left out are not among them."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def judge(self, loss: float) -> Spike | None:
        """What `loss` (finite, mean per target token) is, were it the next step's; None where it is no spike."""
        count = len(self.losses)
        if count < MIN_STEPS:
            return None
        mean = math.fsum(self.losses) / count
        variance = math.fsum((value - mean) ** 2 for value in self.losses) / (count - 1)
        sigma = max(math.sqrt(variance), MIN_SIGMA * max(1.0, mean))
        return Spike(loss, mean, sigma, count) if loss > mean + SIGMAS * sigma else None

    def took(self, loss: float) -> None:
        """A step with this loss was taken."""
        self.losses.append(loss)

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
