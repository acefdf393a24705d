"""Products with one frozen layer and rows of one, through the compiled kernels: what has no adapter around it.

Shapes: T positions, I inputs, O outputs, K either.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from ollatune.gguf.types import GGMLType
from ollatune.modeling.fast.native.kernels import available, kernel, usable
from ollatune.modeling.fast.native.linear import Call, run
from ollatune.modeling.fast.native.weights import DECODED, PANEL, weight_of
from ollatune.modeling.fast.workspace import maybe_scratch

_long, _address = ctypes.c_long, ctypes.c_void_p


def _single(
    source_TK: Tensor, layer: nn.Module, *, transposed: bool, scratch: str | None = None
) -> Tensor | None:
    weight = weight_of(layer) if usable(source_TK) else None
    if weight is None:
        return None
    source, call = source_TK.contiguous(), Call(1)
    call.add_weight(0, weight, transposed=transposed)
    width = weight.rows if transposed else weight.columns
    result = maybe_scratch(scratch, (source.shape[0], width), source.dtype)
    output = call.outputs[0]
    output.y, output.N, output.y_stride = result.data_ptr(), width, width
    call.parts[0][0].x = source.data_ptr()
    run(call.linear, source.shape[0])
    return result


def product(inputs_TI: Tensor, layer: nn.Module, *, scratch: str | None = None) -> Tensor | None:
    """W x + b of one frozen layer [T, O]; None where the kernels do not take it. `scratch`: see `scratch_empty`."""
    return _single(inputs_TI, layer, transposed=True, scratch=scratch)


def gradient_product(gradient_TO: Tensor, layer: nn.Module) -> Tensor | None:
    """The gradient of `product` with respect to its input [T, I]; None where the kernels do not take it."""
    return _single(gradient_TO, layer, transposed=False)


def decoded_rows(
    blocks: Tensor, ggml_type: GGMLType, columns: int, ids_N: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Rows `ids_N` (int64) of a weight in blocks [rows, row_bytes], decoded [N, columns]; None where the kernels do not
    take it. Raises IndexError for a row that is not there."""
    on_cpu = blocks.device.type == ids_N.device.type == "cpu"
    is_fit = ggml_type in DECODED and columns % PANEL == 0 and blocks.stride(1) == 1
    if not (on_cpu and is_fit and dtype is torch.bfloat16 and available()):
        return None
    ids = ids_N.contiguous()
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < blocks.shape[0]):
        raise IndexError(f"Rows {int(ids.min())} to {int(ids.max())} of {blocks.shape[0]}.")
    result = torch.empty(ids.numel(), columns, dtype=dtype)
    kernel("decode_rows", None)(
        _address(blocks.data_ptr()), _long(blocks.stride(0)), _long(ggml_type),
        _address(ids.data_ptr()), _long(ids.numel()), _address(result.data_ptr()), _long(columns),
        ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return result
