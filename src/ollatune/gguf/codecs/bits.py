"""Bit work shared by the block codecs: eight quants at a time, in int64 lanes.

A torch operation pays for every innermost run it walks, so the codecs work on planes: all first parts of all blocks,
then all second parts, each one long run. `interleave` brings the parts of a block together again at the end.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache

import numpy as np
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


class _Arena(threading.local):
    """Memory for the temporaries of one chunk, the same for every chunk.

    The allocator may hand such memory back to the system and fetch it again for each chunk, page by page, which takes
    longer than decoding.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.used_bytes = 0

    def begin(self) -> None:
        """Forget all temporaries; room for all of them next time."""
        if self.used_bytes > self.memory.numel():
            self.memory = torch.empty(self.used_bytes, dtype=torch.uint8)
        self.used_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size_bytes = math.prod(shape) * dtype.itemsize
        first = self.used_bytes
        self.used_bytes += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        if self.used_bytes > self.memory.numel():
            return torch.empty(shape, dtype=dtype)
        return self.memory[first : first + size_bytes].view(dtype).view(shape)


_ALIGNMENT = 64
_arena = _Arena()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`. On a CPU from numpy, which asks the system for huge pages, as torch does not.

    The first touch of memory in small pages takes longer than decoding into it.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(size_bytes + _ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[first : first + size_bytes]).view(dtype).view(shape)


def begin_chunk() -> None:
    """Make the memory of all temporaries of this thread free again."""
    _arena.begin()


def temporary(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory, valid until this thread's next `begin_chunk`."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return _arena.take(shape, dtype)


def compact(bytes_: Tensor) -> Tensor:
    """A copy that can be viewed as wider numbers: memory of its own, and the strides of its shape."""
    # `contiguous` would keep the strides of a slice that holds one block.
    return temporary(tuple(bytes_.shape), torch.uint8, bytes_.device).copy_(bytes_)


def planes(parts: Tensor) -> Tensor:
    """int64 lanes [P, M] of uint8 [..., P, R], where M runs over what is before P, and then R."""
    num_parts = parts.shape[-2]
    return compact(parts.movedim(-2, 0)).view(torch.int64).view(num_parts, -1)


def _spread(planes_PM: Tensor, values: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Operands and result [P, len(values), M] of an operation of every plane with each value."""
    num_planes, num_lanes = planes_PM.shape
    out = temporary((num_planes, len(values), num_lanes), torch.int64, planes_PM.device)
    return planes_PM.unsqueeze(1), constants(values, planes_PM.device), out


def shifted_left(planes_PM: Tensor, *shifts: int) -> Tensor:
    """int64 [P * len(shifts), M]: every plane shifted by each number of bits."""
    lanes_P1M, shifts_S1, out = _spread(planes_PM, shifts)
    return torch.bitwise_left_shift(lanes_P1M, shifts_S1, out=out).flatten(0, 1)


def shifted_right(planes_PM: Tensor, *shifts: int) -> Tensor:
    """int64 [P * len(shifts), M]: as `shifted_left`. Copies of the sign come in from above: mask them."""
    lanes_P1M, shifts_S1, out = _spread(planes_PM, shifts)
    return torch.bitwise_right_shift(lanes_P1M, shifts_S1, out=out).flatten(0, 1)


def interleave(planes_PM: Tensor, run_bytes: int) -> Tensor:
    """int8, flat: runs of `run_bytes` (16 or more) taken from each plane in turn."""
    # complex128 is the widest element there is: the copy then moves 16 bytes at a time.
    runs_PRW = planes_PM.view(torch.complex128).view(planes_PM.shape[0], -1, run_bytes // 16)
    num_planes, num_runs, width = runs_PRW.shape
    out = temporary((num_runs, num_planes * width), torch.complex128, planes_PM.device)
    return torch.cat(runs_PRW.unbind(0), dim=1, out=out).view(torch.int8).view(-1)


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
    return look_up(_bit_to_byte_table(bit, bytes_.device), bytes_)


def look_up(table: Tensor, keys: Tensor) -> Tensor:
    """The entries of a one-dimensional `table` that the keys (uint8, or int8 of 0 and above) name, flat."""
    size = (keys.numel(),)
    indices = temporary(size, torch.int32, keys.device).copy_(keys.reshape(-1))
    out = temporary(size, table.dtype, keys.device)
    return torch.index_select(table, 0, indices, out=out)
