"""Attention over trees of segments with memory linear in the row: one autograd function.

Query heads that share a key head are stacked, so that a group is one matrix product of (H/G · rows) × keys. Weights
are computed again in the backward pass; nothing of size rows × keys is kept.

Shapes: T tokens, H query heads, G key heads, R = H/G, D head size, L rows of a block, K keys it sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ollatune.modeling.fast.attention import causal_mask
from ollatune.modeling.fast.native import kernels as native
from ollatune.modeling.fast.segments import Segment, SegmentTable

_BLOCK_ROWS = 96
"""Most rows of a block: few enough to skip much of the masked half, enough for a matrix product to be efficient."""


@dataclass(frozen=True)
class AttentionShape:
    """Heads and scores of one layer. `window`: tokens a position sees; `softcap`: see Gemma 2."""

    num_heads: int
    num_groups: int
    head_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class _Block:
    """Rows [start, start + length) of the row, and the key ranges they see; the last range holds the rows."""

    start: int
    length: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def num_keys(self) -> int:
        return sum(length for _, length in self.ranges)


def _blocks(segments: list[Segment]) -> list[_Block]:
    blocks = []
    for segment in segments:
        rows = -(-segment.length // -(-segment.length // _BLOCK_ROWS))  # blocks of about equal size
        for offset in range(0, segment.length, rows):
            length = min(rows, segment.length - offset)
            own = (segment.start, offset + length)
            blocks.append(_Block(segment.start + offset, length, (*segment.ancestors, own)))
    return blocks


class _NativeTreeAttention(torch.autograd.Function):
    """The compiled kernels. Rotates its inputs in place: they are the projections' outputs, which nobody else reads."""

    @staticmethod
    def forward(
        ctx: Any,
        query_TO: Tensor,
        key_TO: Tensor,
        value_TO: Tensor,
        rotary: tuple[Tensor, Tensor],
        table: SegmentTable,
        shape: AttentionShape,
    ) -> Tensor:
        native.rotate(query_TO, key_TO, shape.head_size, rotary, sign=1.0, scale=shape.scale)
        output_TO, normalisers_HT = _native_call(query_TO, key_TO, value_TO, table, shape).forward()
        ctx.save_for_backward(query_TO, key_TO, value_TO, output_TO, normalisers_HT, *rotary)
        ctx.table, ctx.shape = table, shape
        return output_TO

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> Any:
        query, key, value, output, normalisers, cosine, sine = ctx.saved_tensors
        shape: AttentionShape = ctx.shape
        call = _native_call(query, key, value, ctx.table, shape)
        d_query, d_key, d_value = call.backward(gradient_TO, output, normalisers)
        rotary = (cosine, sine)
        native.rotate(d_query, d_key, shape.head_size, rotary, sign=-1.0, scale=shape.scale)
        return d_query, d_key, d_value, None, None, None


def _native_call(
    query_TO: Tensor, key_TO: Tensor, value_TO: Tensor, table: SegmentTable, shape: AttentionShape
) -> native.AttentionCall:
    return native.AttentionCall(
        query_TO, key_TO, value_TO, table, shape.head_size,
        window=shape.window, softcap=shape.softcap,
    )  # fmt: skip


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TO: Tensor,
        key_TO: Tensor,
        value_TO: Tensor,
        rotary: tuple[Tensor, Tensor],
        segments: list[Segment],
        shape: AttentionShape,
    ) -> Tensor:
        # Scaling the queries once is cheaper than scaling the scores, here and in the backward pass.
        query_GRTD = _rotated(_grouped(query_TO, shape.num_groups, shape), rotary).mul_(shape.scale)
        key_GTD = _rotated(_grouped(key_TO, shape.num_groups, shape), rotary)[:, 0]
        value_GTD = _grouped(value_TO, shape.num_groups, shape)[:, 0]
        output_GRTD = torch.empty_like(query_GRTD)
        for block in _blocks(segments):
            rows = slice(block.start, block.start + block.length)
            query_GMD, keys_GKD = _stacked(query_GRTD[:, :, rows]), _gather(key_GTD, block)
            weights_GMK, _ = _weights(query_GMD, keys_GKD, block, shape)
            product_GMD = torch.bmm(weights_GMK.to(keys_GKD.dtype), _gather(value_GTD, block))
            output_GRTD[:, :, rows] = product_GMD.view(*output_GRTD.shape[:2], block.length, -1)
        ctx.save_for_backward(query_GRTD, key_GTD, value_GTD, *rotary)
        ctx.segments, ctx.shape = segments, shape
        return _ungrouped(output_GRTD)

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> Any:
        query, key, value, cosine, sine = ctx.saved_tensors
        shape: AttentionShape = ctx.shape
        gradient_GRTD = _grouped(gradient_TO, shape.num_groups, shape)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in _blocks(ctx.segments):
            rows = slice(block.start, block.start + block.length)
            keys_GKD, values_GKD = _gather(key, block), _gather(value, block)
            query_GMD = _stacked(query[:, :, rows])
            d_out_GMD = _stacked(gradient_GRTD[:, :, rows])
            weights_GMK, slope = _weights(query_GMD, keys_GKD, block, shape)
            rounded = weights_GMK.to(keys_GKD.dtype)
            _scatter_add(d_value, rounded.transpose(1, 2), d_out_GMD, block)
            d_weights = torch.bmm(d_out_GMD, values_GKD.transpose(1, 2)).float()
            d_scores = torch._softmax_backward_data(d_weights, weights_GMK, -1, torch.float32)
            if slope is not None:
                d_scores = d_scores.mul_(slope)
            d_scores = d_scores.to(keys_GKD.dtype)
            product_GMD = torch.bmm(d_scores, keys_GKD)
            d_query[:, :, rows] = product_GMD.view(*d_query.shape[:2], block.length, -1)
            _scatter_add(d_key, d_scores.transpose(1, 2), query_GMD, block)
        back = (cosine, -sine)
        return (
            _ungrouped(_rotated(d_query.mul_(shape.scale), back)),
            _ungrouped(_rotated(d_key[:, None], back)),
            _ungrouped(d_value[:, None]),
            None,
            None,
            None,
        )


