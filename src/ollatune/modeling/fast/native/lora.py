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
from ollatune.modeling.fast.workspace import kept_bytes, kept_empty
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


class LowRank(NamedTuple):
    """What one forward pass makes of the adapters, and needs again on its way back.

    `values_TR` are A drop(x) in bf16 (or their gradient), `packs` A and s·B as the kernels read them.
    """

    values_TR: Tensor
    packs: Tensor
    seed: Seed


class Adapters:
    """The adapters of `layers` (those that have one), described for the kernels once.

    Attributes:
        struct: for the kernels; it is filled anew for every call.
        up: of each layer, where its column in the low-rank values starts, its pairs of ranks, and where s·B is in
            the packs (None: no adapter).
        down: the pairs of low-rank values of all layers, and where A is in the packs.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
        self.struct = struct = AdaptersStruct(layers=len(layers))
        self.reference = ctypes.byref(struct)
        offset = 0
        for index, layer in enumerate(layers):
            if not isinstance(layer, LoRALinear):
                continue  # rank 0: left alone
            struct.inputs, struct.outputs[index] = layer.in_features, layer.out_features
            struct.ranks[index], struct.low_at[index] = layer.rank, offset
            struct.A[index], struct.B[index] = layer.lora_A.data_ptr(), layer.lora_B.data_ptr()
            struct.scales[index] = layer.scale
            offset += layer.rank + layer.rank % 2
        self.width = struct.width = -(-offset // 16) * 16
        self.down = self.width // 2, struct.inputs // 2 * self.width
        self.up: list[tuple[int, int, int] | None] = []
        at = struct.inputs * self.width
        for index, layer in enumerate(layers):
            rank, outputs = struct.ranks[index], struct.outputs[index]
            found = isinstance(layer, LoRALinear)
            self.up.append((struct.low_at[index], (rank + 1) // 2, at) if found else None)
            at += (rank + 1) // 2 * outputs + outputs // 2 * (-(-rank // 16) * 16)
        self._pack_size = int(kernel("lora_pack_size", _long)(self.reference))
        self._a_sizes = [a.rank * a.in_features for a in self._adapted]
        self._b_sizes = [a.rank * a.out_features for a in self._adapted]

    def bind(self, low: LowRank) -> None:
        """Make `struct` that of one pass."""
        struct = self.struct
        struct.packs, struct.threads = low.packs.data_ptr(), torch.get_num_threads()
        struct.dropout, number = low.seed
        struct.seed_low, struct.seed_high = number & 0xFFFFFFFF, number >> 32

    def low_rank(self, inputs_TI: Tensor, dropout: float) -> LowRank:
        """Pack the adapters and compute A drop(x); the dropout's seed comes from torch's generator."""
        seed = Seed(dropout, int(torch.randint(1 << 62, ())) if dropout > 0 else 0)
        low = LowRank(
            kept_empty((inputs_TI.shape[0], self.width), inputs_TI.dtype),
            kept_empty((self._pack_size,), torch.int32),
            seed,
        )
        self.bind(low)
        kernel("lora_low")(
            self.reference, _pointer(inputs_TI), _long(inputs_TI.shape[1]),
            _pointer(low.values_TR), _long(inputs_TI.shape[0]),
        )  # fmt: skip
        return low

    def kept_bytes(self, num_positions: int) -> int:
        """What `low_rank` keeps of a workspace."""
        values = kept_bytes((num_positions, self.width), torch.bfloat16)
        return values + kept_bytes((self._pack_size,), torch.int32)

    def backward(self, low: LowRank, gradients_TO: Sequence[Tensor]) -> Backward:
        """The first part of the way back, from the gradients of the outputs (their columns are neighbours)."""
        length = low.values_TR.shape[0]
        d_low = LowRank(torch.empty_like(low.values_TR), low.packs, low.seed)
        columns = torch.empty(self.width * ((length + 1) // 2), dtype=torch.int32)
        d_B = torch.empty(sum(self._b_sizes))
        self.bind(low)
        struct = self.struct
        for index, gradient in enumerate(gradients_TO):
            struct.strides[index], struct.y[index] = row_stride(gradient), gradient.data_ptr()
        kernel("lora_outputs")(
            self.reference, _pointer(low.values_TR), _pointer(d_low.values_TR), _pointer(d_B),
            _pointer(columns), _long(length),
        )  # fmt: skip
        return Backward(self, d_low, d_B, columns)

    def gradients(self, back: Backward, inputs_TI: Tensor) -> list[Tensor]:
        length, width = inputs_TI.shape
        d_A = torch.empty(sum(self._a_sizes))
        self.bind(back.d_low)
        kernel("lora_inputs")(
            self.reference, _pointer(inputs_TI), _long(width), _pointer(back.d_low.values_TR),
            _pointer(d_A), _pointer(back.columns), _long(length),
        )  # fmt: skip
        a_parts = torch.split_with_sizes(d_A, self._a_sizes)
        b_parts = torch.split_with_sizes(back.d_B, self._b_sizes)
        return [
            part
            for adapter, a, b in zip(self._adapted, a_parts, b_parts, strict=True)
            for part in (a.view(adapter.rank, width), b.view(-1, adapter.rank))
        ]


class Backward(NamedTuple):
    """The way back through the adapters, up to where the input has to be known."""

    adapters: Adapters
    d_low: LowRank
    d_B: Tensor
    columns: Tensor

    def gradients(self, inputs_TI: Tensor) -> list[Tensor]:
        """The gradients of A [r, I] and B [O, r] of each adapter in order, in fp32."""
        return self.adapters.gradients(self, inputs_TI.contiguous())


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
