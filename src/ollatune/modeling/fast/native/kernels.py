"""The compiled kernels as functions of tensors. Formulas and shapes are in the C files beside it.

`usable` says whether a tensor is one that they take; everything here expects that it has been asked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ollatune.base.errors import OutOfMemoryError
from ollatune.modeling.fast.native.build import load_library
from ollatune.modeling.fast.segments import SegmentTable
from ollatune.modeling.fast.workspace import kept_empty, maybe_scratch, scratch_empty

NORMED = "normalised input"
"""Scratch of a layer's input, forth or back."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_state = {"enabled": True}

_long, _float, _int = ctypes.c_long, ctypes.c_float, ctypes.c_int


_C_TYPES: dict[type, Any] = {type(None): ctypes.c_void_p, float: _float, int: _long}


def _as_it_is(argument: Any) -> Any:
    return argument


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "qkv"),
        *((name, _long) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, _long) for name in ("T", "H", "G", "d", "units")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "unit_at", "start", "length", "range_at", "range_start", "range_length", "position",
            )
        ),
        ("window", _long),
        ("softcap", _float),
        ("threads", _int),
    )  # fmt: skip


def set_enabled(enabled: bool) -> None:
    """Use the kernels where they fit (the default), or torch operators everywhere."""
    _state["enabled"] = enabled


def state() -> str:
    """One phrase for the log: whether the kernels are used, and why not."""
    if not _state["enabled"]:
        return "switched off"
    return load_library().reason


def available() -> bool:
    return _state["enabled"] and load_library().library is not None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take tensors like these: bf16 on a CPU that has them."""
    return all(
        t.dtype is torch.bfloat16 and t.device.type == "cpu" for t in tensors
    ) and available()  # fmt: skip


@cache
def kernel(name: str, result: Any = _int) -> Any:
    """The compiled function of this name; `result` is the C type of what it returns."""
    function = getattr(load_library().library, name)
    function.restype = result
    return function


def _call(name: str, *arguments: Any) -> int:
    """Call a kernel: tensors become pointers, Python numbers long or float; the number of threads is added."""
    converted = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, Tensor)
        else _C_TYPES.get(type(argument), _as_it_is)(argument)
        for argument in arguments
    ]
    return int(kernel(name)(*converted, _int(torch.get_num_threads())))


def row_stride(tensor: Tensor) -> int:
    """Distance of a row from the next; the columns must be neighbours."""
    assert tensor.stride(-1) == 1
    return tensor.stride(0) if tensor.dim() > 1 else tensor.shape[-1]


def norm_forward(
    inputs_TD: Tensor, gain_D: Tensor, epsilon: float, *, scratch: str | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm [T, D] in bf16, and 1 / root mean square [T, 1] in fp32. `scratch`: where the former is, if not kept."""
    inputs = inputs_TD.contiguous()
    width = inputs.shape[-1]
    output = maybe_scratch(scratch, inputs.shape, inputs.dtype)
    inverse = kept_empty((*inputs.shape[:-1], 1), torch.float32)
    _call(
        "norm_forward", inputs, gain_D, float(epsilon), output, inverse,
        inputs.numel() // width, width,
    )  # fmt: skip
    return output, inverse


