"""The halves of a decoder layer as autograd functions that keep little: norm + projections, and the gated MLP.

What can be computed again cheaply (the normalised input, the activated product) is; what is kept is the layer's
input, its inverse norm, the projections' outputs where attention or the activation need them, and A x of the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.linear_group import (
    Kept,
    LinearGroup,
    gated_group_backward,
    group_backward,
    group_forward,
    joined,
    split_gate_up,
)
from ollatune.modeling.fast.native import kernels as native

_BEHIND_THE_NORM = "gradient of the normalised input"
"""Scratch: its reader is the same backward pass."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x²) + epsilon) · (weight + offset); offset is 1 for Gemma."""

    weight_D: Tensor
    epsilon: float
    offset: float = 0.0

    @cached_property
    def gain_D(self) -> Tensor:
        """The factor of each feature, in fp32; the weight is frozen, so it is computed once."""
        return self.weight_D.float() + self.offset if self.offset else self.weight_D.float()


def norm_forward(norm: Norm, inputs_TD: Tensor, *, is_inner: bool = True) -> tuple[Tensor, Tensor]:
    """The normalised input and 1 / root mean square [T, 1] in fp32; the former is scratch if `is_inner`."""
    if native.usable(inputs_TD):
        scratch = native.NORMED if is_inner else None
        return native.norm_forward(inputs_TD, norm.gain_D, norm.epsilon, scratch=scratch)
    values = inputs_TD.float()
    inverse_T1 = values.square().mean(-1, keepdim=True).add_(norm.epsilon).rsqrt_()
    return _normed(norm, inputs_TD, inverse_T1), inverse_T1


