"""Decoding of the super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Layouts as in ggml's `ggml-common.h`; results are bit-identical to `gguf.quants.dequantize` (tests/unit/test_codecs.py).
Conventions as in `legacy_decode`: `blocks_NB` in, `out_NW` filled, signed quants kept in the high bits of a byte.
A trailing L in a name counts int64 lanes of eight bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import as_int64, column, half_to_float, lanes
from ollatune.gguf.codecs.legacy_decode import levels_of


def _shifts(quants: Tensor, *shifts: int) -> Tensor:
    return column(shifts, torch.int64, quants.device)


def decode_q2_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scales_NS = blocks_NB[:, :16]
    steps_N2 = half_to_float(blocks_NB[:, 80:84])
    scale_NS = (scales_NS & 0x0F).to(torch.float32).mul_(steps_N2[:, :1])
    min_NS = (scales_NS >> 4).to(torch.float32).mul_(steps_N2[:, 1:])
    packed_N21L = as_int64(blocks_NB[:, 16:80]).view(num_blocks, 2, 1, 4)
    quants_N24L = packed_N21L >> _shifts(packed_N21L, 0, 2, 4, 6)
    quants_N24L.bitwise_and_(lanes(0x03))
    weights_NSW = out_NW.view(num_blocks, 16, 16)
    weights_NSW.copy_(quants_N24L.view(torch.uint8).view(num_blocks, 16, 16))
    weights_NSW.mul_(scale_NS.unsqueeze(-1)).sub_(min_NS.unsqueeze(-1))


def _q3_k_scales(packed_N12: Tensor) -> Tensor:
    """int8 [N, 16] of the 6-bit scales, minus 32: low nibbles in eight bytes, bit pairs in four."""
    num_blocks = packed_N12.shape[0]
    shifts = column((0, 4), torch.uint8, packed_N12.device)
    low_N16 = (packed_N12[:, None, :8] >> shifts).bitwise_and_(0x0F).view(num_blocks, 16)
    shifts = column((0, 2, 4, 6), torch.uint8, packed_N12.device)
    high_N16 = (packed_N12[:, None, 8:] >> shifts).bitwise_and_(0x03).view(num_blocks, 16)
    return low_N16.bitwise_or_(high_N16.bitwise_left_shift_(4)).view(torch.int8).sub_(32)


def decode_q3_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scale_NS = _q3_k_scales(blocks_NB[:, 96:108]).to(torch.float32)
    scale_NS.mul_(half_to_float(blocks_NB[:, 108:110])).div_(32)
    low_N21L = as_int64(blocks_NB[:, 32:96]).view(num_blocks, 2, 1, 4)
    quants_N8L = (low_N21L >> _shifts(low_N21L, 0, 2, 4, 6)).view(num_blocks, 8, 4)
    quants_N8L.bitwise_left_shift_(5).bitwise_and_(lanes(0x60))
    high_N1L = as_int64(blocks_NB[:, :32]).unsqueeze(1)
    high_N8L = high_N1L << _shifts(high_N1L, 7, 6, 5, 4, 3, 2, 1, 0)
    quants_N8L.bitwise_or_(high_N8L.bitwise_and_(lanes(0x80))).bitwise_xor_(lanes(0x80))
    weights_NSW = out_NW.view(num_blocks, 16, 16)
    weights_NSW.copy_(quants_N8L.view(torch.int8).view(num_blocks, 16, 16))
    weights_NSW.mul_(scale_NS.unsqueeze(-1))


def _q4_k_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [N, 2, 8]: scale and minimum of the sub-blocks, of Q4_K and Q5_K.

    Twelve bytes hold 6-bit numbers: four scales, four minima, then the low nibbles of the other
    four of each, whose upper bit pairs fill the first eight bytes.
    """
    num_blocks = blocks_NB.shape[0]
    packed_N3 = blocks_NB[:, 4:16].contiguous().view(torch.int32)
    scales_N22 = packed_N3.new_empty(num_blocks, 2, 2)  # scale or minimum, first or last four
    torch.bitwise_and(packed_N3[:, :2], 0x3F3F3F3F, out=scales_N22[:, :, 0])
    low_N2 = packed_N3[:, 2:] >> column((0, 4), torch.int32, packed_N3.device).view(1, 2)
    high_N2 = (packed_N3[:, :2] >> 2).bitwise_and_(0x30303030)
    torch.bitwise_or(low_N2.bitwise_and_(0x0F0F0F0F), high_N2, out=scales_N22[:, :, 1])
    scales_N28 = scales_N22.view(torch.uint8).view(num_blocks, 2, 8).to(torch.float32)
    return scales_N28.mul_(half_to_float(blocks_NB[:, :4]).unsqueeze(-1))