def _grouped(tensor_TO: Tensor, num_groups: int, shape: AttentionShape) -> Tensor:
    """[T, G·R·D] → [G, R, T, D], contiguous, always a copy: of a single token it would be a view otherwise."""
    length = tensor_TO.shape[0]
    grouped = tensor_TO.view(length, num_groups, -1, shape.head_size).permute(1, 2, 0, 3)
    return grouped.clone(memory_format=torch.contiguous_format)


def _ungrouped(tensor_GRTD: Tensor) -> Tensor:
    """[G, R, T, D] → [T, G·R·D], contiguous."""
    return tensor_GRTD.permute(2, 0, 1, 3).reshape(tensor_GRTD.shape[2], -1)


def _rotated(tensor_GRTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in place: halves of the rotated part are the two coordinates (Su et al. 2021)."""
    cosine_Th, sine_Th = rotary
    half = cosine_Th.shape[-1]
    first, second = tensor_GRTD[..., :half], tensor_GRTD[..., half : 2 * half]
    turned = second * cosine_Th
    turned.addcmul_(first, sine_Th)
    first.mul_(cosine_Th).addcmul_(second, sine_Th, value=-1)
    second.copy_(turned)
    return tensor_GRTD


def _gather(tensor_GTD: Tensor, block: _Block) -> Tensor:
    """The tokens the block sees: [G, K, D]; a view where they are one range."""
    parts = [tensor_GTD[:, start : start + length] for start, length in block.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _scatter_add(target_GTD: Tensor, left_GKM: Tensor, right_GMD: Tensor, block: _Block) -> None:
    """Add left · right to the tokens the block sees, each range where it lies."""
    offset = 0
    for start, length in block.ranges:
        target_GTD[:, start : start + length].baddbmm_(
            left_GKM[:, offset : offset + length], right_GMD
        )
        offset += length


def _stacked(tensor_GRLD: Tensor) -> Tensor:
    """The heads of a group on top of each other: [G, R·L, D]."""
    groups, repeats, length, size = tensor_GRLD.shape
    return tensor_GRLD.reshape(groups, repeats * length, size)


def _weights(
    query_GMD: Tensor, keys_GKD: Tensor, block: _Block, shape: AttentionShape
) -> tuple[Tensor, Tensor | None]:
    """Attention weights in fp32 [G, R·L, K], and the soft cap's slope where there is one."""
    scores = torch.bmm(query_GMD, keys_GKD.transpose(1, 2)).float()
    slope: Tensor | None = None
    if shape.softcap is not None:
        scores = scores.div_(shape.softcap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(shape.softcap)
    length, keys = block.length, block.num_keys
    by_head = scores.view(scores.shape[0], -1, length, keys)
    if shape.window is not None and keys > shape.window:
        unseen = ~causal_mask(length, keys, shape.window, scores.device)
        by_head.masked_fill_(unseen, -math.inf)
    elif length > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        by_head[..., keys - length :].masked_fill_(future, -math.inf)
    return torch.softmax(scores, dim=-1), slope


def tree_attention(
    query_TO: Tensor,
    key_TO: Tensor,
    value_TO: Tensor,
    rotary: tuple[Tensor, Tensor],
    table: SegmentTable,
    shape: AttentionShape,
) -> Tensor:
    """Rotate queries and keys, attend along the tree: [T, H·D].

    Args:
        query_TO: [T, H·D]; key_TO, value_TO: [T, G·D], before rotation; they may be changed in place.
        rotary: cosine and sine [T, half] for half of the rotated part of a head, in fp32.
        table: of the segments that cover the T tokens.
    """
    if native.attention_fits(shape.head_size, (query_TO, key_TO, value_TO)):
        function, segments = cast(Any, _NativeTreeAttention), cast(Any, table)
    else:
        function, segments = cast(Any, _TreeAttention), table.segments
        rotary = (rotary[0].to(query_TO.dtype), rotary[1].to(query_TO.dtype))
    return cast(Tensor, function.apply(query_TO, key_TO, value_TO, rotary, segments, shape))