def norm_backward(
    gradient_TD: Tensor,
    inputs_TD: Tensor,
    inverse_T1: Tensor,
    gain_D: Tensor,
    residual_TD: Tensor | None = None,
    *,
    scratch: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the input plus `residual_TD`, and the normalised input again, which is scratch.

    `scratch`: where the gradient is, if it is read before another of that name is made.
    """
    inputs, gradient = inputs_TD.contiguous(), gradient_TD.contiguous()
    residual = None if residual_TD is None else residual_TD.contiguous()
    width = inputs.shape[-1]
    output = maybe_scratch(scratch, inputs.shape, inputs.dtype)
    normed = scratch_empty(NORMED, inputs.shape, inputs.dtype)
    _call(
        "norm_backward", gradient, inputs, inverse_T1, gain_D, residual, output, normed,
        inputs.numel() // width, width,
    )  # fmt: skip
    return output, normed


def gated(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """activation(gate) · up; both may be halves of one tensor."""
    rows, width = gate_TF.shape
    product = torch.empty(rows, width, dtype=gate_TF.dtype)
    _call(
        "gated_forward", gate_TF, up_TF, row_stride(gate_TF), product,
        _int(ACTIVATIONS[activation]), rows, width,
    )  # fmt: skip
    return product


def gated_backward(
    d_product_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, neighbours in one tensor, and the product again."""
    rows, width = gate_TF.shape
    both = torch.empty(rows, 2 * width, dtype=gate_TF.dtype)
    d_gate, d_up = both[:, :width], both[:, width:]
    product = torch.empty(rows, width, dtype=gate_TF.dtype)
    _call(
        "gated_backward", d_product_TF.contiguous(), gate_TF, up_TF, row_stride(gate_TF),
        d_gate, d_up, 2 * width, product, _int(ACTIVATIONS[activation]), rows, width,
    )  # fmt: skip
    return d_gate, d_up, product


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, softcap: float | None, smoothing: float, gradient: bool
) -> Tensor:
    """Loss of each row [N] in fp64; the logits become the loss's gradient if `gradient`."""
    rows, width = logits_NV.shape
    losses = torch.empty(rows, dtype=torch.float64)
    _call(
        "cross_entropy", logits_NV, targets_N.contiguous(), losses, float(softcap or 0.0),
        float(smoothing), _int(gradient), rows, width,
    )  # fmt: skip
    return losses


def rotate(
    query_TO: Tensor,
    key_TO: Tensor,
    head_size: int,
    rotary: tuple[Tensor, Tensor],
    *,
    sign: float,
    scale: float,
) -> None:
    """Rotate every head of both in place (backwards with `sign` −1) and multiply the queries by `scale`."""
    cosine_Th, sine_Th = rotary
    _call(
        "rotate", query_TO, row_stride(query_TO), query_TO.shape[1] // head_size,
        key_TO, row_stride(key_TO), key_TO.shape[1] // head_size, head_size,
        cosine_Th, sine_Th, cosine_Th.shape[1], float(sign), float(scale), query_TO.shape[0],
    )  # fmt: skip


def attention_fits(head_size: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the attention kernels take these heads."""
    return head_size % 16 == 0 and usable(*tensors)


class AttentionCall:
    """One layer's attention over a row: rotated and scaled q [T, H·d], rotated k and v [T, G·d]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: SegmentTable,
        head_size: int,
        *,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.q, self.k, self.v, self.table = q, k, v, table
        arrays = table.pointers
        self.struct = _Attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), row_stride(q), row_stride(k), row_stride(v),
            q.shape[0], q.shape[1] // head_size, k.shape[1] // head_size, head_size,
            table.num_units, *arrays, window or 0, softcap or 0.0, torch.get_num_threads(),
        )  # fmt: skip

    def _run(self, name: str, *tensors: Any) -> None:
        arguments = [t if isinstance(t, _long) else ctypes.c_void_p(t.data_ptr()) for t in tensors]
        if kernel(name)(ctypes.byref(self.struct), *arguments):
            raise OutOfMemoryError("Out of memory in attention.")

    def forward(self) -> tuple[Tensor, Tensor]:
        """[T, H·d], and the logarithms of the sums of exponentials [H, T]."""
        output = kept_empty(self.q.shape, self.q.dtype)
        normalisers = kept_empty((self.struct.H, self.struct.T), torch.float32)
        self._run("attention_forward", output, _long(output.stride(0)), normalisers)
        return output, normalisers

    def backward(
        self, gradient: Tensor, output: Tensor, normalisers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, neighbours in one tensor of scratch: read before the next layer's are made."""
        widths = [self.q.shape[1], self.k.shape[1], self.v.shape[1]]
        shape = (self.q.shape[0], sum(widths))
        joined = scratch_empty("gradients of query, key and value", shape, self.q.dtype)
        dq, dk, dv = torch.split(joined, widths, dim=1)
        stride = _long(joined.stride(0))
        self._run(
            "attention_backward", gradient.contiguous(), output, _long(output.stride(0)),
            normalisers, dq, dk, dv, stride, stride, stride,
        )  # fmt: skip
        return dq, dk, dv
