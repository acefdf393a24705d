"""Decoding of the blocks of 32 weights: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).

A decoder takes `blocks_NB` (uint8, one block a row) and fills `out_NW` (float32, one block a row). Signed quants are
kept in the high bits of a byte, which the sign then follows for free: 16·(q-8) is (q << 4) ^ 0x80 read as int8, and
dividing the scale by that power of two loses nothing in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import as_int64, half_to_float, lanes, spread_bits

# The sixteen levels of the "non-linear" types (ggml `kvalues_iq4nl`).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode_q8_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N1 = half_to_float(blocks_NB[:, :2])
    out_NW.copy_(blocks_NB[:, 2:].view(torch.int8))
    out_NW.mul_(scale_N1)


def _high_nibbles(packed_NB: Tensor) -> Tensor:
    """int64 lanes [N, 4] of 32 bytes: the quant in the high nibble, rubbish in the low one."""
    packed_N2 = as_int64(packed_NB)
    quants_N4 = packed_N2.new_empty(packed_N2.shape[0], 4)
    for column in range(2):  # one long strided loop each, instead of many of two lanes
        torch.bitwise_left_shift(packed_N2[:, column], 4, out=quants_N4[:, column])
        quants_N4[:, column + 2] = packed_N2[:, column]
    return quants_N4


def _low_nibbles(packed_NB: Tensor) -> Tensor:
    """int64 lanes [N, 4] of 32 bytes: the quant in the low nibble, rubbish in the high one."""
    packed_N2 = as_int64(packed_NB)
    quants_N4 = packed_N2.new_empty(packed_N2.shape[0], 4)
    for column in range(2):
        quants_N4[:, column] = packed_N2[:, column]
        torch.bitwise_right_shift(packed_N2[:, column], 4, out=quants_N4[:, column + 2])
    return quants_N4


def decode_q4_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N1 = half_to_float(blocks_NB[:, :2])
    quants_N4 = _high_nibbles(blocks_NB[:, 2:])
    quants_N4.bitwise_and_(lanes(0xF0)).bitwise_xor_(lanes(0x80))
    out_NW.copy_(quants_N4.view(torch.int8))
    out_NW.mul_(scale_N1.div_(16))


def decode_q5_0(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N1 = half_to_float(blocks_NB[:, :2])
    quants_N4 = _low_nibbles(blocks_NB[:, 6:])
    quants_N4.bitwise_left_shift_(3).bitwise_and_(lanes(0x78))
    # The fifth bit is the sign's place: set means q >= 16, so it is flipped.
    quants_N4.bitwise_or_(spread_bits(blocks_NB[:, 2:6], 7)).bitwise_xor_(lanes(0x80))
    out_NW.copy_(quants_N4.view(torch.int8))
    out_NW.mul_(scale_N1.div_(8))


def decode_q4_1(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N2 = half_to_float(blocks_NB[:, :4])
    quants_N4 = _low_nibbles(blocks_NB[:, 4:]).bitwise_and_(lanes(0x0F))
    out_NW.copy_(quants_N4.view(torch.uint8))
    out_NW.mul_(scale_N2[:, :1]).add_(scale_N2[:, 1:])


def decode_q5_1(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N2 = half_to_float(blocks_NB[:, :4])
    quants_N4 = _low_nibbles(blocks_NB[:, 8:]).bitwise_and_(lanes(0x0F))
    quants_N4.bitwise_or_(spread_bits(blocks_NB[:, 4:8], 4))
    out_NW.copy_(quants_N4.view(torch.uint8))
    out_NW.mul_(scale_N2[:, :1]).add_(scale_N2[:, 1:])


def levels_of(quants: Tensor) -> Tensor:
    """float32 level of each uint8 quant of a non-linear type."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=quants.device)
    return table.index_select(0, quants.reshape(-1).to(torch.int32)).view(quants.shape)


def decode_iq4_nl(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N1 = half_to_float(blocks_NB[:, :2])
    quants_N4 = _low_nibbles(blocks_NB[:, 2:]).bitwise_and_(lanes(0x0F))
    torch.mul(levels_of(quants_N4.view(torch.uint8)), scale_N1, out=out_NW)
