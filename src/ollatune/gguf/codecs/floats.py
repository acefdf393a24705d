"""F32, F16 and BF16: one number a "block", stored little-endian."""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.gguf.types import GGMLType

FLOAT_DTYPES: dict[GGMLType, torch.dtype] = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


def encode_float(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 bytes of `weights` in `dtype`, rounded to nearest even.

    Raises:
        InputError: a weight is not finite, or too large for the type.
    """
    values = weights.contiguous().to(dtype)
    if not values.isfinite().all():
        raise InputError(
            f"Cannot store the weights as {dtype}: some are NaN, infinite or beyond its range.",
            hint="The largest float16 is 65504; choose bf16 or f32, or train with a lower learning rate.",
        )
    return values.view(torch.uint8)
