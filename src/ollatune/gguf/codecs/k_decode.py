"""Decoding of the super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).
Conventions as in `legacy_decode`: `blocks_NB` in, `out_NW` filled, signed quants kept in the high bits of a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import (
    compact,
    constants,
    half_column,
    interleave,
    lanes,
    masked,
    planes,
    shifted_left,
    shifted_right,
    temporary,
)
from ollatune.gguf.codecs.legacy_decode import levels_of

RUN = 32  # weights that lie side by side in one bit position of 32 bytes


def _fill(out_NW: Tensor, quants: Tensor, scales: Tensor, mins: Tensor | None = None) -> None:
    """out = scale · quant - minimum, `scales` and `mins` contiguous, one of each a sub-block."""
    out_SW = out_NW.view(scales.numel(), -1)
    out_SW.copy_(quants.view(out_SW.shape))
    # Two roundings, as in the reference: a fused multiply-add would differ in the last bit.
    out_SW.mul_(scales.view(-1, 1))
    if mins is not None:
        out_SW.sub_(mins.view(-1, 1))


def decode_q2_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scales_NS = blocks_NB[:, :16].contiguous()
    scale_NS = (scales_NS & 0x0F).to(torch.float32).mul_(half_column(blocks_NB, 80))
    min_NS = (scales_NS >> 4).to(torch.float32).mul_(half_column(blocks_NB, 82))
    quants_4M = shifted_right(planes(blocks_NB[:, None, 16:80]), 0, 2, 4, 6)
    quants_4M.bitwise_and_(lanes(0x03))
    _fill(out_NW, interleave(quants_4M, RUN), scale_NS, min_NS)


def _q3_k_scales(packed_N12: Tensor) -> Tensor:
    """int8 [N, 16] of the 6-bit scales, minus 32: low nibbles in eight bytes, bit pairs in four."""
    scales_N4 = packed_N12.new_empty(packed_N12.shape[0], 4, dtype=torch.int32)
    packed_N3 = compact(packed_N12).view(torch.int32)
    low_N2, high_N1 = packed_N3[:, :2], packed_N3[:, 2:]
    torch.bitwise_and(low_N2, 0x0F0F0F0F, out=scales_N4[:, :2])
    torch.bitwise_and(low_N2 >> 4, 0x0F0F0F0F, out=scales_N4[:, 2:])
    shifts_4 = constants((0, 2, 4, 6), packed_N12.device).view(4)
    high_N4 = (high_N1 >> shifts_4.to(torch.int32)).bitwise_and_(0x03030303)
    scales_N4.bitwise_or_(high_N4.bitwise_left_shift_(4))
    return scales_N4.view(torch.int8).sub_(32)


def decode_q3_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scale_NS = _q3_k_scales(blocks_NB[:, 96:108]).to(torch.float32)
    scale_NS.mul_(half_column(blocks_NB, 108).div_(32))
    low_2M = planes(blocks_NB[:, 32:96].view(num_blocks, 2, RUN))
    quants_8M = shifted_right(low_2M, 0, 2, 4, 6).bitwise_left_shift_(5).bitwise_and_(lanes(0x60))
    high_8M = shifted_left(planes(blocks_NB[:, None, :32]), 7, 6, 5, 4, 3, 2, 1, 0)
    quants_8M.bitwise_or_(high_8M.bitwise_and_(lanes(0x80))).bitwise_xor_(lanes(0x80))
    _fill(out_NW, interleave(quants_8M, RUN).view(torch.int8), scale_NS)


def _q4_k_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [2, N, 8]: scales and minima of the sub-blocks, of Q4_K and Q5_K.

    Twelve bytes hold 6-bit numbers: four scales, four minima, then the low nibbles of the other
    four of each, whose upper bit pairs fill the first eight bytes.
    """
    packed_N3 = compact(blocks_NB[:, 4:16]).view(torch.int32)
    scales_2N2 = packed_N3.new_empty(2, packed_N3.shape[0], 2)
    for which in range(2):  # the scales, then the minima
        packed_N = packed_N3[:, which]
        torch.bitwise_and(packed_N, 0x3F3F3F3F, out=scales_2N2[which, :, 0])
        low_N = (packed_N3[:, 2] >> (4 * which)).bitwise_and_(0x0F0F0F0F)
        high_N = (packed_N >> 2).bitwise_and_(0x30303030)
        torch.bitwise_or(low_N, high_N, out=scales_2N2[which, :, 1])
    scales_2N8 = scales_2N2.view(torch.uint8).to(torch.float32)
    scales_2N8[0].mul_(half_column(blocks_NB, 0))
    scales_2N8[1].mul_(half_column(blocks_NB, 2))
    return scales_2N8


