"""Products with frozen weights through the compiled kernels, with all that can be done while a sum is in registers:
adapters and their dropout, bias, residual, gated activation. Formulas are in `linear.c`.

Shapes: T positions, I inputs, O outputs of one layer, F = O of gate and up, R low-rank values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ollatune.base.errors import OutOfMemoryError
from ollatune.modeling.fast.native.kernels import (
    ACTIVATIONS,
    kernel,
    row_stride,
    usable,
)
from ollatune.modeling.fast.native.lora import (
    MAX_LAYERS,
    Adapters,
    AdaptersStruct,
    Backward,
    LowRank,
)
from ollatune.modeling.fast.native.weights import BF16_BYTES, Weight, layer_fits, weight_of
from ollatune.modeling.fast.workspace import (
    GATE_UP_GRADIENTS,
    kept_bytes,
    kept_empty,
    maybe_scratch,
    scratch_empty,
)
from ollatune.modeling.lora import (
    LoRALinear,
    frozen_backward,
    frozen_base,
    frozen_forward,
)

if TYPE_CHECKING:
    pass

_MAX_PARTS = 4
_PLAIN, _ACTIVATE, _DERIVE = 0, 1, 2
_INT32_BYTES = 4

_long, _address = ctypes.c_long, ctypes.c_void_p


class _Part(ctypes.Structure):
    _fields_ = (
        ("x", _address), ("w", _address),
        *((name, _long) for name in ("x_stride", "w_stride", "w_type", "K", "transposed")),
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


def run(linear: _Linear, num_positions: int) -> None:
    linear.T, linear.threads = num_positions, torch.get_num_threads()
    if kernel("linear")(ctypes.byref(linear)):
        raise OutOfMemoryError("Out of memory in a linear layer.")


class Call:
    """A `Linear` of the C source with its parts at hand: reaching them through ctypes costs more than filling them."""

    def __init__(self, num_outputs: int, then: int = _PLAIN, activation: str = "silu") -> None:
        self.linear = _Linear(outputs=num_outputs, then=then, activation=ACTIVATIONS[activation])
        self.outputs = [self.linear.output[index] for index in range(num_outputs)]
        self.parts = [
            [output.part[index] for index in range(_MAX_PARTS)] for output in self.outputs
        ]

    def add_weight(self, output: int, weight: Weight, *, transposed: bool, first: int = 0) -> None:
        """`weight`, from the row `first` on, is multiplied with a part of this output."""
        target = self.outputs[output]
        part = self.parts[output][target.parts]
        target.parts += 1
        part.w = weight.address + first * weight.row_bytes
        part.w_stride, part.w_type, part.transposed = weight.row_bytes, weight.type, transposed
        part.x_stride = part.K = weight.columns if transposed else weight.rows
        if transposed and weight.bias is not None:
            target.bias = weight.bias + first * BF16_BYTES

    def add_low_rank(self, output: int, adapters: Adapters, pairs: int, stride: int) -> None:
        target = self.outputs[output]
        target.low_stride, target.up_stride, target.low_pairs = adapters.width, stride, pairs


class Forward(NamedTuple):
    """Outputs [T, O] of the layers, the activated product [T, F] if asked for, the adapters' part if there are any."""

    outputs_TO: list[Tensor]
    product_TF: Tensor | None
    low: LowRank | None