def norm_backward(
    norm: Norm,
    gradient_TD: Tensor,
    inputs_TD: Tensor,
    inverse_T1: Tensor,
    residual_TD: Tensor | None = None,
    *,
    scratch: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of `norm_forward` with respect to its input (the weight is frozen), and its value again.

    Args:
        residual_TD: what the input got from where it went besides the norm, added.
        scratch: where the gradient may be, if it is read before another of that name is made.
    """
    if native.usable(gradient_TD, inputs_TD):
        return native.norm_backward(
            gradient_TD, inputs_TD, inverse_T1, norm.gain_D, residual_TD, scratch=scratch
        )
    gained = gradient_TD.float() * norm.gain_D
    values = inputs_TD.float()
    mean_T1 = (gained * values).mean(-1, keepdim=True).mul_(inverse_T1.square())
    gradient = gained.addcmul_(values, mean_T1, value=-1).mul_(inverse_T1).to(inputs_TD.dtype)
    if residual_TD is not None:
        gradient += residual_TD
    return gradient, _normed(norm, inputs_TD, inverse_T1)


def _normed(norm: Norm, inputs_TD: Tensor, inverse_T1: Tensor) -> Tensor:
    return (inputs_TD.float() * inverse_T1).mul_(norm.gain_D).to(inputs_TD.dtype)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, norm: Norm) -> Tensor:
        output, inverse = norm_forward(norm, inputs, is_inner=False)
        ctx.save_for_backward(inputs, inverse)
        ctx.norm = norm
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, inverse = ctx.saved_tensors
        return norm_backward(ctx.norm, gradient, inputs, inverse)[0], None


def rms_norm(inputs: Tensor, norm: Norm) -> Tensor:
    """RMSNorm over the last dimension, keeping its input only."""
    return cast(Tensor, cast(Any, _NormFunction).apply(inputs, norm))


class _Projections(torch.autograd.Function):
    """Optional norm, then a group of linear layers. With a norm the input is the last output.

    What it gets back from where it goes on is then added while the norm's gradient is in registers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs_TD: Tensor,
        residual_TO: Tensor | None,
        norm: Norm | None,
        group: LinearGroup,
        scratch: str | None,
        *_: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        if norm is None:
            normed_TD, inverse = inputs_TD, None
        else:
            normed_TD, inverse = norm_forward(norm, inputs_TD)
        result = group_forward(group, normed_TD, residual_TO=residual_TO)
        ctx.save_for_backward(inputs_TD, inverse, *result.kept.tensors)
        ctx.norm, ctx.group, ctx.settings, ctx.scratch = norm, group, result.kept.settings, scratch
        return tuple(result.outputs_TO) if norm is None else (*result.outputs_TO, inputs_TD)

    @staticmethod
    def backward(ctx: Any, *gradients_TO: Tensor) -> Any:
        inputs_TD, inverse, *tensors = ctx.saved_tensors
        norm: Norm | None = ctx.norm
        passed_TD: Tensor | None = None
        if norm is not None:
            *gradients_TO, passed_TD = gradients_TO  # type: ignore[assignment]
        kept = Kept((tensors[0], tensors[1]), ctx.settings)
        gradient_TD, parameters = group_backward(
            ctx.group, gradients_TO, kept,
            needs_input=ctx.needs_input_grad[0],
            scratch=ctx.scratch if norm is None else _BEHIND_THE_NORM,
        )  # fmt: skip
        residual = gradients_TO[0] if ctx.needs_input_grad[1] else None
        if norm is None:
            return gradient_TD, residual, None, None, None, *parameters(inputs_TD)
        if gradient_TD is None:
            normed_TD = _normed(norm, inputs_TD, inverse)
            return None, residual, None, None, None, *parameters(normed_TD)
        d_inputs_TD, normed_TD = norm_backward(
            norm, gradient_TD, inputs_TD, inverse, passed_TD, scratch=ctx.scratch
        )
        return d_inputs_TD, residual, None, None, None, *parameters(normed_TD)


def projections(
    inputs_TD: Tensor,
    norm: Norm | None,
    group: LinearGroup,
    *,
    residual_TO: Tensor | None = None,
    scratch: str | None = None,
) -> tuple[Tensor, ...]:
    """The group's outputs for the (normalised) input, one [T, O] each; `residual_TO` is added to that of one layer.

    With a norm, the input [T, D] comes after them, to be used from here on: its gradient is then one sum.
    `scratch`: where the gradient of the input may be (`workspace.scratch_empty`), if nobody keeps it.
    """
    result = cast(Any, _Projections).apply(
        inputs_TD, residual_TO, norm, group, scratch, *group.parameters
    )
    return cast("tuple[Tensor, ...]", result)


class _GatedMLP(torch.autograd.Function):
    """down(activation(gate(x)) · up(x)) of the normalised input; the activated product is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs_TD: Tensor,
        norm: Norm,
        gate_up: LinearGroup,
        down: LinearGroup,
        activation: str,
        add_inputs: bool,
        scratch: str | None,
        *_: nn.Parameter,
    ) -> Tensor:
        normed_TD, inverse = norm_forward(norm, inputs_TD)
        inner = group_forward(gate_up, normed_TD, activation=activation)
        gate_TF, up_TF = split_gate_up(inner.outputs_TO)
        assert inner.product_TF is not None
        outer = group_forward(down, inner.product_TF, residual_TO=inputs_TD if add_inputs else None)
        ctx.save_for_backward(
            inputs_TD, inverse, gate_TF, up_TF, *inner.kept.tensors, *outer.kept.tensors
        )
        ctx.norm, ctx.gate_up, ctx.down = norm, gate_up, down
        ctx.activation, ctx.add_inputs, ctx.scratch = activation, add_inputs, scratch
        ctx.settings = (inner.kept.settings, outer.kept.settings)
        return outer.outputs_TO[0]

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> Any:
        inputs_TD, inverse, gate_TF, up_TF, low_in, more_in, low_out, more_out = ctx.saved_tensors
        gradients, product_TF, down_parameters = gated_group_backward(
            ctx.down,
            gradient_TD,
            Kept((low_out, more_out), ctx.settings[1]),
            (gate_TF, up_TF),
            ctx.activation,
        )
        d_normed, in_parameters = group_backward(
            ctx.gate_up,
            (joined(gradients),) if len(ctx.gate_up.layers) == 1 else gradients,
            Kept((low_in, more_in), ctx.settings[0]),
            needs_input=True,
            scratch=_BEHIND_THE_NORM,
        )
        assert d_normed is not None
        d_inputs, normed_TD = norm_backward(
            ctx.norm, d_normed, inputs_TD, inverse, gradient_TD if ctx.add_inputs else None,
            scratch=ctx.scratch,
        )  # fmt: skip
        parameters = (*in_parameters(normed_TD), *down_parameters(product_TF))
        return d_inputs, None, None, None, None, None, None, *parameters


def gated_mlp(
    inputs_TD: Tensor,
    norm: Norm,
    gate_up: LinearGroup,
    down: LinearGroup,
    activation: str,
    *,
    add_inputs: bool = False,
    scratch: str | None = None,
) -> Tensor:
    """The MLP's output for the residual stream `inputs_TD` [T, D], added to it if asked for.

    `scratch` as in `projections`.
    """
    parameters = (*gate_up.parameters, *down.parameters)
    result = cast(Any, _GatedMLP).apply(
        inputs_TD, norm, gate_up, down, activation, add_inputs, scratch, *parameters
    )
    return cast(Tensor, result)
