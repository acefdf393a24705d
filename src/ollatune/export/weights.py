"""The weights of one tensor after its update, as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.base.errors import DivergedError, InputError
from ollatune.export.plan import TensorUpdate


@torch.no_grad()
def updated(weights: Tensor, update: TensorUpdate) -> Tensor:
    """`weights` with `update`: float32 on the CPU, same shape.

    Raises DivergedError where the update is not finite, InputError where it changes the shape.
    """
    tuned = update.apply(weights).to("cpu", torch.float32)
    if tuned.shape != weights.shape:
        raise InputError(
            f"The update of `{update.name}` gave shape {tuple(tuned.shape)}, {tuple(weights.shape)} was expected."
        )
    if not tuned.isfinite().all():
        raise DivergedError(
            f"The update of `{update.name}` holds NaN or infinity; nothing was written.",
            hint="Export an earlier checkpoint.",
        )
    return tuned
