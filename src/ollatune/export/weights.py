"""The weights of one tensor before and after its update, as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.base.errors import DivergedError, InputError
from ollatune.export.plan import TensorUpdate
from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import GGUFFile


def decode_tensor(base: GGUFFile, name: str) -> Tensor:
    """The weights of a tensor as the server computes with them: float32 in the tensor's shape."""
    info = base.tensor(name)
    columns = info.shape[-1] if info.shape else 1
    # A copy of this one tensor: torch has no read-only tensors, and the mapped pages can then be let go.
    stored = torch.from_numpy(base.tensor_data(name).copy())
    blocks = stored.reshape(-1, info.type.row_bytes(columns))
    return dequantize(blocks, info.type).reshape(info.shape)


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
