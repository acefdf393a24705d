"""Decoding of the blocks of 32 weights: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).

A decoder takes `blocks_NB` (uint8, one block a row) and fills `out_NW` (float32, one block a row). Signed quants are
kept in the high bits of a byte, which the sign then follows for free: 16·(q-8) is (q << 4) ^ 0x80 read as int8, and
dividing the scale by that power of two loses nothing in float32.
"""

from __future__ import annotations

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


def decode_q8_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N1 = half_column(blocks_NB, 0)
    out_NW.copy_(blocks_NB[:, 2:].view(torch.int8))
    out_NW.mul_(scale_N1)


def _fill_affine(out_NW: Tensor, quants: Tensor, blocks_NB: Tensor, unit: int) -> None:
    """out = scale · (quants / unit) + minimum; both are halves at the front of a block."""
    out_NW.copy_(quants.view(out_NW.shape))
    # Two roundings, as in the reference: a fused multiply-add would differ in the last bit.
    out_NW.mul_(half_column(blocks_NB, 0).div_(unit)).add_(half_column(blocks_NB, 2))


def decode_q4_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    quants_2M = shifted_left(planes(blocks_NB[:, None, 2:]), 4, 0)
    quants_2M.bitwise_and_(lanes(0xF0)).bitwise_xor_(lanes(0x80))
    out_NW.copy_(interleave(quants_2M, HALF_BLOCK).view(torch.int8).view(out_NW.shape))
    out_NW.mul_(half_column(blocks_NB, 0).div_(16))


def decode_q4_1(blocks_NB: Tensor, out_NW: Tensor) -> None:
    quants_2M = shifted_right(planes(blocks_NB[:, None, 4:]), 0, 4).bitwise_and_(lanes(0x0F))
    _fill_affine(out_NW, interleave(quants_2M, HALF_BLOCK), blocks_NB, unit=1)


def _five_bits(blocks_NB: Tensor, header_bytes: int) -> Tensor:
    """int64 planes [2, M] of 8·q: four bits of it in nibbles, the fifth in a word before them."""
    nibbles_1M = planes(blocks_NB[:, None, header_bytes + 4 :])
    quants_2M = shifted_left(nibbles_1M, 4, 0).bitwise_right_shift_(1).bitwise_and_(lanes(0x78))
    fifth_N22 = blocks_NB[:, header_bytes : header_bytes + 4].view(-1, 2, 2)
    fifth_2M = spread_bits(fifth_N22.transpose(0, 1), 7).view(2, -1)
    return quants_2M.bitwise_or_(fifth_2M)


def decode_q5_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    quants_2M = _five_bits(blocks_NB, header_bytes=2).bitwise_xor_(lanes(0x80))
    out_NW.copy_(interleave(quants_2M, HALF_BLOCK).view(torch.int8).view(out_NW.shape))
    out_NW.mul_(half_column(blocks_NB, 0).div_(8))


def decode_q5_1(blocks_NB: Tensor, out_NW: Tensor) -> None:
    quants_2M = _five_bits(blocks_NB, header_bytes=4)
    _fill_affine(out_NW, interleave(quants_2M, HALF_BLOCK), blocks_NB, unit=8)


def levels_of(quants: Tensor) -> Tensor:
    """float32 level of each uint8 quant of a non-linear type."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=quants.device)
    return look_up(table, quants).view(quants.shape)


def decode_iq4_nl(blocks_NB: Tensor, out_NW: Tensor) -> None:
    quants_2M = shifted_right(planes(blocks_NB[:, None, 2:]), 0, 4).bitwise_and_(lanes(0x0F))
    levels_NW = levels_of(interleave(quants_2M, HALF_BLOCK)).view(out_NW.shape)
    torch.mul(levels_NW, half_column(blocks_NB, 0), out=out_NW)
