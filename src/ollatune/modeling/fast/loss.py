"""The output head and its loss, on target positions only, in chunks, with the gradient computed on the way.

Logits of all positions are never stored: for N targets and a vocabulary of V, memory is chunk × V instead of T × V.
With a teacher (`Lesson`) the same holds for its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.native import kernels as native
from ollatune.modeling.fast.native import products as native_products
from ollatune.modeling.fast.workspace import LOGITS
from ollatune.modeling.lora import frozen_backward, frozen_forward

CHUNK_LOGITS = 16 << 20
"""Logits computed at a time; 16 Mi of fp32 is 64 MiB, of bf16 32 MiB."""


@dataclass(frozen=True)
class HeadSettings:
    """`softcap`: logits become softcap · tanh(logits / softcap) (Gemma 2); `smoothing`: label smoothing."""

    softcap: float | None = None
    smoothing: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about the same N target positions (Hinton et al. 2015).

    The loss becomes (1 - weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student), both distributions
    softened by the temperature. Where the vocabularies are padded to different sizes (unused tokens at the end), a
    teacher's surplus is left out and what it lacks has probability 0.

    Attributes:
        hidden_ND: the teacher's final hidden states; head: its output layer, frozen; softcap: of its logits.
    """

    hidden_ND: Tensor
    head: nn.Module
    softcap: float | None
    weight: float
    temperature: float

    def logits(self, part: slice, vocabulary: int) -> Tensor:
        """fp32 logits [n, vocabulary] of the positions in `part`."""
        logits_nV = frozen_forward(self.head, self.hidden_ND[part]).float()
        if self.softcap is not None:
            logits_nV = torch.tanh(logits_nV / self.softcap) * self.softcap
        missing = vocabulary - logits_nV.shape[1]
        if missing > 0:
            return nn.functional.pad(logits_nV, (0, missing), value=_IMPOSSIBLE)
        return logits_nV[:, :vocabulary]


_IMPOSSIBLE = -1e9
"""A logit of probability 0, and finite: 0 · log 0 is 0 with it."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor | None,
        head: nn.Module,
        targets_N: Tensor,
        settings: HeadSettings,
        lesson: Lesson | None,
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
        rows = _chunk_rows(hidden_ND, vocabulary)
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            chunk_nD = hidden_ND[part]
            loss, gradient_nV = _chunk_loss(
                _logits(head, chunk_nD), targets_N[part], settings,
                needs_hidden or needs_weight, lesson, part,
            )  # fmt: skip
            total += loss
            if gradient_nV is None:
                continue
            if gradient_ND is not None:
                found_nD = native_products.gradient_product(gradient_nV, head)
                gradient_ND[part] = (
                    frozen_backward(head, gradient_nV) if found_nD is None else found_nD
                )
            if gradient_VD is not None:
                gradient_VD.addmm_(gradient_nV.float().T, chunk_nD.float())
            del gradient_nV  # before the next chunk's logits
        ctx.save_for_backward(gradient_ND, gradient_VD)
        ctx.weight_dtype = weight_VD.dtype if weight_VD is not None else None
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient_ND, gradient_VD = ctx.saved_tensors
        hidden = None if gradient_ND is None else _scaled(gradient_ND, gradient)
        weight = None if gradient_VD is None else (gradient_VD * gradient).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None


def _logits(head: nn.Module, hidden_nD: Tensor) -> Tensor:
    """Valid until the next chunk's."""
    found = native_products.product(hidden_nD, head, scratch=LOGITS)
    return frozen_forward(head, hidden_nD) if found is None else found


