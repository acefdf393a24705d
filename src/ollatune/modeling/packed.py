"""Frozen layers that keep the file's blocks: decoded as they compute, in pieces, and never as a whole.

The results, and the gradients with respect to the inputs, are those of a dense layer that holds the decoded weights.
Frozen weights get no gradient.

Shapes: T positions, I input features, O output features.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ollatune.base.errors import InputError
from ollatune.gguf.codecs import DECODABLE, dequantize
from ollatune.gguf.types import GGMLType
from ollatune.modeling.fast.native import products as native_products

# Weights decoded at once. On a CPU their float32 still lies in the last-level cache when the product reads it.
_CPU_PIECE_WEIGHTS = 4 << 20
_GPU_PIECE_WEIGHTS = 64 << 20

KEPT_BYTES = 1 << 30
"""Most memory for weights decoded by a repeated forward pass (see `_Kept`). A layer of an 8B model takes 0.9 GB in
float32."""

_local = threading.local()


def view_of(array: npt.NDArray[np.uint8]) -> Tensor:
    """A tensor on the array's own memory, which may be a file mapped read-only. It must not be written to."""
    with warnings.catch_warnings():
        # Torch has no read-only tensors and says so; packed layers only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one decoded piece, used over and over: fresh pages would cost more than decoding into them."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kept: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("kept", {})
    if dtype not in kept or kept[dtype].numel() < rows * columns:
        kept[dtype] = torch.empty(rows * columns, dtype=dtype)
    return kept[dtype][: rows * columns].view(rows, columns)


class _Kept:
    """Whole decoded weights, from the forward pass that activation checkpointing repeats to the backward pass after it.

    A forward pass within a backward pass is such a repetition: the layer's backward pass follows at once, and need not
    decode again. The memory is used for layer after layer, and let go when the backward pass ends.
    """

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.spare: list[Tensor] = []
        self.size_bytes = 0

    @classmethod
    def of_this_backward(cls) -> _Kept | None:
        """None outside of a backward pass."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        tasks: dict[int, _Kept] = _local.__dict__.setdefault("backward", {})
        if task not in tasks:
            tasks[task] = cls()
            # The engine's own list of what to do at the end, which DDP and FSDP use as well.
            engine = cast(Any, torch.autograd.Variable)._execution_engine
            engine.queue_callback(lambda: tasks.pop(task, None))
        return tasks[task]

    def room_for(
        self, layer: PackedLinear, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Memory [O, I] for the layer's weight, to be filled now; None where it would be too much."""
        shape = layer.out_features, layer.in_features
        numel = shape[0] * shape[1]
        for index, spare in enumerate(self.spare):
            if spare.numel() == numel and spare.dtype == dtype:
                del self.spare[index]
                self.weights[id(layer)] = spare.view(shape)
                return self.weights[id(layer)]
        needed = numel * dtype.itemsize
        if self.size_bytes + needed > KEPT_BYTES:
            return None
        self.size_bytes += needed
        self.weights[id(layer)] = torch.empty(shape, dtype=dtype, device=device)
        return self.weights[id(layer)]

    def find(self, layer: PackedLinear, dtype: torch.dtype) -> Tensor | None:
        """The layer's weight, if it is here in `dtype`."""
        weight = self.weights.get(id(layer))
        return weight if weight is not None and weight.dtype == dtype else None

    def take(self, layer: PackedLinear, dtype: torch.dtype) -> Tensor | None:
        """As `find`; the next layer may fill the memory."""
        weight = self.find(layer, dtype)
        if weight is not None:
            self.spare.append(self.weights.pop(id(layer)))
        return weight


def _piece_weights(device: torch.device) -> int:
    return _CPU_PIECE_WEIGHTS if device.type == "cpu" else _GPU_PIECE_WEIGHTS


