"""Linear layers that read the same input - query, key, value; gate and up - computed together, forward and backward.

The input is kept once for all of them, and nothing for the frozen weights. These are plain functions; the autograd
functions around them are in `blocks.py`.

Shapes: T positions, I inputs, O outputs of one layer, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollatune.modeling.fast.native import kernels as native
from ollatune.modeling.fast.native import linear as native_linear
from ollatune.modeling.fast.native import lora as native_lora
from ollatune.modeling.lora import LoRALinear, frozen_backward, frozen_base, frozen_forward


@dataclass(frozen=True)
class LinearGroup:
    """Layers with one input, in order; each a `LoRALinear` or a frozen linear layer."""

    layers: tuple[nn.Module, ...]

    @cached_property
    def adapters(self) -> list[LoRALinear]:
        return [layer for layer in self.layers if isinstance(layer, LoRALinear)]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter, in order: what the autograd function is given."""
        return [p for adapter in self.adapters for p in (adapter.lora_A, adapter.lora_B)]

    @cached_property
    def plan(self) -> native_linear.Plan:
        """The group as the compiled kernels see it."""
        return native_linear.Plan(self.layers)

    @property
    def dropout(self) -> float:
        """Dropout on the adapters' common input (0 when not training)."""
        return max((a.dropout for a in self.adapters if a.training), default=0.0)


def fuse_weights(group: LinearGroup) -> None:
    """Lay the group's dense weights out one after another, so that they are one matrix; no extra memory is kept.

    Not for the compiled kernels, which read each where it is.
    """
    bases = [frozen_base(layer) for layer in group.layers]
    if len(bases) < 2 or not all(isinstance(base, nn.Linear) for base in bases):
        return
    linears = cast(list[nn.Linear], bases)
    if group.plan.fits(linears[0].weight):
        return
    joined = torch.cat([linear.weight.data for linear in linears])
    offset = 0
    for linear in linears:
        linear.weight.data = joined[offset : offset + linear.out_features]
        offset += linear.out_features


def _fused_weight(group: LinearGroup) -> Tensor | None:
    """The one matrix behind the group's weights, if they lie so."""
    bases = [frozen_base(layer) for layer in group.layers]
    if not all(isinstance(base, nn.Linear) for base in bases):
        return None
    weights = [cast(nn.Linear, base).weight for base in bases]
    first, rows = weights[0], 0
    for weight in weights:
        expected = first.storage_offset() + rows * first.shape[1]
        if (
            weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or weight.storage_offset() != expected
            or not weight.is_contiguous()
        ):
            return None
        rows += weight.shape[0]
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def _fused_product(
    inputs_TI: Tensor, fused_OI: Tensor, bases: Sequence[nn.Module], sizes: Sequence[int]
) -> Tensor:
    """W x + b for all layers; the bias is added before the result is rounded."""
    biases = [cast("Tensor | None", base.bias) for base in bases]
    if all(bias is None for bias in biases):
        return inputs_TI @ fused_OI.T
    parts = [
        fused_OI.new_zeros(size) if bias is None else bias
        for size, bias in zip(sizes, biases, strict=True)
    ]
    return torch.addmm(torch.cat(parts), inputs_TI, fused_OI.T)


@dataclass(frozen=True)
class Kept:
    """What the way back needs besides the group's input.

    `tensors` are for `save_for_backward`: A x of the adapters [T, Σr] and the dropout's mask (None without), or what
    the compiled kernels keep. `settings` is the dropout's scale, or the kernels' seed.
    """

    tensors: tuple[Tensor | None, Tensor | None] = (None, None)
    settings: Any = None

    @property
    def is_native(self) -> bool:
        """Whether the compiled kernels made it: what they keep is theirs to read."""
        return isinstance(self.settings, native_lora.Seed)


@dataclass(frozen=True)
class GroupOutput:
    """Outputs [T, O] of each layer, the activated product [T, F] if asked for, and what `group_backward` needs."""

    outputs_TO: list[Tensor]
    product_TF: Tensor | None
    kept: Kept


