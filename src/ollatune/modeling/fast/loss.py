"""The output head and its loss, on target positions only, in chunks, with the gradient computed on the way.

Logits of all positions are never stored: for N targets and a vocabulary of V, memory is chunk × V instead of T × V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.modeling.lora import frozen_backward, frozen_forward

CHUNK_LOGITS = 16 << 20
"""Logits computed at a time; 16 Mi of fp32 is 64 MiB."""


@dataclass(frozen=True)
class HeadSettings:
    """`softcap`: logits become softcap · tanh(logits / softcap) (Gemma 2); `smoothing`: label smoothing."""

    softcap: float | None = None
    smoothing: float = 0.0


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor | None,
        head: nn.Module,
        targets_N: Tensor,
        settings: HeadSettings,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        gradient_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        gradient_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32)
            if needs_weight and weight_VD is not None
            else None
        )
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        vocabulary = cast(int, cast(Any, head).out_features)
        rows = max(1, CHUNK_LOGITS // vocabulary)
        for start in range(0, hidden_ND.shape[0], rows):
            chunk_nD = hidden_ND[start : start + rows]
            loss, gradient_nV = _chunk_loss(
                frozen_forward(head, chunk_nD), targets_N[start : start + rows], settings,
                needs_hidden or needs_weight,
            )  # fmt: skip
            total += loss
            if gradient_nV is None:
                continue
            if gradient_ND is not None:
                gradient_ND[start : start + rows] = frozen_backward(head, gradient_nV)
            if gradient_VD is not None:
                gradient_VD.addmm_(gradient_nV.float().T, chunk_nD.float())
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.weight_dtype = weight_VD.dtype if weight_VD is not None else None
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient_ND, gradient_VD = ctx.saved_tensors
        hidden = None if gradient_ND is None else gradient_ND * gradient.to(gradient_ND.dtype)
        weight = None if gradient_VD is None else (gradient_VD * gradient).to(ctx.weight_dtype)
        return hidden, weight, None, None, None


def _chunk_loss(
    logits_nV: Tensor, targets_n: Tensor, settings: HeadSettings, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the chunk's losses, and its gradient with respect to the head's raw output."""
    dtype = logits_nV.dtype
    logits_nV = logits_nV.float()
    slope_nV: Tensor | None = None
    if settings.softcap is not None:
        tanh_nV = torch.tanh(logits_nV / settings.softcap)
        logits_nV = tanh_nV * settings.softcap
        slope_nV = 1 - tanh_nV.square()
    log_normaliser_n1 = torch.logsumexp(logits_nV, dim=1, keepdim=True)
    picked_n1 = logits_nV.gather(1, targets_n[:, None])
    smoothing = settings.smoothing
    loss_n1 = log_normaliser_n1 - (1 - smoothing) * picked_n1
    if smoothing:
        loss_n1 = loss_n1 - smoothing * logits_nV.mean(1, keepdim=True)
    loss = loss_n1.sum(dtype=torch.float64)
    if not needs_gradient:
        return loss, None
    gradient_nV = logits_nV.sub_(log_normaliser_n1).exp_()
    if smoothing:
        gradient_nV -= smoothing / gradient_nV.shape[1]
    ones = torch.full_like(picked_n1, smoothing - 1)
    gradient_nV.scatter_add_(1, targets_n[:, None], ones)
    if slope_nV is not None:
        gradient_nV *= slope_nV
    return loss, gradient_nV.to(dtype)


def head_loss_sum(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, settings: HeadSettings
) -> Tensor:
    """Sum over targets of the cross-entropy of `head(hidden)`: an fp32 scalar with gradient.

    Args:
        hidden_ND: final hidden states at the N positions whose next token is a target.
        head: the output layer, dense or packed; its weight gets a gradient if it requires one.
        targets_N: int64 token ids.
    """
    weight = head.weight if isinstance(head, nn.Linear) and head.weight.requires_grad else None
    return cast(Tensor, cast(Any, _HeadLoss).apply(hidden_ND, weight, head, targets_N, settings))


@torch.no_grad()
def head_evaluate(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, settings: HeadSettings
) -> tuple[float, int]:
    """Loss sum without smoothing, and how many targets are the likeliest token."""
    plain = HeadSettings(settings.softcap)
    rows = max(1, CHUNK_LOGITS // cast(int, cast(Any, head).out_features))
    loss_sum, num_correct = 0.0, 0
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits_nV = frozen_forward(head, hidden)
        loss_sum += float(_chunk_loss(logits_nV, targets, plain, False)[0])
        num_correct += int((logits_nV.argmax(1) == targets).sum())
    return loss_sum, num_correct
