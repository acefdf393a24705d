"""Unpacking of the super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).
Conventions as in `legacy_decode`: `blocks_NB` in, `Quants` out, signed quants in the high bits of a byte.
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
    planes,
    shifted_left,
    shifted_right,
    temporary,
)
from ollatune.gguf.codecs.legacy_decode import Quants, levels_of

RUN = 32  # weights that lie side by side in one bit position of 32 bytes


def _quants(quants: Tensor, scales: Tensor, minima: Tensor | None = None) -> Quants:
    return Quants(quants, scales.view(-1, 1), None if minima is None else minima.view(-1, 1))


def unpack_q2_k(blocks_NB: Tensor) -> Quants:
    scales_NS = blocks_NB[:, :16].contiguous()
    scale_NS = (scales_NS & 0x0F).to(torch.float32).mul_(half_column(blocks_NB, 80))
    min_NS = (scales_NS >> 4).to(torch.float32).mul_(half_column(blocks_NB, 82))
    quants_4M = shifted_right(planes(blocks_NB[:, None, 16:80]), 0, 2, 4, 6)
    quants_4M.bitwise_and_(lanes(0x03))
    return _quants(interleave(quants_4M, RUN), scale_NS, min_NS)


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


def unpack_q3_k(blocks_NB: Tensor) -> Quants:
    num_blocks = blocks_NB.shape[0]
    scale_NS = _q3_k_scales(blocks_NB[:, 96:108]).to(torch.float32)
    scale_NS.mul_(half_column(blocks_NB, 108).div_(32))
    low_2M = planes(blocks_NB[:, 32:96].view(num_blocks, 2, RUN))
    quants_8M = shifted_right(low_2M, 0, 2, 4, 6).bitwise_left_shift_(5).bitwise_and_(lanes(0x60))
    high_8M = shifted_left(planes(blocks_NB[:, None, :32]), 7, 6, 5, 4, 3, 2, 1, 0)
    quants_8M.bitwise_or_(high_8M.bitwise_and_(lanes(0x80))).bitwise_xor_(lanes(0x80))
    return _quants(interleave(quants_8M, RUN), scale_NS)


def _q4_k_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [2, N, 8]: scales and minima of the sub-blocks, of Q4_K and Q5_K.

    Twelve bytes hold 6-bit numbers: four scales, four minima, then the low nibbles of the other
    four of each, whose upper bit pairs fill the first eight bytes.
    """
    words_NI = blocks_NB.view(torch.int32)
    scales_2N2 = words_NI.new_empty(2, words_NI.shape[0], 2)
    for which in range(2):  # the scales, then the minima
        packed_N = words_NI[:, 1 + which].contiguous()
        torch.bitwise_and(packed_N, 0x3F3F3F3F, out=scales_2N2[which, :, 0])
        low_N = (words_NI[:, 3] >> (4 * which)).bitwise_and_(0x0F0F0F0F)
        high_N = (packed_N >> 2).bitwise_and_(0x30303030)
        torch.bitwise_or(low_N, high_N, out=scales_2N2[which, :, 1])
    scales_2N8 = scales_2N2.view(torch.uint8).to(torch.float32)
    scales_2N8[0].mul_(half_column(blocks_NB, 0))
    scales_2N8[1].mul_(half_column(blocks_NB, 2))
    return scales_2N8


def unpack_q4_k(blocks_NB: Tensor) -> Quants:
    scales_2N8 = _q4_k_scales(blocks_NB)
    quants_2M = shifted_right(planes(blocks_NB[:, None, 16:]), 0, 4).bitwise_and_(lanes(0x0F))
    return _quants(interleave(quants_2M, RUN), scales_2N8[0], scales_2N8[1])


def unpack_q5_k(blocks_NB: Tensor) -> Quants:
    num_blocks = blocks_NB.shape[0]
    scales_2N8 = _q4_k_scales(blocks_NB)
    low_4M = planes(blocks_NB[:, 48:].view(num_blocks, 4, RUN))
    quants_8M = shifted_left(low_4M, 4, 0).bitwise_right_shift_(2).bitwise_and_(lanes(0x3C))
    high_8M = shifted_left(planes(blocks_NB[:, None, 16:48]), 7, 6, 5, 4, 3, 2, 1, 0)
    quants_8M.bitwise_or_(high_8M.bitwise_right_shift_(1).bitwise_and_(lanes(0x40)))
    return _quants(interleave(quants_8M, RUN), scales_2N8[0].div_(4), scales_2N8[1])


def unpack_q6_k(blocks_NB: Tensor) -> Quants:
    num_blocks = blocks_NB.shape[0]
    scale_NS = blocks_NB[:, 192:208].view(torch.int8).to(torch.float32)
    scale_NS.mul_(half_column(blocks_NB, 208).div_(4))
    # In two steps: short runs are slow to take out of rows that begin anywhere.
    low_N = compact(blocks_NB[:, :128]).view(torch.complex128).view(2 * num_blocks, 2, -1)
    low_2M = temporary((2, low_N.numel()), torch.int64, blocks_NB.device)
    low_2M.view(torch.complex128).view(2, 2 * num_blocks, -1).copy_(low_N.transpose(0, 1))
    # Runs 0 and 1 are the low nibbles of both planes, 2 and 3 the high ones.
    quants_4M = temporary((4, low_2M.shape[1]), torch.int64, low_2M.device)
    torch.bitwise_left_shift(low_2M, 2, out=quants_4M[:2])
    torch.bitwise_right_shift(low_2M, 2, out=quants_4M[2:])
    quants_4M.bitwise_and_(lanes(0x3C))
    high_4M = shifted_left(planes(blocks_NB[:, None, 128:192]), 6, 4, 2, 0)
    quants_4M.bitwise_or_(high_4M.bitwise_and_(lanes(0xC0))).bitwise_xor_(lanes(0x80))
    return _quants(interleave(quants_4M, RUN), scale_NS)


def _iq4_xs_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [N, 8]: nibbles in four bytes, their upper bit pairs in one 16-bit word, minus 32."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks_NB.device)
    low_N8 = (blocks_NB[:, 4:8, None] >> shifts[0:3:2]).bitwise_and_(0x0F).flatten(1)
    high_N8 = (blocks_NB[:, 2:4, None] >> shifts).bitwise_and_(0x03).flatten(1)
    scales_N8 = low_N8.bitwise_or_(high_N8.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    return scales_N8.to(torch.float32).mul_(half_column(blocks_NB, 0))


def unpack_iq4_xs(blocks_NB: Tensor) -> Quants:
    scale_N8 = _iq4_xs_scales(blocks_NB)
    quants_2M = shifted_right(planes(blocks_NB[:, None, 8:]), 0, 4).bitwise_and_(lanes(0x0F))
    return _quants(levels_of(interleave(quants_2M, 16)), scale_N8)