def decode_q4_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scales_N28 = _q4_k_scales(blocks_NB)
    # High nibbles stay where they are, sixteen times too large; their scales make up for it.
    scales_N28[:, 0, 1::2].div_(16)
    packed_N41L = as_int64(blocks_NB[:, 16:]).view(num_blocks, 4, 1, 4)
    quants_N42L = packed_N41L & column((lanes(0x0F), lanes(0xF0)), torch.int64, out_NW.device)
    weights_N8W = out_NW.view(num_blocks, 8, 32)
    weights_N8W.copy_(quants_N42L.view(torch.uint8).view(num_blocks, 8, 32))
    weights_N8W.mul_(scales_N28[:, 0].unsqueeze(-1)).sub_(scales_N28[:, 1].unsqueeze(-1))


def decode_q5_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scales_N28 = _q4_k_scales(blocks_NB)
    packed_N41L = as_int64(blocks_NB[:, 48:]).view(num_blocks, 4, 1, 4)
    quants_N8L = (packed_N41L >> _shifts(packed_N41L, 0, 4)).view(num_blocks, 8, 4)
    high_N1L = as_int64(blocks_NB[:, 16:48]).unsqueeze(1)
    high_N8L = high_N1L << _shifts(high_N1L, 7, 6, 5, 4, 3, 2, 1, 0)
    high_N8L.bitwise_right_shift_(3).bitwise_and_(lanes(0x10))
    quants_N8L.bitwise_and_(lanes(0x0F)).bitwise_or_(high_N8L)
    weights_N8W = out_NW.view(num_blocks, 8, 32)
    weights_N8W.copy_(quants_N8L.view(torch.uint8).view(num_blocks, 8, 32))
    weights_N8W.mul_(scales_N28[:, 0].unsqueeze(-1)).sub_(scales_N28[:, 1].unsqueeze(-1))


def decode_q6_k(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scale_NS = blocks_NB[:, 192:208].view(torch.int8).to(torch.float32)
    scale_NS.mul_(half_to_float(blocks_NB[:, 208:210])).div_(4)
    low_N21L = as_int64(blocks_NB[:, :128]).view(num_blocks, 2, 1, 8)
    quants_N24L = (low_N21L >> _shifts(low_N21L, 0, 4)).view(num_blocks, 2, 4, 4)
    quants_N24L.bitwise_left_shift_(2).bitwise_and_(lanes(0x3C))
    high_N21L = as_int64(blocks_NB[:, 128:192]).view(num_blocks, 2, 1, 4)
    high_N24L = high_N21L << _shifts(high_N21L, 6, 4, 2, 0)
    quants_N24L.bitwise_or_(high_N24L.bitwise_and_(lanes(0xC0))).bitwise_xor_(lanes(0x80))
    weights_NSW = out_NW.view(num_blocks, 16, 16)
    weights_NSW.copy_(quants_N24L.view(torch.int8).view(num_blocks, 16, 16))
    weights_NSW.mul_(scale_NS.unsqueeze(-1))


def _iq4_xs_scales(blocks_NB: Tensor) -> Tensor:
    """float32 [N, 8]: nibbles in four bytes, their upper bit pairs in one 16-bit word, minus 32."""
    num_blocks = blocks_NB.shape[0]
    shifts = column((0, 4), torch.uint8, blocks_NB.device).view(1, 2)
    low_N8 = (blocks_NB[:, 4:8, None] >> shifts).bitwise_and_(0x0F).view(num_blocks, 8)
    shifts = column((0, 2, 4, 6), torch.uint8, blocks_NB.device).view(1, 4)
    high_N8 = (blocks_NB[:, 2:4, None] >> shifts).bitwise_and_(0x03).view(num_blocks, 8)
    scales_N8 = low_N8.bitwise_or_(high_N8.bitwise_left_shift_(4)).view(torch.int8).sub_(32)
    return scales_N8.to(torch.float32).mul_(half_to_float(blocks_NB[:, :2]))


def decode_iq4_xs(blocks_NB: Tensor, out_NW: Tensor) -> None:
    num_blocks = blocks_NB.shape[0]
    scale_N8 = _iq4_xs_scales(blocks_NB)
    packed_N81L = as_int64(blocks_NB[:, 8:]).view(num_blocks, 8, 1, 2)
    quants_N82L = (packed_N81L >> _shifts(packed_N81L, 0, 4)).bitwise_and_(lanes(0x0F))
    levels_N8W = levels_of(quants_N82L.view(torch.uint8).view(num_blocks, 8, 32))
    torch.mul(levels_N8W, scale_N8.unsqueeze(-1), out=out_NW.view(num_blocks, 8, 32))
