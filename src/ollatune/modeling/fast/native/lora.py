"""The adapters of a group of linear layers through the compiled kernels: their low-rank values and gradients.

What the low-rank values add to outputs and inputs is part of the product in `linear.py`.

Shapes: T positions, I inputs, O outputs of one layer, r rank of one adapter, R the low-rank values of all side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.native.kernels import kernel, row_stride
from ollatune.modeling.lora import LoRALinear

MAX_LAYERS, MAX_RANK = 4, 64

_long = ctypes.c_long


class AdaptersStruct(ctypes.Structure):
    """`Adapters` of the C source."""

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


class Adapters:
    """The adapters of `layers` as the kernels read them, packed for one forward pass and the way back from it.

    Attributes:
        low_TR: the low-rank values A drop(x) in bf16.
        packs: the adapters' values in the orders in which the kernels read them.
        seed: of the dropout.
    """

    def __init__(
        self, layers: Sequence[nn.Module], low_TR: Tensor, packs: Tensor, seed: Seed
    ) -> None:
        self.layers, self.low_TR, self.packs, self.seed = layers, low_TR, packs, seed
        self.struct = _describe(layers)
        self.struct.packs = packs.data_ptr()
        self.struct.dropout, number = seed
        self.struct.seed_low, self.struct.seed_high = number & 0xFFFFFFFF, number >> 32

    @classmethod
    def of_input(cls, layers: Sequence[nn.Module], inputs_TI: Tensor, dropout: float) -> Adapters:
        """Pack the adapters and compute their low-rank values; the dropout's seed comes from torch's generator."""
        seed = Seed(dropout, int(torch.randint(1 << 62, ())) if dropout > 0 else 0)
        inputs = inputs_TI.contiguous()
        struct = _describe(layers)
        packs = torch.empty(
            kernel("lora_pack_size", _long)(ctypes.byref(struct)), dtype=torch.int32
        )
        low_TR = torch.empty(inputs.shape[0], struct.width, dtype=inputs.dtype)
        adapters = cls(layers, low_TR, packs, seed)
        kernel("lora_low")(
            ctypes.byref(adapters.struct), _pointer(inputs), _long(inputs.shape[1]),
            _pointer(low_TR), _long(inputs.shape[0]),
        )  # fmt: skip
        return adapters

    def up(self, index: int) -> tuple[int, int, int]:
        """Of layer `index`: where its column in `low_TR` starts, its pairs of ranks, where s·B is in `packs`."""
        struct, at = self.struct, self.struct.inputs * self.struct.width
        for layer in range(index):
            rank, outputs = struct.ranks[layer], struct.outputs[layer]
            at += (rank + 1) // 2 * outputs + outputs // 2 * (-(-rank // 16) * 16)
        return struct.low_at[index], (struct.ranks[index] + 1) // 2, at

    def down(self) -> tuple[int, int]:
        """The pairs of low-rank values of all layers, and where A is in `packs`."""
        return self.struct.width // 2, self.struct.inputs // 2 * self.struct.width


def _describe(layers: Sequence[nn.Module]) -> AdaptersStruct:
    struct = AdaptersStruct(layers=len(layers), threads=torch.get_num_threads())
    offset = 0
    for index, layer in enumerate(layers):
        if not isinstance(layer, LoRALinear):
            continue  # rank 0: left alone
        A_rI, B_Or = layer.lora_A, layer.lora_B
        struct.inputs, struct.outputs[index] = A_rI.shape[1], B_Or.shape[0]
        struct.ranks[index], struct.low_at[index] = layer.rank, offset
        struct.A[index], struct.B[index] = A_rI.data_ptr(), B_Or.data_ptr()
        struct.scales[index] = layer.scale
        offset += layer.rank + layer.rank % 2
    struct.width = -(-offset // 16) * 16
    return struct


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class Backward:
    """The way back through the adapters of one group, in the order in which its parts become known.

    Attributes:
        adapters: with the gradient of the low-rank values as `low_TR`.
    """

    def __init__(self, adapters: Adapters, gradients_TO: Sequence[Tensor]) -> None:
        gradients_TO = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients_TO]
        low_TR = adapters.low_TR
        self._adapted = [layer for layer in adapters.layers if isinstance(layer, LoRALinear)]
        self._num_positions = low_TR.shape[0]
        d_low_TR = torch.empty_like(low_TR)
        self.adapters = Adapters(adapters.layers, d_low_TR, adapters.packs, adapters.seed)
        struct = self.adapters.struct
        for index, gradient in enumerate(gradients_TO):
            struct.strides[index], struct.y[index] = row_stride(gradient), gradient.data_ptr()
        self._columns = torch.empty(
            low_TR.shape[1] * ((self._num_positions + 1) // 2), dtype=torch.int32
        )
        self._d_B = torch.empty(sum(a.rank * a.out_features for a in self._adapted))
        kernel("lora_outputs")(
            ctypes.byref(struct), _pointer(low_TR), _pointer(d_low_TR),
            _pointer(self._d_B), _pointer(self._columns), _long(self._num_positions),
        )  # fmt: skip

    def gradients(self, inputs_TI: Tensor) -> list[Tensor]:
        """The gradients of A [r, I] and B [O, r] of each adapter in order, in fp32."""
        inputs = inputs_TI.contiguous()
        width = inputs.shape[1]
        d_A = torch.empty(sum(a.rank for a in self._adapted) * width)
        kernel("lora_inputs")(
            ctypes.byref(self.adapters.struct), _pointer(inputs), _long(width),
            _pointer(self.adapters.low_TR), _pointer(d_A), _pointer(self._columns),
            _long(self._num_positions),
        )  # fmt: skip
        a_parts = torch.split(d_A, [a.rank * width for a in self._adapted])
        b_parts = torch.split(self._d_B, [a.rank * a.out_features for a in self._adapted])
        return [
            part
            for adapter, a, b in zip(self._adapted, a_parts, b_parts, strict=True)
            for part in (a.view(adapter.rank, width), b.view(-1, adapter.rank))
        ]
