"""The step of a training run: `CausalStep` with a teacher or mixed precision where they are asked for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ollatune.modeling.distillation import Teacher
from ollatune.modeling.fast.forward import CausalStep, PackedRow
from ollatune.modeling.fast.loss import head_loss_sum


class TrainingStep(CausalStep):
    """`CausalStep`, and what a run may add to it.

    Args:
        teacher: takes part in the training loss; validation stays plain cross-entropy.
        autocast: number type of the products where the weights are fp32; None computes in the weights' own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        use_fast_path: bool = True,
        recompute: bool = False,
        teacher: Teacher | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            label_smoothing=label_smoothing,
            use_fast_path=use_fast_path,
            recompute=recompute,
        )
        self.teacher = teacher
        self.autocast = autocast

    @property
    def can_share(self) -> bool:
        """A teacher has to compute the same rows."""
        if self.teacher is not None and not self.teacher.step_function.can_share:
            return False
        return super().can_share

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)

    def loss_sum(self, row: PackedRow) -> Tensor:
        """Sum of the loss over the row's targets, with gradient."""
        lesson = None if self.teacher is None else self.teacher.lesson(row)
        with self._precision():
            hidden_ND = self.hidden(row)
            return head_loss_sum(hidden_ND, self.head, row.target_ids_N, self.settings, lesson)

    def evaluate(self, row: PackedRow) -> tuple[float, int]:
        """Loss sum and number of correct next tokens over the row's targets."""
        with self._precision():
            return super().evaluate(row)
