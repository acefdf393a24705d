"""Encoding of the super-blocks of 256 weights: Q2_K to Q6_K.

Layouts as in ggml's `ggml-common.h`. As in ggml, every sub-block gets the scale (and minimum) that least squares finds
for the best of several roundings, errors weighted towards large weights. Unlike ggml, the quantised scales are then
moved by one step where that lowers the error of the sub-block; this costs less than ggml's finer search and gains more
(tests/parity/test_codec_parity.py holds the error to ggml's).

Tensors lie as [W, S]: weight within the sub-block, sub-block. Sums over a sub-block then run over whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ollatune.gguf.codecs.bits import float_to_half_bytes

SUPER_BLOCK = 256
_SMALLEST_NORMAL_HALF = torch.finfo(torch.float16).smallest_normal

# Offsets to the number of steps that a sub-block's range is divided into, one rounding tried for each.
_AFFINE_OFFSETS: dict[int, tuple[float, ...]] = {
    3: (-0.9, -0.6, -0.3, 0.0, 0.3),
    15: (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0),
    31: (-2.0, -1.0, 0.0, 1.0),
}
# The first wins ties, and is exact where all weights are equal.
_SYMMETRIC_OFFSETS: dict[int, tuple[float, ...]] = {
    4: (0.0, -1.0, -0.5, 0.5),
    32: (0.0, -3.0, -2.0, -1.0, 1.0),
}

# Moves of (scale, minimum), in quantised steps, tried on every sub-block.
_AFFINE_MOVES = ((-1, -1), (1, 1), (1, 0), (0, 1), (-1, 0), (0, -1))
_SYMMETRIC_MOVES = (-1, 1)


def _sub_blocks(weights_NW: Tensor, size: int) -> Tensor:
    return weights_NW.view(-1, size).t().contiguous()


def _importance(x_WS: Tensor) -> Tensor:
    """What an error counts: |x| plus the root mean square of the sub-block, as in ggml."""
    return x_WS.abs().add_(x_WS.square().mean(0).sqrt_())


def _ratio(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _to_half(values: Tensor) -> Tensor:
    """float16, to nearest; but away from zero among the few halves near zero.

    Rounded to nearest there, a scale may fall short by a third, and the largest weights be clipped.
    """
    halves = values.to(torch.float16)
    size = values.abs()
    is_short = (halves.to(torch.float32).abs() < size) & (size < _SMALLEST_NORMAL_HALF)
    return (halves.view(torch.int16) + is_short.to(torch.int16)).view(torch.float16)


def _fit_affine(x_WS: Tensor, weight_WS: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale [S] and minimum [S], both >= 0, with x ≈ scale · quant - minimum and quants 0..top."""
    high_S = x_WS.amax(0)
    low_S = x_WS.amin(0).clamp_max_(0.0)
    product_WS = weight_WS * x_WS
    sum_w, sum_x = weight_WS.sum(0), product_WS.sum(0)
    best_S, scale_S = torch.full_like(low_S, -torch.inf), torch.zeros_like(low_S)
    quant_WS, weighted_WS = torch.empty_like(x_WS), torch.empty_like(x_WS)
    for offset in _AFFINE_OFFSETS[top]:
        # From the best minimum so far, not the smallest weight: an outlier is then left behind.
        torch.sub(x_WS, low_S, out=quant_WS).mul_(_ratio(top + offset, high_S - low_S))
        quant_WS.round_().clamp_(0, top)
        torch.mul(weight_WS, quant_WS, out=weighted_WS)
        sum_l = weighted_WS.sum(0)
        sum_ll = weighted_WS.mul_(quant_WS).sum(0)
        sum_lx = quant_WS.mul_(product_WS).sum(0)
        # Least squares for x ≈ scale · quant + low. Where all quants are equal, `low` is free, and stays.
        determinant = sum_w * sum_ll - sum_l * sum_l
        low = ((sum_ll * sum_x - sum_l * sum_lx) / determinant).clamp_max_(0.0)
        low = torch.where(determinant > 0, low, low_S)
        scale = _ratio(sum_lx - low * sum_l, sum_ll)
        # The error, less the part that no choice changes, with the sign turned.
        gain = 2 * (scale * sum_lx + low * sum_x - scale * low * sum_l)
        gain -= scale.square() * sum_ll + low.square() * sum_w
        is_better = gain > best_S
        best_S = torch.where(is_better, gain, best_S)
        scale_S = torch.where(is_better, scale, scale_S)
        low_S = torch.where(is_better, low, low_S)
    return scale_S, low_S.neg_()