def group_forward(
    group: LinearGroup,
    inputs_TI: Tensor,
    *,
    residual_TO: Tensor | None = None,
    activation: str | None = None,
) -> GroupOutput:
    """All layers of one input.

    Args:
        residual_TO: added to the output of the group's one layer.
        activation: the layers are gate and up, or one layer of both: `gated` of them is wanted, too.
    """
    if group.plan.fits(inputs_TI):
        outputs, product_TF, low = group.plan.forward(
            inputs_TI, group.dropout, residual_TO=residual_TO, activation=activation
        )
        if low is None:
            return GroupOutput(outputs, product_TF, Kept(settings=native_lora.Seed(0.0, 0)))
        return GroupOutput(outputs, product_TF, Kept((low.values_TR, low.packs), low.seed))
    outputs, kept = _torch_forward(group, inputs_TI)
    if residual_TO is not None:
        outputs[0].add_(residual_TO)
    product_TF = None if activation is None else gated(*split_gate_up(outputs), activation)
    return GroupOutput(outputs, product_TF, kept)


def split_gate_up(outputs_TO: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up [T, F]; Phi-3 has one layer for both."""
    if len(outputs_TO) == 1:
        gate, up = outputs_TO[0].chunk(2, dim=1)
        return gate, up
    return outputs_TO[0], outputs_TO[1]


def _torch_forward(group: LinearGroup, inputs_TI: Tensor) -> tuple[list[Tensor], Kept]:
    fused = _fused_weight(group)
    bases = [frozen_base(layer) for layer in group.layers]
    if fused is None:
        outputs = [frozen_forward(base, inputs_TI) for base in bases]
    else:
        sizes = [cast(Any, base).out_features for base in bases]
        outputs = list(torch.split(_fused_product(inputs_TI, fused, bases, sizes), sizes, 1))
    adapters = group.adapters
    if not adapters:
        return outputs, Kept()
    lora_TI, mask, scale = _dropped(inputs_TI, group.dropout)
    low_Tr = lora_TI @ _joined_A(adapters).to(lora_TI.dtype).T
    offset = 0
    for layer, output in zip(group.layers, outputs, strict=True):
        if isinstance(layer, LoRALinear):
            part = low_Tr[:, offset : offset + layer.rank]
            output.addmm_(part, layer.lora_B.to(part.dtype).T, alpha=layer.scale)
            offset += layer.rank
    return outputs, Kept((low_Tr, mask), scale)


def _joined_A(adapters: Sequence[LoRALinear]) -> Tensor:
    return adapters[0].lora_A if len(adapters) == 1 else torch.cat([a.lora_A for a in adapters])


Pending = Callable[[Tensor], "list[Tensor]"]
"""Given the group's input [T, I], the gradients of A and B of each adapter in order."""


def group_backward(
    group: LinearGroup,
    gradients_TO: Sequence[Tensor],
    kept: Kept,
    *,
    needs_input: bool,
    scratch: str | None = None,
) -> tuple[Tensor | None, Pending]:
    """The gradient of the input (if needed), and what is left to do once the input has been computed again.

    `scratch`: where the gradient may be (`workspace.scratch_empty`), if it is read before another of that name is made.
    """
    if kept.is_native:
        gradients = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients_TO]
        back = group.plan.backward(_low_rank(kept), gradients)
        pending = _no_gradients if back is None else back.gradients
        if not needs_input:
            return None, pending
        return group.plan.input_gradient(gradients, back, scratch=scratch), pending
    return _torch_backward(group, gradients_TO, kept, needs_input)


def gated_group_backward(
    group: LinearGroup,
    gradient_TO: Tensor,
    kept: Kept,
    gate_up: tuple[Tensor, Tensor],
    activation: str,
) -> tuple[tuple[Tensor, Tensor], Tensor, Pending]:
    """`group_backward` of one layer whose input was `gated` of `gate_up`: gradients of gate and up, the input again."""
    if kept.is_native:
        gradient_TO = gradient_TO.contiguous()
        back = group.plan.backward(_low_rank(kept), [gradient_TO])
        d_gate, d_up, product_TF = group.plan.gated_input_gradient(
            gradient_TO, back, *gate_up, activation
        )
        return (d_gate, d_up), product_TF, _no_gradients if back is None else back.gradients
    d_product, pending = _torch_backward(group, [gradient_TO], kept, needs_input=True)
    assert d_product is not None
    d_gate, d_up, product_TF = gated_backward(d_product, *gate_up, activation)
    return (d_gate, d_up), product_TF, pending


def _no_gradients(_: Tensor) -> list[Tensor]:
    return []


def _low_rank(kept: Kept) -> native_lora.LowRank | None:
    values_TR, packs = kept.tensors
    if values_TR is None or packs is None:
        return None
    return native_lora.LowRank(values_TR, packs, kept.settings)