def _chunk_rows(hidden_ND: Tensor, vocabulary: int) -> int:
    """Positions computed at a time: as many as fit, in chunks of about equal size."""
    count = hidden_ND.shape[0]
    largest = max(1, CHUNK_LOGITS // vocabulary)
    chunks = max(1, -(-count // largest))
    return max(1, -(-count // chunks))


def _scaled(tensor_ND: Tensor, factor: Tensor) -> Tensor:
    """The product in the tensor's dtype; a loss scale alone may be beyond fp16."""
    if tensor_ND.dtype == torch.float16:
        return (tensor_ND.float() * factor).to(tensor_ND.dtype)
    return tensor_ND * factor.to(tensor_ND.dtype)


def _chunk_loss(
    logits_nV: Tensor,
    targets_n: Tensor,
    settings: HeadSettings,
    needs_gradient: bool,
    lesson: Lesson | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor | None]:
    """Sum of the chunk's losses, and its gradient with respect to the head's raw output.

    `part` are the chunk's positions in `lesson`.
    """
    dtype = logits_nV.dtype
    if lesson is None and native.usable(logits_nV):
        losses_n = native.cross_entropy(
            logits_nV, targets_n, settings.softcap, settings.smoothing, needs_gradient
        )
        return losses_n.sum(), logits_nV if needs_gradient else None
    logits_nV = logits_nV.float()
    slope_nV: Tensor | None = None
    if settings.softcap is not None:
        tanh_nV = torch.tanh(logits_nV / settings.softcap)
        logits_nV = tanh_nV * settings.softcap
        slope_nV = 1 - tanh_nV.square()
    taught: tuple[Tensor, Tensor] | None = None
    if lesson is not None:  # before the logits below become their gradient
        taught = _distillation(logits_nV, lesson.logits(part, logits_nV.shape[1]), lesson)
    log_normaliser_n1 = torch.logsumexp(logits_nV, dim=1, keepdim=True)
    picked_n1 = logits_nV.gather(1, targets_n[:, None])
    smoothing = settings.smoothing
    loss_n1 = log_normaliser_n1 - (1 - smoothing) * picked_n1
    if smoothing:
        loss_n1 = loss_n1 - smoothing * logits_nV.mean(1, keepdim=True)
    loss = loss_n1.sum(dtype=torch.float64)
    if lesson is not None and taught is not None:
        loss = (1 - lesson.weight) * loss + lesson.weight * taught[0]
    if not needs_gradient:
        return loss, None
    gradient_nV = logits_nV.sub_(log_normaliser_n1).exp_()
    if smoothing:
        gradient_nV -= smoothing / gradient_nV.shape[1]
    ones = torch.full_like(picked_n1, smoothing - 1)
    gradient_nV.scatter_add_(1, targets_n[:, None], ones)
    if lesson is not None and taught is not None:
        gradient_nV.mul_(1 - lesson.weight).add_(taught[1], alpha=lesson.weight)
    if slope_nV is not None:
        gradient_nV *= slope_nV
    return loss, gradient_nV.to(dtype)


def _distillation(logits_nV: Tensor, teacher_nV: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Sum of temperature² · KL(teacher ‖ student), and its gradient with respect to the student's logits."""
    temperature = lesson.temperature
    student_nV = torch.log_softmax(logits_nV / temperature, dim=1)
    log_teacher_nV = torch.log_softmax(teacher_nV / temperature, dim=1)
    probability_nV = log_teacher_nV.exp()
    divergence = (log_teacher_nV.sub_(student_nV)).mul_(probability_nV).sum(dtype=torch.float64)
    gradient_nV = student_nV.exp_().sub_(probability_nV).mul_(temperature)
    return temperature**2 * divergence, gradient_nV


def head_loss_sum(
    hidden_ND: Tensor,
    head: nn.Module,
    targets_N: Tensor,
    settings: HeadSettings,
    lesson: Lesson | None = None,
) -> Tensor:
    """Sum over targets of the cross-entropy of `head(hidden)`: an fp32 scalar with gradient.

    Args:
        hidden_ND: final hidden states at the N positions whose next token is a target.
        head: the output layer, dense or packed; its weight gets a gradient if it requires one.
        targets_N: int64 token ids.
        lesson: a teacher's part in the loss.
    """
    weight = head.weight if isinstance(head, nn.Linear) and head.weight.requires_grad else None
    apply = cast(Any, _HeadLoss).apply
    return cast(Tensor, apply(hidden_ND, weight, head, targets_N, settings, lesson))


@torch.no_grad()
def head_evaluate(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, settings: HeadSettings
) -> tuple[float, int]:
    """Loss sum without smoothing, and how many targets are the likeliest token."""
    plain = HeadSettings(settings.softcap)
    vocabulary = cast(int, cast(Any, head).out_features)
    rows = _chunk_rows(hidden_ND, vocabulary)
    loss_sum, num_correct = 0.0, 0
    for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits_nV = _logits(head, hidden)
        loss_sum += float(_chunk_loss(logits_nV, targets, plain, False)[0])
        num_correct += int((logits_nV.argmax(1) == targets).sum())
    return loss_sum, num_correct
