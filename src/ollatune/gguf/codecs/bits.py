"""Bit work shared by the block codecs: eight quants at a time, in int64 lanes.

A torch operation pays for every innermost run it walks, so the codecs work on planes: all first parts of all blocks,
then all second parts, each one long run. `interleave` brings the parts of a block together again at the end.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ollatune.base.errors import InputError

LANE_BYTES = 8


def lanes(byte: int) -> int:
    """`byte` repeated in all eight bytes of a signed 64-bit integer."""
    return int.from_bytes(bytes([byte]) * LANE_BYTES, "little", signed=True)


@lru_cache(maxsize=256)
def constants(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [len, 1]: shifts or masks that differ by plane."""
    return torch.tensor(values, dtype=torch.int64, device=device).unsqueeze(1)


def planes(parts: Tensor) -> Tensor:
    """int64 lanes [P, M] of uint8 [..., P, R], where M runs over what is before P, and then R."""
    num_parts = parts.shape[-2]
    return compact(parts.movedim(-2, 0)).view(torch.int64).view(num_parts, -1)


def compact(bytes_: Tensor) -> Tensor:
    """A copy that can be viewed as wider numbers: its own storage, and the strides of its shape."""
    # `contiguous` would keep the strides of a slice that holds one block.
    return bytes_.clone(memory_format=torch.contiguous_format)


def shifted_left(planes_PM: Tensor, *shifts: int) -> Tensor:
    """int64 [P * len(shifts), M]: every plane shifted by each number of bits."""
    return (planes_PM.unsqueeze(1) << constants(shifts, planes_PM.device)).flatten(0, 1)


def shifted_right(planes_PM: Tensor, *shifts: int) -> Tensor:
    """int64 [P * len(shifts), M]: as `shifted_left`. Copies of the sign come in from above: mask them."""
    return (planes_PM.unsqueeze(1) >> constants(shifts, planes_PM.device)).flatten(0, 1)


def interleave(planes_PM: Tensor, run_bytes: int) -> Tensor:
    """uint8, flat: runs of `run_bytes` (16 or more) taken from each plane in turn."""
    # complex128 is the widest element there is: the copy then moves 16 bytes at a time.
    runs = planes_PM.view(torch.complex128).view(planes_PM.shape[0], -1, run_bytes // 16)
    return torch.cat(runs.unbind(0), dim=1).view(torch.uint8).view(-1)


def half_column(blocks_NB: Tensor, first_byte: int) -> Tensor:
    """float32 [N, 1] of the little-endian IEEE half float at `first_byte` of every block."""
    # Copied before it is converted: conversion is vectorised for contiguous halves alone.
    halves_N = blocks_NB.view(torch.float16)[:, first_byte // 2].contiguous()
    return halves_N.to(torch.float32).unsqueeze(1)


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
def _bit_to_byte_table(bit: int, device: torch.device) -> Tensor:
    """int64[256]: entry b holds, in byte i, bit i of b moved to the place `bit`."""
    rows = [
        int.from_bytes(
            bytes(((b >> i) & 1) << bit for i in range(LANE_BYTES)), "little", signed=True
        )
        for b in range(256)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def spread_bits(bytes_: Tensor, bit: int) -> Tensor:
    """int64 lanes, flat: one byte for each bit of uint8 `bytes_`, the bit moved to place `bit`."""
    table = _bit_to_byte_table(bit, bytes_.device)
    return table.index_select(0, bytes_.reshape(-1).to(torch.int32))