def decode_q4_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scales_2N8 = _q4_k_scales(blocks_NB)
    # High nibbles stay where they are, sixteen times too large; their scales make up for it.
    scales_2N8[0, :, 1::2].div_(16)
    quants_2M = masked(planes(blocks_NB[:, None, 16:]), 0x0F, 0xF0)
    _fill(out_NW, interleave(quants_2M, RUN), scales_2N8[0], scales_2N8[1])


def decode_q5_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scales_2N8 = _q4_k_scales(blocks_NB)
    low_4M = planes(blocks_NB[:, 48:].view(num_blocks, 4, RUN))
    quants_8M = shifted_left(low_4M, 4, 0).bitwise_right_shift_(1).bitwise_and_(lanes(0x78))
    high_8M = shifted_left(planes(blocks_NB[:, None, 16:48]), 7, 6, 5, 4, 3, 2, 1, 0)
    quants_8M.bitwise_or_(high_8M.bitwise_and_(lanes(0x80)))
    _fill(out_NW, interleave(quants_8M, RUN), scales_2N8[0].div_(8), scales_2N8[1])


def decode_q6_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scale_NS = blocks_NB[:, 192:208].view(torch.int8).to(torch.float32)
    scale_NS.mul_(half_column(blocks_NB, 208).div_(4))
    low_2M = planes(blocks_NB[:, :128].view(num_blocks, 2, 2, RUN))
    # Runs 0 and 1 are the low nibbles of both planes, 2 and 3 the high ones.
    quants_4M = temporary((4, low_2M.shape[1]), torch.int64, low_2M.device)
    torch.bitwise_left_shift(low_2M, 2, out=quants_4M[:2])
    torch.bitwise_right_shift(low_2M, 2, out=quants_4M[2:])
    quants_4M.bitwise_and_(lanes(0x3C))
    high_4M = shifted_left(planes(blocks_NB[:, None, 128:192]), 6, 4, 2, 0)
    quants_4M.bitwise_or_(high_4M.bitwise_and_(lanes(0xC0))).bitwise_xor_(lanes(0x80))
    _fill(out_NW, interleave(quants_4M, RUN).view(torch.int8), scale_NS)


def _iq4_xs_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [N, 8]: nibbles in four bytes, their upper bit pairs in one 16-bit word, minus 32."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks_NB.device)
    low_N8 = (blocks_NB[:, 4:8, None] >> shifts[0:3:2]).bitwise_and_(0x0F).flatten(1)
    high_N8 = (blocks_NB[:, 2:4, None] >> shifts).bitwise_and_(0x03).flatten(1)
    scales_N8 = low_N8.bitwise_or_(high_N8.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    return scales_N8.to(torch.float32).mul_(half_column(blocks_NB, 0))


def decode_iq4_xs(blocks_NB: Tensor, out_NW: Tensor) -> None:
    scale_N8 = _iq4_xs_scales(blocks_NB)
    quants_2M = shifted_right(planes(blocks_NB[:, None, 8:]), 0, 4).bitwise_and_(lanes(0x0F))
    levels_SW = levels_of(interleave(quants_2M, 16)).view(scale_N8.numel(), -1)
    torch.mul(levels_SW, scale_N8.view(-1, 1), out=out_NW.view(levels_SW.shape))
