"""Loss scaling for fp16: small gradients are lifted into its range, and let down again before the update.

The scale halves when a gradient overflows (that step changes nothing and is counted) and doubles after a long row of
good steps, as in Micikevicius et al. 2018. It is part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
"""Gradients that overflow even unscaled are not a matter of scaling: the run has diverged."""


@dataclass
class LossScale:
    """The scale now; 1 for good where `is_on` is False (fp32, bf16).

    Attributes:
        good_steps: steps without overflow since the scale last changed.
        growth_interval: good steps after which the scale doubles.
    """

    is_on: bool
    value: float = 1.0
    good_steps: int = 0
    growth_interval: int = 2000

    @classmethod
    def for_dtype(cls, dtype: str) -> LossScale:
        return cls(True, INITIAL_SCALE) if dtype == "fp16" else cls(False)

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.is_on:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self.value)

    def can_shrink(self) -> bool:
        """Whether a gradient that is not finite may be the scale's fault."""
        return self.is_on and self.value > MIN_SCALE

    def overflowed(self) -> None:
        """Halve the scale."""
        self.value = max(MIN_SCALE, self.value / 2)
        self.good_steps = 0

    def went_well(self) -> None:
        """A step was taken."""
        if not self.is_on:
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.value *= 2
            self.good_steps = 0

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        if self.is_on:
            self.value, self.good_steps = state["value"], state["good_steps"]