def _under_autocast(inputs: Tensor) -> Tensor:
    """As torch's own layers do: cast to the autocast dtype where autocast is on."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device) and inputs.is_floating_point():
        return inputs.to(torch.get_autocast_dtype(device))
    return inputs


class _PackedProduct(torch.autograd.Function):
    """W x + b; keeps nothing for the backward pass but the layer itself."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        outputs_TO = layer.matmul_forward(inputs.reshape(-1, layer.in_features))
        return outputs_TO.view(*inputs.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: PackedLinear = ctx.layer
        gradient_TI = layer.matmul_backward(gradient.reshape(-1, layer.out_features))
        return gradient_TI.view(*gradient.shape[:-1], layer.in_features), None


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` whose weight stays in blocks, uint8 [O, row_bytes].

    The blocks are a buffer that is not saved: `to(device)` moves them, `state_dict` leaves them out. They may be a view
    of a mapped file (`view_of`). Before DDP, call `keep_out_of_ddp` on the model.

    Raises:
        InputError: the type cannot be decoded, or the blocks have another shape.
    """

    blocks: Tensor

    def __init__(
        self,
        blocks: Tensor,
        type: GGMLType,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_blocks(blocks, type, out_features, in_features)
        self.ggml_type = type
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("blocks", blocks, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, _PackedProduct).apply(_under_autocast(inputs), self))

    @torch.no_grad()
    def matmul_forward(self, inputs_TI: Tensor) -> Tensor:
        """x Wᵀ + b [T, O], without autograd, in the inputs' dtype. Decodes some rows at a time.

        The compiled kernels do it where they can, here and on the way back: they decode what they are about to read.
        """
        if (found := native_products.product(inputs_TI, self)) is not None:
            return found
        outputs_TO = inputs_TI.new_empty(inputs_TI.shape[0], self.out_features)
        step = max(1, _piece_weights(self.blocks.device) // self.in_features)
        kept = _Kept.of_this_backward()
        whole = None if kept is None else kept.find(self, inputs_TI.dtype)
        if whole is not None:
            torch.mm(inputs_TI, whole.T, out=outputs_TO)
            return outputs_TO if self.bias is None else outputs_TO.add_(self.bias)
        if kept is not None:
            whole = kept.room_for(self, inputs_TI.dtype, inputs_TI.device)
        for start in range(0, self.out_features, step):
            blocks = self.blocks[start : start + step]
            if whole is None:
                weight = self._decode(blocks, inputs_TI.dtype)
            else:
                weight = dequantize(blocks, self.ggml_type, out=whole[start : start + step])
            torch.mm(inputs_TI, weight.T, out=outputs_TO[:, start : start + step])
        return outputs_TO if self.bias is None else outputs_TO.add_(self.bias)

    @torch.no_grad()
    def matmul_backward(self, gradient_TO: Tensor) -> Tensor:
        """The gradient of `matmul_forward` with respect to its inputs, [T, I]. Decodes some columns at a time."""
        if (found := native_products.gradient_product(gradient_TO, self)) is not None:
            return found
        kept = _Kept.of_this_backward()
        whole = None if kept is None else kept.take(self, gradient_TO.dtype)
        if whole is not None:
            return gradient_TO @ whole
        # Columns, not rows: every element is then one sum, rounded once also in bf16.
        gradient_TI = gradient_TO.new_empty(gradient_TO.shape[0], self.in_features)
        size, size_bytes = self.ggml_type.block_size, self.ggml_type.block_bytes
        piece = max(1, _piece_weights(self.blocks.device) // self.out_features // size)
        for first in range(0, self.in_features // size, piece):
            blocks = self.blocks[:, first * size_bytes : (first + piece) * size_bytes]
            columns = slice(first * size, (first + piece) * size)
            weight = self._decode(blocks, gradient_TO.dtype)
            torch.mm(gradient_TO, weight, out=gradient_TI[:, columns])
        return gradient_TI

    def _decode(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        columns = blocks.shape[1] // self.ggml_type.block_bytes * self.ggml_type.block_size
        scratch = _scratch(blocks.shape[0], columns, dtype, blocks.device)
        return dequantize(blocks, self.ggml_type, out=scratch)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [O, I], all of it at once."""
        return dequantize(self.blocks, self.ggml_type, dtype=dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"type={self.ggml_type.name}, bias={self.bias is not None}"
        )


class PackedEmbedding(nn.Module):
    """A frozen `nn.Embedding` whose rows stay in blocks, uint8 [V, row_bytes], and are decoded as they are looked up.

    Raises:
        InputError: the type cannot be decoded, or the blocks have another shape.
    """

    blocks: Tensor

    def __init__(
        self,
        blocks: Tensor,
        type: GGMLType,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_blocks(blocks, type, num_embeddings, embedding_dim)
        self.ggml_type = type
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.register_buffer("blocks", blocks, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        ids = token_ids.reshape(-1)
        embedded = native_products.decoded_rows(
            self.blocks, self.ggml_type, self.embedding_dim, ids, self.dtype
        )
        if embedded is None:
            rows = self.blocks.index_select(0, ids)
            embedded = dequantize(rows, self.ggml_type, dtype=self.dtype)
        return embedded.view(*token_ids.shape, self.embedding_dim)

    def tied_head(self) -> PackedLinear:
        """The output layer that uses these same blocks; no memory of its own."""
        return PackedLinear(self.blocks, self.ggml_type, self.embedding_dim, self.num_embeddings)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded table [V, I], all of it at once."""
        return dequantize(self.blocks, self.ggml_type, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.ggml_type.name}"


def _check_blocks(blocks: Tensor, type: GGMLType, rows: int, columns: int) -> None:
    if type not in DECODABLE:
        raise InputError(f"Tensors of type {type.name} cannot be decoded, so not be packed either.")
    expected = (rows, type.row_bytes(columns))
    if blocks.dtype != torch.uint8 or tuple(blocks.shape) != expected:
        raise InputError(
            f"Blocks of {rows} x {columns} weights of type {type.name} are uint8 of shape {expected}; "
            f"found {blocks.dtype} of shape {tuple(blocks.shape)}."
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """The packed layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | PackedEmbedding)
    }


def keep_out_of_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel leave the blocks alone: all processes read the same file.

    DDP would copy them from the first process at the start and again in every step, into memory that may be read-only.
    """
    blocks = [
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.dtype == torch.uint8
    ]
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    # The attribute that DDP reads; torch has no public way to set it for a whole model.
    model._ddp_params_and_buffers_to_ignore = sorted({*ignored, *blocks})  # type: ignore[assignment]