class Plan:
    """A group of layers with one input as the kernels see it: what stays the same is described once."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._key: tuple[Any, ...] = ()
        self._is_fit = False

    def fits(self, inputs_TI: Tensor) -> bool:
        """Whether the kernels take this input and these layers: sizes in multiples of 32, fp32 adapters of rank 64
        at most."""
        if not usable(inputs_TI):
            return False
        key: list[Any] = []
        for layer in self._layers:
            modules = layer.__dict__["_modules"]
            if "base" in modules:
                parameters = layer._parameters
                key += (parameters["lora_A"].data_ptr(), parameters["lora_B"].data_ptr())  # type: ignore[union-attr]
                layer = modules["base"]
            weight: Tensor | None = layer._parameters.get("weight")
            if weight is None:
                weight = layer._buffers.get("blocks")
            if weight is not None:
                key += (weight.data_ptr(), weight.dtype)
        if tuple(key) != self._key:
            self._key = tuple(key)
            self._describe()
        return self._is_fit

    def _describe(self) -> None:
        layers = self._layers
        self._is_fit = len(layers) <= MAX_LAYERS and all(layer_fits(layer) for layer in layers)
        if not self._is_fit:
            return
        self._weights = [weight_of(layer) for layer in layers]
        self._all_read = all(weight is not None for weight in self._weights)
        self._sizes = [int(getattr(frozen_base(layer), "out_features")) for layer in layers]  # noqa: B009
        self._width = int(getattr(frozen_base(layers[0]), "in_features"))  # noqa: B009 - of any kind
        adapted = any(isinstance(layer, LoRALinear) for layer in layers)
        self.adapters = Adapters(layers) if adapted else None
        self._forward: dict[str | None, Call] = {}
        self._backward: dict[str | None, Call] = {}

    def _forward_call(self, activation: str | None) -> Call:
        """Outputs, in halves where one layer has gate and up, with weights, biases and adapters."""
        halves = 2 if activation is not None and len(self._layers) == 1 else 1
        then = _PLAIN if activation is None else _ACTIVATE
        call = Call(len(self._layers) * halves, then, activation or "silu")
        for index, weight in enumerate(self._weights):
            width = self._sizes[index] // halves
            for half in range(halves):
                output, first = index * halves + half, half * width
                target = call.outputs[output]
                target.N, target.y_stride = width, sum(self._sizes)
                if weight is not None:
                    call.add_weight(output, weight, transposed=True, first=first)
                up = None if self.adapters is None else self.adapters.up[index]
                if up is not None and self.adapters is not None:
                    call.add_low_rank(output, self.adapters, up[1], self._sizes[index])
        return call

    def forward(
        self,
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
        low = None if self.adapters is None else self.adapters.low_rank(inputs, dropout)
        call = self._forward.get(activation)
        if call is None:
            call = self._forward[activation] = self._forward_call(activation)
        joined = kept_empty((inputs.shape[0], sum(self._sizes)), inputs.dtype)
        several = len(self._sizes) > 1
        outputs_TO = list(torch.split_with_sizes(joined, self._sizes, 1)) if several else [joined]
        at, halves = joined.data_ptr(), len(call.outputs) // len(self._sizes)
        for index, output in enumerate(call.outputs):
            layer = index // halves
            output.y = at
            if self._weights[layer] is not None:
                call.parts[index][0].x = inputs.data_ptr()
            else:
                if index % halves == 0:
                    outputs_TO[layer].copy_(
                        frozen_forward(frozen_base(self._layers[layer]), inputs)
                    )
                output.residual, output.residual_stride = at, output.y_stride
            if low is not None and self.adapters is not None:
                up = self.adapters.up[layer]
                if up is not None:
                    first = index % halves * output.N
                    output.low = low.values_TR.data_ptr() + up[0] * BF16_BYTES
                    output.up = low.packs.data_ptr() + (up[2] + first) * _INT32_BYTES
            at += output.N * BF16_BYTES
        if self._weights[0] is not None:
            self._set_residual(call.outputs[0], residual_TO)
        elif residual_TO is not None:
            outputs_TO[0].add_(residual_TO)
        product_TF = None
        if activation is not None:
            shape = (inputs.shape[0], sum(self._sizes) // 2)
            product_TF = scratch_empty("gated product", shape, inputs.dtype)
            call.linear.product = product_TF.data_ptr()
        # Dropout falls on the adapters' input, which the low-rank values have seen already.
        run(call.linear, inputs.shape[0])
        return Forward(outputs_TO, product_TF, low)

    def kept_bytes(self, num_positions: int) -> int:
        """What `forward` keeps of a workspace at most; 0 where the kernels do not take the layers."""
        if not self._is_fit:
            return 0
        outputs = kept_bytes((num_positions, sum(self._sizes)), torch.bfloat16)
        return outputs + (0 if self.adapters is None else self.adapters.kept_bytes(num_positions))

    @staticmethod
    def _set_residual(output: _Output, residual_TO: Tensor | None) -> None:
        if residual_TO is None:
            output.residual = None
        else:
            output.residual, output.residual_stride = (
                residual_TO.data_ptr(),
                row_stride(residual_TO),
            )

    def backward(self, low: LowRank | None, gradients_TO: Sequence[Tensor]) -> Backward | None:
        """The adapters' part of the way back; None without adapters."""
        if low is None or self.adapters is None:
            return None
        return self.adapters.backward(low, gradients_TO)

    def _backward_call(self, activation: str | None) -> Call:
        call = Call(1, _PLAIN if activation is None else _DERIVE, activation or "silu")
        output = call.outputs[0]
        output.N = output.y_stride = self._width
        for weight in self._weights if self._all_read else ():
            assert weight is not None
            call.add_weight(0, weight, transposed=False)
        if self.adapters is not None:
            call.add_low_rank(0, self.adapters, self.adapters.down[0], self._width)
            call.linear.adapters = ctypes.pointer(self.adapters.struct)
        return call

    def _bound_backward(
        self, activation: str | None, gradients_TO: Sequence[Tensor], back: Backward | None
    ) -> tuple[Call, Tensor | None]:
        """The call for Σ W y + drop(A d_low); where some weight cannot be read as it lies, Σ W y, to which it adds."""
        call = self._backward.get(activation)
        if call is None:
            call = self._backward[activation] = self._backward_call(activation)
        output = call.outputs[0]
        if back is not None:
            back.adapters.bind(back.d_low)
            output.low = back.d_low.values_TR.data_ptr()
            output.up = back.d_low.packs.data_ptr() + back.adapters.down[1] * _INT32_BYTES
        if self._all_read:
            for part, gradient in zip(call.parts[0], gradients_TO, strict=False):
                part.x, part.x_stride = gradient.data_ptr(), row_stride(gradient)
            return call, None
        total: Any = None
        for layer, gradient in zip(self._layers, gradients_TO, strict=True):
            found = frozen_backward(frozen_base(layer), gradient)
            total = found if total is None else total.add_(found)
        self._set_residual(output, total)
        return call, total

    def input_gradient(
        self,
        gradients_TO: Sequence[Tensor],
        back: Backward | None,
        *,
        scratch: str | None = None,
    ) -> Tensor:
        """The gradient of the layers' common input [T, I]."""
        call, result_TI = self._bound_backward(None, gradients_TO, back)
        if result_TI is None:
            shape = (gradients_TO[0].shape[0], self._width)
            result_TI = maybe_scratch(scratch, shape, torch.bfloat16)
        elif back is None:
            return result_TI
        call.outputs[0].y = result_TI.data_ptr()
        run(call.linear, result_TI.shape[0])
        return result_TI

    def gated_input_gradient(
        self,
        gradient_TO: Tensor,
        back: Backward | None,
        gate_TF: Tensor,
        up_TF: Tensor,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the layer's input was activation(gate) · up: gradients of gate and up, neighbours in one tensor, and
        the product again."""
        call, _summed_TF = self._bound_backward(activation, [gradient_TO], back)
        linear, (length, width) = call.linear, gate_TF.shape
        both = scratch_empty(GATE_UP_GRADIENTS, (length, 2 * width), gate_TF.dtype)
        product_TF = scratch_empty("gated product", (length, width), gate_TF.dtype)
        stride = row_stride(gate_TF)
        assert stride == row_stride(up_TF)
        linear.gate, linear.up, linear.gate_stride = gate_TF.data_ptr(), up_TF.data_ptr(), stride
        linear.d_gate, linear.d_stride = both.data_ptr(), 2 * width
        linear.d_up = both.data_ptr() + width * BF16_BYTES
        linear.product = product_TF.data_ptr()
        run(linear, length)
        return both[:, :width], both[:, width:], product_TF
