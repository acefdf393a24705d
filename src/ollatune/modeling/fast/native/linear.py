"""Products with frozen weights through the compiled kernels, with all that can be done while a sum is in registers:
adapters and their dropout, bias, residual, gated activation. Formulas are in `kernels.c`.

Shapes: T positions, I inputs, O outputs of one layer, F = O of gate and up, R low-rank values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollatune.base.errors import OutOfMemoryError
from ollatune.modeling.fast.native.kernels import ACTIVATIONS, kernel, row_stride, usable
from ollatune.modeling.fast.native.lora import MAX_LAYERS, MAX_RANK, Adapters, AdaptersStruct
from ollatune.modeling.lora import LoRALinear, frozen_backward, frozen_forward

_PANEL, _MAX_PARTS = 32, 4
_PLAIN, _ACTIVATE, _DERIVE = 0, 1, 2

_long, _address = ctypes.c_long, ctypes.c_void_p


class _Part(ctypes.Structure):
    _fields_ = (
        ("x", _address), ("w", _address),
        ("x_stride", _long), ("w_stride", _long), ("K", _long), ("transposed", _long),
    )  # fmt: skip


class _Output(ctypes.Structure):
    _fields_ = (
        *((name, _address) for name in ("y", "residual", "bias", "low", "up")),
        *(
            (name, _long)
            for name in (
                "N", "y_stride", "residual_stride", "low_stride", "up_stride", "low_pairs", "parts",
            )
        ),
        ("part", _Part * _MAX_PARTS),
    )  # fmt: skip


class _Linear(ctypes.Structure):
    _fields_ = (
        ("output", _Output * MAX_LAYERS),
        *((name, _long) for name in ("outputs", "T", "then", "activation")),
        *((name, _address) for name in ("gate", "up", "d_gate", "d_up", "product")),
        *((name, _long) for name in ("gate_stride", "d_stride")),
        ("adapters", ctypes.POINTER(AdaptersStruct)),
        ("threads", ctypes.c_int),
    )


def fits(layers: Sequence[nn.Module], inputs_TI: Tensor) -> bool:
    """Whether the kernels take these layers: sizes in multiples of 32, fp32 adapters of rank 64 at most."""
    if len(layers) > MAX_LAYERS or inputs_TI.shape[1] % _PANEL or not usable(inputs_TI):
        return False
    return all(
        layer.out_features % _PANEL == 0
        and layer.rank <= MAX_RANK
        and layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
        if isinstance(layer, LoRALinear)
        else _dense(layer) is not None
        for layer in layers
    )


def _dense(layer: nn.Module) -> nn.Linear | None:
    """The frozen layer below, if its weight can be read as it lies."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    if not isinstance(base, nn.Linear) or base.weight.dtype is not torch.bfloat16:
        return None
    sizes_fit = base.in_features % _PANEL == base.out_features % _PANEL == 0
    return base if sizes_fit and base.weight.stride(1) == 1 else None


def _set_output(output: _Output, target_TO: Tensor) -> None:
    output.y, output.y_stride = target_TO.data_ptr(), row_stride(target_TO)
    output.N = target_TO.shape[1]


def _set_residual(output: _Output, residual_TO: Tensor) -> None:
    output.residual, output.residual_stride = residual_TO.data_ptr(), row_stride(residual_TO)


def _add_part(
    output: _Output, x_TK: Tensor, weight: Tensor, *, transposed: bool, first_row: int = 0
) -> None:
    part = output.part[output.parts]
    output.parts += 1
    part.x, part.x_stride, part.K = x_TK.data_ptr(), row_stride(x_TK), x_TK.shape[1]
    part.w_stride = weight.stride(0)
    part.w = weight.data_ptr() + first_row * weight.stride(0) * weight.element_size()
    part.transposed = transposed


def _add_low(output: _Output, adapters: Adapters, column: int, pairs: int, up_at: int) -> None:
    """`column`: the first low-rank value; `up_at`: where what it is multiplied with starts in the packs."""
    low_TR = adapters.low_TR
    output.low = low_TR.data_ptr() + column * low_TR.element_size()
    output.low_stride, output.low_pairs = low_TR.stride(0), pairs
    output.up = adapters.packs.data_ptr() + up_at * adapters.packs.element_size()