class _AffineGrid:
    """Scales and minima of all sub-blocks, on the grid that the super-blocks' two halves span."""

    def __init__(self, scale_S: Tensor, min_S: Tensor, num_sub: int, scale_top: int) -> None:
        largest = [values.view(-1, num_sub).amax(1) for values in (scale_S, min_S)]
        self.halves_N2 = _to_half(torch.stack(largest, dim=1).div_(scale_top))
        steps_N2 = self.halves_N2.to(torch.float32)
        self.scale_step_S = steps_N2[:, 0].repeat_interleave(num_sub)
        self.min_step_S = steps_N2[:, 1].repeat_interleave(num_sub)
        self.scale_top = scale_top
        # A scale of 0 would keep the minimum alone; 1 can do that too.
        self.scale_S = _ratio(scale_S, self.scale_step_S).round_().clamp_(1, scale_top)
        self.min_S = _ratio(min_S, self.min_step_S).round_().clamp_(0, scale_top)

    def moved(self, by_scale: int, by_min: int) -> tuple[Tensor, Tensor]:
        scale_S = (self.scale_S + by_scale).clamp_(1, self.scale_top)
        return scale_S, (self.min_S + by_min).clamp_(0, self.scale_top)


def _affine_error(
    x_WS: Tensor, weight_WS: Tensor, scale_S: Tensor, min_S: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Quants [W, S] of x ≈ scale · quant - minimum, and the weighted error [S] of each sub-block."""
    exact_WS = (x_WS + min_S).mul_(_ratio(1.0, scale_S))
    quant_WS = exact_WS.round().clamp_(0, top)
    error_S = exact_WS.sub_(quant_WS).square_().mul_(weight_WS).sum(0)
    return quant_WS, error_S.mul_(scale_S.square())


def _encode_affine(
    weights_NW: Tensor, size: int, top: int, scale_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halves [N, 2] as bytes, scales and minima uint8 [N, 256 / size], quants uint8 [N, 256]."""
    num_sub = SUPER_BLOCK // size
    x_WS = _sub_blocks(weights_NW, size)
    weight_WS = _importance(x_WS)
    grid = _AffineGrid(*_fit_affine(x_WS, weight_WS, top), num_sub, scale_top)
    best_S = torch.full_like(grid.scale_S, torch.inf)
    scale_S, min_S = grid.scale_S, grid.min_S
    for move in ((0, 0), *_AFFINE_MOVES):
        scale, minimum = grid.moved(*move)
        _, error_S = _affine_error(
            x_WS, weight_WS, scale * grid.scale_step_S, minimum * grid.min_step_S, top
        )
        is_better = error_S < best_S
        best_S = torch.where(is_better, error_S, best_S)
        scale_S = torch.where(is_better, scale, scale_S)
        min_S = torch.where(is_better, minimum, min_S)
    quant_WS, _ = _affine_error(
        x_WS, weight_WS, scale_S * grid.scale_step_S, min_S * grid.min_step_S, top
    )
    return (
        float_to_half_bytes(grid.halves_N2),
        scale_S.to(torch.uint8).view(-1, num_sub),
        min_S.to(torch.uint8).view(-1, num_sub),
        quant_WS.to(torch.uint8).t().contiguous().view(-1, SUPER_BLOCK),
    )


def _fit_symmetric(x_WS: Tensor, weight_WS: Tensor, levels: int) -> Tensor:
    """Scale [S], of either sign, with x ≈ scale · quant and quants -levels..levels - 1."""
    high_S, low_S = x_WS.amax(0), x_WS.amin(0)
    extreme_S = torch.where(high_S >= -low_S, high_S, low_S)
    product_WS = weight_WS * x_WS
    best_S, scale_S = torch.zeros_like(high_S), torch.zeros_like(high_S)
    quant_WS = torch.empty_like(x_WS)
    for offset in _SYMMETRIC_OFFSETS[levels]:
        torch.mul(x_WS, _ratio(-(levels + offset), extreme_S), out=quant_WS)
        quant_WS.round_().clamp_(-levels, levels - 1)
        sum_lx = torch.mul(product_WS, quant_WS).sum(0)
        sum_ll = (weight_WS * quant_WS).mul_(quant_WS).sum(0)
        scale = _ratio(sum_lx, sum_ll)
        gain = scale * sum_lx
        is_better = gain > best_S
        best_S = torch.where(is_better, gain, best_S)
        scale_S = torch.where(is_better, scale, scale_S)
    return scale_S


def _symmetric_error(
    x_WS: Tensor, weight_WS: Tensor, scale_S: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Quants [W, S] of x ≈ scale · quant, and the weighted error [S] of each sub-block."""
    exact_WS = x_WS * _ratio(1.0, scale_S)
    quant_WS = exact_WS.round().clamp_(-levels, levels - 1)
    error_S = exact_WS.sub_(quant_WS).square_().mul_(weight_WS).sum(0)
    # A scale of 0 keeps nothing; its error is no smaller than any other scale's.
    return quant_WS, torch.where(scale_S == 0, torch.inf, error_S.mul_(scale_S.square()))


def _encode_symmetric(
    weights_NW: Tensor, levels: int, scale_levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Half [N, 1] as bytes, scales int8 [N, 16], quants plus `levels` as uint8 [N, 256]."""
    num_sub = 16
    x_WS = _sub_blocks(weights_NW, SUPER_BLOCK // num_sub)
    weight_WS = _importance(x_WS)
    fitted_NS = _fit_symmetric(x_WS, weight_WS, levels).view(-1, num_sub)
    furthest_N1 = fitted_NS.gather(1, fitted_NS.abs().argmax(1, keepdim=True))
    # The largest scale becomes -scale_levels: the negative side reaches one step further.
    half_N1 = _to_half(furthest_N1 / -scale_levels)
    step_S = half_N1.to(torch.float32).expand(-1, num_sub).reshape(-1)
    start_S = _ratio(fitted_NS.reshape(-1), step_S).round_()
    best_S = torch.full_like(start_S, torch.inf)
    scale_S = start_S.clamp(-scale_levels, scale_levels - 1)
    for move in (0, *_SYMMETRIC_MOVES):
        scale = (start_S + move).clamp_(-scale_levels, scale_levels - 1)
        _, error_S = _symmetric_error(x_WS, weight_WS, scale * step_S, levels)
        is_better = error_S < best_S
        best_S = torch.where(is_better, error_S, best_S)
        scale_S = torch.where(is_better, scale, scale_S)
    quant_WS, _ = _symmetric_error(x_WS, weight_WS, scale_S * step_S, levels)
    return (
        float_to_half_bytes(half_N1),
        scale_S.to(torch.int8).view(-1, num_sub),
        quant_WS.add_(levels).to(torch.uint8).t().contiguous().view(-1, SUPER_BLOCK),
    )


def _merge_bits(parts: Iterable[Tensor], shifts: Sequence[int]) -> Tensor:
    """uint8: the parts, each shifted left by its number of bits, in one byte."""
    merged: Tensor | None = None
    for part, shift in zip(parts, shifts, strict=True):
        moved = part << shift
        merged = moved if merged is None else merged.bitwise_or_(moved)
    assert merged is not None
    return merged


def _pack_6bit_pairs(scale_N8: Tensor, min_N8: Tensor) -> Tensor:
    """uint8 [N, 12]: the 6-bit scales and minima of Q4_K and Q5_K (see `k_decode`)."""
    first = [_merge_bits((part[:, :4], part[:, 4:] >> 4), (0, 6)) for part in (scale_N8, min_N8)]
    low = _merge_bits((scale_N8[:, 4:] & 0x0F, min_N8[:, 4:]), (0, 4))
    return torch.cat([*first, low], dim=1)


def encode_q4_k(weights_NW: Tensor) -> Tensor:
    halves, scale_N8, min_N8, quant_NW = _encode_affine(weights_NW, 32, top=15, scale_top=63)
    nibbles = _merge_bits(quant_NW.view(-1, 4, 2, 32).unbind(2), (0, 4)).flatten(1)
    return torch.cat([halves, _pack_6bit_pairs(scale_N8, min_N8), nibbles], dim=1)


def encode_q5_k(weights_NW: Tensor) -> Tensor:
    halves, scale_N8, min_N8, quant_NW = _encode_affine(weights_NW, 32, top=31, scale_top=63)
    fifth = _merge_bits((quant_NW >> 4).view(-1, 8, 32).unbind(1), range(8))
    nibbles = _merge_bits((quant_NW & 0x0F).view(-1, 4, 2, 32).unbind(2), (0, 4)).flatten(1)
    return torch.cat([halves, _pack_6bit_pairs(scale_N8, min_N8), fifth, nibbles], dim=1)


def encode_q2_k(weights_NW: Tensor) -> Tensor:
    halves, scale_NS, min_NS, quant_NW = _encode_affine(weights_NW, 16, top=3, scale_top=15)
    pairs = _merge_bits(quant_NW.view(-1, 2, 4, 32).unbind(2), (0, 2, 4, 6)).flatten(1)
    return torch.cat([_merge_bits((scale_NS, min_NS), (0, 4)), pairs, halves], dim=1)


def encode_q6_k(weights_NW: Tensor) -> Tensor:
    half, scale_NS, quant_NW = _encode_symmetric(weights_NW, levels=32, scale_levels=128)
    nibbles = _merge_bits((quant_NW & 0x0F).view(-1, 2, 2, 64).unbind(2), (0, 4)).flatten(1)
    upper = (quant_NW >> 4).view(-1, 2, 4, 32).unbind(2)
    pairs = _merge_bits(upper, (0, 2, 4, 6)).flatten(1)
    return torch.cat([nibbles, pairs, scale_NS.view(torch.uint8), half], dim=1)


def encode_q3_k(weights_NW: Tensor) -> Tensor:
    half, scale_NS, quant_NW = _encode_symmetric(weights_NW, levels=4, scale_levels=32)
    scale_NS = scale_NS.add_(32).view(torch.uint8)
    low_scales = _merge_bits((scale_NS[:, :8] & 0x0F, scale_NS[:, 8:]), (0, 4))
    high_scales = _merge_bits((scale_NS >> 4).view(-1, 4, 4).unbind(1), (0, 2, 4, 6))
    third = _merge_bits((quant_NW >> 2).view(-1, 8, 32).unbind(1), range(8))
    low = (quant_NW & 0x03).view(-1, 2, 4, 32).unbind(2)
    pairs = _merge_bits(low, (0, 2, 4, 6)).flatten(1)
    return torch.cat([third, pairs, low_scales, high_scales, half], dim=1)
