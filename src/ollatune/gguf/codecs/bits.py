"""Bit work shared by the block codecs: eight quants at a time, in int64 lanes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ollatune.base.errors import InputError


def lanes(byte: int) -> int:
    """`byte` repeated in all eight bytes of a signed 64-bit integer."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def as_int64(bytes_: Tensor) -> Tensor:
    """Contiguous int64 lanes of a byte tensor whose last dimension is a multiple of 8 bytes."""
    # Blocks have odd multiples of two bytes as stride, so a lane view needs this copy.
    return bytes_.contiguous().view(torch.int64)


def half_to_float(bytes_: Tensor) -> Tensor:
    """float32 of little-endian IEEE half floats; the last dimension halves."""
    return bytes_.view(torch.float16).to(torch.float32)


def float_to_half_bytes(values: Tensor) -> Tensor:
    """Little-endian IEEE half bytes, rounded to nearest even; the last dimension doubles.

    Raises:
        InputError: a value is not finite, or too large for a half.
    """
    halves = values.to(torch.float16)
    if not halves.isfinite().all():
        raise InputError(
            "Cannot quantize the weights: some are NaN, infinite or beyond the range of the type.",
            hint="Training diverged, or the weights were never finite; nothing was written.",
        )
    return halves.view(torch.uint8)


@lru_cache(maxsize=64)
def bit_to_byte_table(bit: int, device: torch.device) -> Tensor:
    """int64[256]: entry b holds, in byte i, bit i of b moved to the place `bit`."""
    rows = [
        int.from_bytes(bytes(((b >> i) & 1) << bit for i in range(8)), "little", signed=True)
        for b in range(256)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def spread_bits(bytes_: Tensor, bit: int) -> Tensor:
    """int64 lanes with one byte for each bit of uint8 `bytes_`, the bit moved to place `bit`."""
    table = bit_to_byte_table(bit, bytes_.device)
    return table.index_select(0, bytes_.reshape(-1).to(torch.int32)).view(bytes_.shape)


@lru_cache(maxsize=256)
def column(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a constant of shape [len, 1]: shifts or masks that differ by sub-block."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)