def _run(linear: _Linear, num_positions: int, adapters: Adapters | None) -> None:
    linear.T, linear.threads = num_positions, torch.get_num_threads()
    if adapters is not None:
        linear.adapters = ctypes.pointer(adapters.struct)
    if kernel("linear")(ctypes.byref(linear)):
        raise OutOfMemoryError("Out of memory in a linear layer.")


def product(inputs_TI: Tensor, layer: nn.Module) -> Tensor | None:
    """W x + b of one frozen layer [T, O]; None where the kernels do not take it."""
    base = _dense(layer)
    if base is None or not usable(inputs_TI):
        return None
    inputs = inputs_TI.contiguous()
    output_TO = torch.empty(inputs.shape[0], base.out_features, dtype=inputs.dtype)
    linear = _Linear(outputs=1)
    _set_output(linear.output[0], output_TO)
    _add_part(linear.output[0], inputs, base.weight, transposed=True)
    if base.bias is not None:
        linear.output[0].bias = base.bias.data_ptr()
    _run(linear, inputs.shape[0], None)
    return output_TO


def gradient_product(gradient_TO: Tensor, layer: nn.Module) -> Tensor | None:
    """The gradient of `product` with respect to its input [T, I]; None where the kernels do not take it."""
    base = _dense(layer)
    if base is None or not usable(gradient_TO):
        return None
    gradient = gradient_TO.contiguous()
    result_TI = torch.empty(gradient.shape[0], base.in_features, dtype=gradient.dtype)
    linear = _Linear(outputs=1)
    _set_output(linear.output[0], result_TI)
    _add_part(linear.output[0], gradient, base.weight, transposed=False)
    _run(linear, gradient.shape[0], None)
    return result_TI


@dataclass(frozen=True)
class Forward:
    """Outputs [T, O] of the layers, the activated product [T, F] if asked for, the adapters if there are any."""

    outputs_TO: list[Tensor]
    product_TF: Tensor | None
    adapters: Adapters | None