def _torch_backward(
    group: LinearGroup, gradients_TO: Sequence[Tensor], kept: Kept, needs_input: bool
) -> tuple[Tensor | None, Pending]:
    low_Tr, mask = kept.tensors
    if low_Tr is None:
        return (_frozen_gradient(group, gradients_TO) if needs_input else None), _no_gradients
    d_low_Tr, b_gradients = _low_gradients(group, gradients_TO, low_Tr)

    def pending(inputs_TI: Tensor) -> list[Tensor]:
        lora_TI = inputs_TI if mask is None else inputs_TI * mask * kept.settings
        a_gradient = (d_low_Tr.T @ lora_TI).to(group.adapters[0].lora_A.dtype)
        a_gradients = torch.split(a_gradient, [adapter.rank for adapter in group.adapters])
        both = zip(a_gradients, b_gradients, strict=True)
        return [gradient for pair in both for gradient in pair]

    if not needs_input:
        return None, pending
    gradient_TI = _frozen_gradient(group, gradients_TO)
    A_rI = _joined_A(group.adapters).to(d_low_Tr.dtype)
    if mask is None:
        gradient_TI.addmm_(d_low_Tr, A_rI)
    else:
        gradient_TI.addcmul_(d_low_Tr @ A_rI, mask.to(gradient_TI.dtype), value=kept.settings)
    return gradient_TI, pending


def _low_gradients(
    group: LinearGroup, gradients_TO: Sequence[Tensor], low_Tr: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of A x of all adapters [T, Σr], and that of B of each."""
    parts, b_gradients, offset = [], [], 0
    for layer, gradient_TO in zip(group.layers, gradients_TO, strict=True):
        if not isinstance(layer, LoRALinear):
            continue
        low = low_Tr[:, offset : offset + layer.rank]
        parts.append((gradient_TO @ layer.lora_B.to(gradient_TO.dtype)).mul_(layer.scale))
        b_gradients.append((gradient_TO.T @ low).to(layer.lora_B.dtype).mul_(layer.scale))
        offset += layer.rank
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), b_gradients


def _frozen_gradient(group: LinearGroup, gradients_TO: Sequence[Tensor]) -> Tensor:
    fused = _fused_weight(group)
    if fused is not None:
        return joined(gradients_TO) @ fused
    total: Tensor | None = None
    for layer, gradient_TO in zip(group.layers, gradients_TO, strict=True):
        part = frozen_backward(frozen_base(layer), gradient_TO)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def joined(tensors_TO: Sequence[Tensor]) -> Tensor:
    """The tensors side by side; where they are neighbours in one tensor already, that tensor."""
    first = tensors_TO[0]
    if len(tensors_TO) == 1:
        return first
    columns, storage = 0, first.untyped_storage().data_ptr()
    for tensor in tensors_TO:
        if (
            tensor.untyped_storage().data_ptr() != storage
            or tensor.stride() != first.stride()
            or tensor.storage_offset() != first.storage_offset() + columns
        ):
            return torch.cat(list(tensors_TO), dim=1)
        columns += tensor.shape[1]
    if columns > first.stride(0):
        return torch.cat(list(tensors_TO), dim=1)
    return first.as_strided((first.shape[0], columns), first.stride(), first.storage_offset())


def _dropped(inputs_TI: Tensor, probability: float) -> tuple[Tensor, Tensor | None, float]:
    """The adapters' input after dropout, with the mask (uint8-sized) and scale for the way back."""
    if probability <= 0:
        return inputs_TI, None, 1.0
    mask = torch.empty(inputs_TI.shape, device=inputs_TI.device).bernoulli_(1 - probability) > 0
    scale = 1 / (1 - probability)
    return inputs_TI * mask * scale, mask, scale


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up; `activation` is `silu` or `gelu_tanh`."""
    if native.usable(gate, up):
        return native.gated(gate, up, activation)
    if activation == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh").mul_(up)


def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gated` with respect to gate and up, and its value again."""
    if native.usable(gradient, gate, up):
        return native.gated_backward(gradient, gate, up, activation)
    if activation == "silu":
        activated = functional.silu(gate)
        d_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    else:
        activated = functional.gelu(gate, approximate="tanh")
        d_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
    return d_gate, gradient * activated, activated.mul_(up)
