"""The adapters of a group of linear layers through the compiled kernels, forward and backward.

Shapes: T positions, I inputs, O outputs of one layer, r rank of one adapter, R the low-rank values of all side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.native.build import load_library
from ollatune.modeling.fast.native.kernels import row_stride, usable
from ollatune.modeling.lora import LoRALinear

MAX_LAYERS, MAX_RANK = 4, 64

_long = ctypes.c_long


class _Adapters(ctypes.Structure):
    _fields_ = (
        ("layers", _long),
        ("inputs", _long),
        ("width", _long),
        ("outputs", _long * MAX_LAYERS),
        ("ranks", _long * MAX_LAYERS),
        ("low_at", _long * MAX_LAYERS),
        ("strides", _long * MAX_LAYERS),
        ("y", ctypes.c_void_p * MAX_LAYERS),
        ("A", ctypes.c_void_p * MAX_LAYERS),
        ("B", ctypes.c_void_p * MAX_LAYERS),
        ("scales", ctypes.c_float * MAX_LAYERS),
        ("packs", ctypes.c_void_p),
        ("dropout", ctypes.c_float),
        ("seed_low", ctypes.c_uint32),
        ("seed_high", ctypes.c_uint32),
        ("threads", ctypes.c_int),
    )


class Seed(NamedTuple):
    """The dropout's probability, and the number that its masks follow from."""

    dropout: float
    number: int


def fits(layers: Sequence[nn.Module], inputs_TI: Tensor) -> bool:
    """Whether the kernels take these layers: sizes in multiples of 16, fp32 adapters of rank 64 at most."""
    if len(layers) > MAX_LAYERS or inputs_TI.shape[1] % 16 or not usable(inputs_TI):
        return False
    return all(
        layer.out_features % 16 == 0
        and layer.rank <= MAX_RANK
        and layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
        for layer in layers
        if isinstance(layer, LoRALinear)
    )


def _describe(
    layers: Sequence[nn.Module], tensors_TO: Sequence[Tensor], num_inputs: int, seed: Seed
) -> _Adapters:
    adapters = _Adapters(layers=len(layers), inputs=num_inputs, threads=torch.get_num_threads())
    offset = 0
    for index, (layer, tensor) in enumerate(zip(layers, tensors_TO, strict=True)):
        if not isinstance(layer, LoRALinear):
            continue  # rank 0: left alone
        adapters.outputs[index], adapters.ranks[index] = layer.out_features, layer.rank
        adapters.low_at[index] = offset
        adapters.strides[index], adapters.y[index] = row_stride(tensor), tensor.data_ptr()
        adapters.A[index], adapters.B[index] = layer.lora_A.data_ptr(), layer.lora_B.data_ptr()
        adapters.scales[index] = layer.scale
        offset += layer.rank + layer.rank % 2
    adapters.width = -(-offset // 16) * 16
    adapters.dropout, number = seed
    adapters.seed_low, adapters.seed_high = number & 0xFFFFFFFF, number >> 32
    return adapters


def _library() -> Any:
    library: Any = load_library().library
    library.lora_pack_size.restype = _long
    return library


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def forward(
    layers: Sequence[nn.Module], inputs_TI: Tensor, outputs_TO: Sequence[Tensor], dropout: float
) -> tuple[Tensor, Tensor, Seed]:
    """Add the adapters to the outputs, in place.

    Returns:
        The low-rank values [T, R] in bf16, the adapters as the kernels read them, and the dropout's seed, which
        comes from torch's generator.
    """
    seed = Seed(dropout, int(torch.randint(1 << 62, ())) if dropout > 0 else 0)
    inputs = inputs_TI.contiguous()
    adapters = _describe(layers, outputs_TO, inputs.shape[1], seed)
    library = _library()
    packs = torch.empty(library.lora_pack_size(ctypes.byref(adapters)), dtype=torch.int32)
    adapters.packs = packs.data_ptr()
    low_TR = torch.empty(inputs.shape[0], adapters.width, dtype=inputs.dtype)
    library.lora_forward(
        ctypes.byref(adapters), _pointer(inputs), _long(inputs.shape[1]), _pointer(low_TR),
        _long(inputs.shape[0]),
    )  # fmt: skip
    return low_TR, packs, seed


class Backward:
    """The way back through the adapters of one group, in the order in which its parts become known."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        gradients_TO: Sequence[Tensor],
        low_TR: Tensor,
        packs: Tensor,
        seed: Seed,
    ) -> None:
        gradients_TO = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients_TO]
        self._adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        num_inputs = self._adapted[0].in_features
        self._packs, self._num_positions = packs, low_TR.shape[0]
        self._adapters = _describe(layers, gradients_TO, num_inputs, seed)
        self._adapters.packs = packs.data_ptr()
        self._d_low_TR = torch.empty_like(low_TR)
        self._columns = torch.empty(
            low_TR.shape[1] * ((self._num_positions + 1) // 2), dtype=torch.int32
        )
        self._d_B = torch.empty(sum(a.rank * a.out_features for a in self._adapted))
        _library().lora_outputs(
            ctypes.byref(self._adapters), _pointer(low_TR), _pointer(self._d_low_TR),
            _pointer(self._d_B), _pointer(self._columns), _long(self._num_positions),
        )  # fmt: skip

    def add_input_gradient(self, gradient_TI: Tensor) -> None:
        """Add the adapters' part to the gradient of the group's input, in place."""
        _library().lora_input(
            ctypes.byref(self._adapters), _pointer(self._d_low_TR), _pointer(gradient_TI),
            _long(row_stride(gradient_TI)), _long(self._num_positions),
        )  # fmt: skip

    def gradients(self, inputs_TI: Tensor) -> list[Tensor]:
        """The gradients of A [r, I] and B [O, r] of each adapter in order, in fp32."""
        inputs = inputs_TI.contiguous()
        width = inputs.shape[1]
        d_A = torch.empty(sum(a.rank for a in self._adapted) * width)
        _library().lora_inputs(
            ctypes.byref(self._adapters), _pointer(inputs), _long(width), _pointer(self._d_low_TR),
            _pointer(d_A), _pointer(self._columns), _long(self._num_positions),
        )  # fmt: skip
        a_parts = torch.split(d_A, [a.rank * width for a in self._adapted])
        b_parts = torch.split(self._d_B, [a.rank * a.out_features for a in self._adapted])
        return [
            part
            for adapter, a, b in zip(self._adapted, a_parts, b_parts, strict=True)
            for part in (a.view(adapter.rank, width), b.view(-1, adapter.rank))
        ]
