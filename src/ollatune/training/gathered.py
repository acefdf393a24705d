"""A `CausalStep` inside a module, for backends that gather weights around a module's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.forward import CausalStep, PackedRow

Result = TypeVar("Result")


class Reach(nn.Module):
    """A module around the whole model whose forward pass is whatever is to be computed with it.

    FSDP and DeepSpeed gather the weights that belong to no decoder layer (embedding, last norm, output layer) when this
    forward pass begins, so that the code in it can read them like any others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Result]) -> Result:
        return compute()


class GatheredStep(CausalStep):
    """`step_function`, computed inside the forward pass of a module.

    Args:
        reach: runs what it is given inside that forward pass; `within` does so where no backward pass follows.
    """

    def __init__(
        self,
        step_function: CausalStep,
        reach: Callable[..., object],
        within: Callable[..., object],
    ) -> None:
        self.__dict__.update(step_function.__dict__)
        self._inner = step_function
        self._reach = reach
        self._within = within

    def hidden(self, row: PackedRow) -> Tensor:
        return cast(Tensor, self._reach(lambda: self._inner.hidden(row)))

    def loss_sum(self, row: PackedRow) -> Tensor:
        return cast(Tensor, self._reach(lambda: self._inner.loss_sum(row)))

    @torch.no_grad()
    def evaluate(self, row: PackedRow) -> tuple[float, int]:
        return cast("tuple[float, int]", self._within(lambda: self._inner.evaluate(row)))