def forward(
    layers: Sequence[nn.Module],
    inputs_TI: Tensor,
    dropout: float,
    *,
    residual_TO: Tensor | None = None,
    activation: str | None = None,
) -> Forward:
    """All layers of one input.

    Args:
        residual_TO: added to the one layer's output.
        activation: the layers are gate and up (or one layer with both halves); see `kernels.gated`.
    """
    inputs = inputs_TI.contiguous()
    adapted = any(isinstance(layer, LoRALinear) for layer in layers)
    adapters = Adapters.of_input(layers, inputs, dropout) if adapted else None
    dense = [_dense(layer) for layer in layers]
    sizes = [int(getattr(layer, "out_features")) for layer in layers]  # noqa: B009 - of any kind
    joined = torch.empty(inputs.shape[0], sum(sizes), dtype=inputs.dtype)
    outputs_TO = list(torch.split(joined, sizes, 1)) if len(sizes) > 1 else [joined]
    halves = 2 if activation is not None and len(layers) == 1 else 1
    linear = _Linear(outputs=len(layers) * halves)
    for index, (layer, base, target) in enumerate(zip(layers, dense, outputs_TO, strict=True)):
        if base is None:
            target.copy_(
                frozen_forward(layer.base if isinstance(layer, LoRALinear) else layer, inputs)
            )
        width = sizes[index] // halves
        for half in range(halves):
            output, first = linear.output[index * halves + half], half * width
            part = target[:, first : first + width]
            _set_output(output, part)
            if base is None:
                _set_residual(output, part)
            else:
                _add_part(output, inputs, base.weight, transposed=True, first_row=first)
                if base.bias is not None:
                    output.bias = base.bias.data_ptr() + first * base.bias.element_size()
            if adapters is not None and isinstance(layer, LoRALinear):
                column, pairs, up_at = adapters.up(index)
                _add_low(output, adapters, column, pairs, up_at + first)
                output.up_stride = sizes[index]
    if residual_TO is not None:
        if dense[0] is None:
            outputs_TO[0].add_(residual_TO)
        else:
            _set_residual(linear.output[0], residual_TO)
    product_TF = None
    if activation is not None:
        product_TF = torch.empty(inputs.shape[0], sum(sizes) // 2, dtype=inputs.dtype)
        linear.then, linear.activation = _ACTIVATE, ACTIVATIONS[activation]
        linear.product = product_TF.data_ptr()
    # Dropout falls on the adapters' input, which `low_TR` has seen already.
    _run(linear, inputs.shape[0], None)
    return Forward(outputs_TO, product_TF, adapters)


def _input_gradient(
    layers: Sequence[nn.Module],
    gradients_TO: Sequence[Tensor],
    d_low: Adapters | None,
    linear: _Linear,
    result_TI: Tensor | None,
) -> None:
    """Describe Σ W y + drop(A d_low); with `result_TI` holding Σ W y already, it is only added to."""
    linear.outputs, output = 1, linear.output[0]
    if result_TI is None:
        for layer, gradient in zip(layers, gradients_TO, strict=True):
            base = _dense(layer)
            assert base is not None
            output.N = base.in_features
            _add_part(output, gradient, base.weight, transposed=False)
    else:
        _set_residual(output, result_TI)
    if d_low is not None:
        pairs, up_at = d_low.down()
        _add_low(output, d_low, 0, pairs, up_at)
        output.up_stride = d_low.struct.inputs


def _summed(layers: Sequence[nn.Module], gradients_TO: Sequence[Tensor]) -> Tensor | None:
    """Σ W y where some weight cannot be read as it lies; None where all can."""
    if all(_dense(layer) is not None for layer in layers):
        return None
    total: Any = None
    for layer, gradient in zip(layers, gradients_TO, strict=True):
        base = layer.base if isinstance(layer, LoRALinear) else layer
        part = frozen_backward(base, gradient)
        total = part if total is None else total.add_(part)
    assert isinstance(total, Tensor)
    return total


def input_gradient(
    layers: Sequence[nn.Module], gradients_TO: Sequence[Tensor], d_low: Adapters | None
) -> Tensor:
    """The gradient of the layers' common input [T, I]."""
    gradients = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients_TO]
    linear, result_TI = _Linear(), _summed(layers, gradients)
    _input_gradient(layers, gradients, d_low, linear, result_TI)
    if result_TI is None:
        result_TI = gradients[0].new_empty(gradients[0].shape[0], linear.output[0].N)
    elif d_low is None:
        return result_TI
    _set_output(linear.output[0], result_TI)
    _run(linear, result_TI.shape[0], d_low)
    return result_TI


def gated_input_gradient(
    layer: nn.Module,
    gradient_TO: Tensor,
    d_low: Adapters | None,
    gate_TF: Tensor,
    up_TF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the layer's input was activation(gate) · up: gradients of gate and up, neighbours in one tensor, and the
    product again."""
    gradient = gradient_TO if gradient_TO.stride(-1) == 1 else gradient_TO.contiguous()
    length, width = gate_TF.shape
    both = torch.empty(length, 2 * width, dtype=gate_TF.dtype)
    d_gate, d_up = both[:, :width], both[:, width:]
    product_TF = torch.empty(length, width, dtype=gate_TF.dtype)
    linear = _Linear(then=_DERIVE, activation=ACTIVATIONS[activation])
    summed_TF = _summed([layer], [gradient])  # the kernel reads it
    _input_gradient([layer], [gradient], d_low, linear, summed_TF)
    linear.output[0].N = width
    assert row_stride(gate_TF) == row_stride(up_TF)
    linear.gate, linear.up, linear.gate_stride = (
        gate_TF.data_ptr(), up_TF.data_ptr(), row_stride(gate_TF),
    )  # fmt: skip
    linear.d_gate, linear.d_up, linear.d_stride = d_gate.data_ptr(), d_up.data_ptr(), 2 * width
    linear.product = product_TF.data_ptr()
    _run(linear, length, d_low)
    return d_gate, d_up, product_TF
