"""Attention over packed rows: every segment attends to itself only, through Transformers' attention interface.

A packed row holds several examples end to end. `segment_lengths` (a list of ints that sums to T) says where they end;
the model's forward passes it through to here as a keyword argument, so that every architecture has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ATTENTION_NAME = "ollatune_segments"


def register_attention() -> str:
    """Make the attention known to Transformers; returns the name to set as `config._attn_implementation`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, segment_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    return ATTENTION_NAME


def _no_mask(*_: Any, **__: Any) -> None:
    """Segments replace the mask: building a T × T one would cost more memory than the attention itself."""
    return None


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segment_lengths: list[int] | Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment.

    Args:
        query: [1, H, T, D]; key, value: [1, G, T, D] with H a multiple of G.
        segment_lengths: lengths of the segments, sum T; None is one segment; a tensor in a compiled layer, which the
            attention interrupts.
        sliding_window: a position sees this many positions including itself.
        softcap: scores become softcap · tanh(scores / softcap).

    Returns:
        [1, T, H, D] and None (no weights).
    """
    window = sliding_window or getattr(module, "sliding_window", None)
    settings: dict[str, Any] = {
        "scaling": scaling,
        "window": window,
        "softcap": softcap,
        "dropout": dropout,
    }
    if isinstance(segment_lengths, Tensor):
        with torch._dynamo.error_on_graph_break(False):
            return _interruption["attend"](query, key, value, segment_lengths, settings), None
    if segment_lengths is None or len(segment_lengths) == 1:
        return attend(query, key, value, **settings).transpose(1, 2), None
    return _attend_segments(query, key, value, segment_lengths, settings), None


def _attend_segments(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], settings: dict[str, Any]
) -> Tensor:
    parts = (torch.split(tensor, lengths, 2) for tensor in (query, key, value))
    pieces = [attend(q, k, v, **settings) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _attend_uncompiled(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, settings: dict[str, Any]
) -> Tensor:
    """Segments are data to the compiler, not shapes: it would compile again for every number and length of them."""
    return _attend_segments(query, key, value, lengths.tolist(), settings)


_interruption: dict[str, Callable[..., Tensor]] = {"attend": _attend_uncompiled}


def interrupt_compiled_layers() -> None:
    """Keep the attention of compiled layers out of what is compiled. Loads torch's compiler, which is large."""
    _interruption["attend"] = torch.compiler.disable(_attend_uncompiled)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of one segment: query [B, H, L, D], key and value [B, G, S, D] with S ≥ L → [B, H, L, D].

    The queries are the last L of the S positions.
    """
    length, span = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    needs_window = window is not None and span > window
    if softcap is not None:
        return _capped(query, key, value, scaling, softcap, window if needs_window else None)
    mask = None
    if needs_window or (length != span and length > 1):
        mask = causal_mask(length, span, window if needs_window else None, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout,
        is_causal=mask is None and length == span, scale=scaling, enable_gqa=grouped,
    )  # fmt: skip


def causal_mask(length: int, span: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [L, S], True where query row i (the i-th of the last L positions) may see key column j."""
    rows = torch.arange(span - length, span, device=device)[:, None]
    columns = torch.arange(span, device=device)[None, :]
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    return mask


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float,
    window: int | None,
) -> Tensor:
    """Soft-capped scores (Gemma 2) have no fused kernel on CPU: plain matrix products, fp32 softmax."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    mask = causal_mask(query.shape[2], key.shape[2], window, query.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)
