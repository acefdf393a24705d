"""Encoding of the blocks of 32 weights: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Bit-identical to ggml's reference quantisers and to `gguf.quants.quantize` (tests/unit/test_codecs.py).
An encoder takes `weights_NW` (float32, one block a row) and returns uint8 blocks, one a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import float_to_half_bytes

_BELOW_HALF = torch.tensor(0.49999997)


def _inverse(step_N1: Tensor) -> Tensor:
    return torch.where(step_N1 == 0, 0.0, step_N1.reciprocal())


def encode_q8_0(weights_NW: Tensor) -> Tensor:
    largest_N1 = weights_NW.amax(1, keepdim=True).abs_()
    step_N1 = torch.maximum(largest_N1, weights_NW.amin(1, keepdim=True).abs_()).div_(127)
    scaled_NW = weights_NW * _inverse(step_N1)
    # Halves go away from zero, as by C's roundf: the largest float below a half is added, and the rest cut off.
    scaled_NW.add_(torch.copysign(_BELOW_HALF, scaled_NW))
    blocks_NB = torch.empty(scaled_NW.shape[0], 34, dtype=torch.uint8, device=scaled_NW.device)
    blocks_NB[:, :2] = float_to_half_bytes(step_N1)
    blocks_NB[:, 2:].view(torch.int8).copy_(scaled_NW)
    return blocks_NB


def _symmetric(weights_NW: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Step [N, 1] and quants: the weight furthest from zero, sign and all, becomes level 0."""
    furthest_N1 = weights_NW.gather(1, weights_NW.abs().argmax(1, keepdim=True))
    step_N1 = furthest_N1 / -(num_levels // 2)
    scaled_NW = (weights_NW * _inverse(step_N1)).add_(num_levels // 2 + 0.5)
    return step_N1, scaled_NW.clamp_max_(num_levels - 1).to(torch.uint8)


def _affine(weights_NW: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step [N, 1], minimum [N, 1] and quants: the range of the block in equal steps."""
    min_N1 = weights_NW.amin(1, keepdim=True)
    step_N1 = (weights_NW.amax(1, keepdim=True) - min_N1) / (num_levels - 1)
    scaled_NW = (weights_NW - min_N1).mul_(_inverse(step_N1)).add_(0.5)
    return step_N1, min_N1, scaled_NW.clamp_max_(num_levels - 1).to(torch.uint8)


def _pack_nibbles(quants_NW: Tensor) -> Tensor:
    return (quants_NW[:, :16] & 0x0F).bitwise_or_(quants_NW[:, 16:] << 4)


def _pack_fifth_bits(quants_NW: Tensor) -> Tensor:
    """uint8 [N, 4]: bit 4 of every quant, weight 0 in the lowest bit."""
    places_8 = torch.arange(8, dtype=torch.uint8, device=quants_NW.device)
    bits_N48 = (quants_NW >> 4).view(-1, 4, 8) << places_8
    return bits_N48.sum(dim=2, dtype=torch.uint8)


def encode_q4_0(weights_NW: Tensor) -> Tensor:
    step_N1, quants_NW = _symmetric(weights_NW, 16)
    return torch.cat([float_to_half_bytes(step_N1), _pack_nibbles(quants_NW)], dim=1)


def encode_q4_1(weights_NW: Tensor) -> Tensor:
    step_N1, min_N1, quants_NW = _affine(weights_NW, 16)
    header_N4 = float_to_half_bytes(torch.cat([step_N1, min_N1], dim=1))
    return torch.cat([header_N4, _pack_nibbles(quants_NW)], dim=1)


def encode_q5_0(weights_NW: Tensor) -> Tensor:
    step_N1, quants_NW = _symmetric(weights_NW, 32)
    header_N2 = float_to_half_bytes(step_N1)
    return torch.cat([header_N2, _pack_fifth_bits(quants_NW), _pack_nibbles(quants_NW)], dim=1)


def encode_q5_1(weights_NW: Tensor) -> Tensor:
    step_N1, min_N1, quants_NW = _affine(weights_NW, 32)
    header_N4 = float_to_half_bytes(torch.cat([step_N1, min_N1], dim=1))
    return torch.cat([header_N4, _pack_fifth_bits(quants_NW), _pack_nibbles(quants_NW)], dim=1)
