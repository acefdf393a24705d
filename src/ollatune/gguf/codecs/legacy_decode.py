"""Unpacking of the blocks of 32 weights: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).

An unpacker takes `blocks_NB` (uint8, one block a row) and gives the `Quants` from which `codecs.dequantize` makes the
weights. Signed quants are kept in the high bits of a byte, which the sign then follows for free: 16·(q-8) is
(q << 4) ^ 0x80 read as int8, and dividing the scale by that power of two loses nothing in float32. Unsigned ones stay
below 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import (
    half_column,
    interleave,
    lanes,
    look_up,
    planes,
    shifted_left,
    shifted_right,
    spread_bits,
)

# The sixteen levels of the "non-linear" types (ggml `kvalues_iq4nl`).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

HALF_BLOCK = 16  # the low nibbles are the first half of a block, the high nibbles the second


class Quants(NamedTuple):
    """Weights are scale · quant - minimum: S sub-blocks, each with one scale and, in some types, one minimum.

    `quants`: int8, in the order of the weights, any shape; `scale_S1`, `minimum_S1`: float32 [S, 1].
    """

    quants: Tensor
    scale_S1: Tensor
    minimum_S1: Tensor | None = None


def unpack_q8_0(blocks_NB: Tensor) -> Quants:
    return Quants(blocks_NB[:, 2:].view(torch.int8), half_column(blocks_NB, 0))


def _minimum(blocks_NB: Tensor) -> Tensor:
    """What is taken away: these types store what is added. To negate loses nothing."""
    return half_column(blocks_NB, 2).neg_()


def unpack_q4_0(blocks_NB: Tensor) -> Quants:
    quants_2M = shifted_left(planes(blocks_NB[:, None, 2:]), 4, 0)
    quants_2M.bitwise_and_(lanes(0xF0)).bitwise_xor_(lanes(0x80))
    return Quants(interleave(quants_2M, HALF_BLOCK), half_column(blocks_NB, 0).div_(16))


def unpack_q4_1(blocks_NB: Tensor) -> Quants:
    quants_2M = shifted_right(planes(blocks_NB[:, None, 4:]), 0, 4).bitwise_and_(lanes(0x0F))
    return Quants(interleave(quants_2M, HALF_BLOCK), half_column(blocks_NB, 0), _minimum(blocks_NB))


def _five_bits(blocks_NB: Tensor, header_bytes: int, shift: int) -> Tensor:
    """int64 planes [2, M] of q << shift (2 or 3): four bits of it in nibbles, the fifth in a word before them."""
    nibbles_1M = planes(blocks_NB[:, None, header_bytes + 4 :])
    quants_2M = shifted_left(nibbles_1M, 4, 0).bitwise_right_shift_(4 - shift)
    quants_2M.bitwise_and_(lanes(0x0F << shift))
    fifth_N22 = blocks_NB[:, header_bytes : header_bytes + 4].view(-1, 2, 2)
    fifth_2M = spread_bits(fifth_N22.transpose(0, 1), 4 + shift).view(2, -1)
    return quants_2M.bitwise_or_(fifth_2M)


def unpack_q5_0(blocks_NB: Tensor) -> Quants:
    quants_2M = _five_bits(blocks_NB, header_bytes=2, shift=3).bitwise_xor_(lanes(0x80))
    return Quants(interleave(quants_2M, HALF_BLOCK), half_column(blocks_NB, 0).div_(8))


def unpack_q5_1(blocks_NB: Tensor) -> Quants:
    quants_2M = _five_bits(blocks_NB, header_bytes=4, shift=2)
    return Quants(
        interleave(quants_2M, HALF_BLOCK), half_column(blocks_NB, 0).div_(4), _minimum(blocks_NB)
    )


def levels_of(quants: Tensor) -> Tensor:
    """int8 level of each uint8 quant of a non-linear type."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.int8, device=quants.device)
    return look_up(table, quants).view(quants.shape)


def unpack_iq4_nl(blocks_NB: Tensor) -> Quants:
    quants_2M = shifted_right(planes(blocks_NB[:, None, 2:]), 0, 4).bitwise_and_(lanes(0x0F))
    return Quants(levels_of(interleave(quants_2M, HALF_BLOCK)), half_column(blocks_NB, 0))
