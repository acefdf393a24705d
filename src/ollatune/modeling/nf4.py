"""Frozen layers re-quantised to NF4 by bitsandbytes, as QLoRA does (Dettmers et al. 2023); an extra.

Weights of the decoder's linear layers become 4-bit blocks of 64 with double quantisation; embedding, output layer and
norms stay dense. A base that Ollama serves is quantised already: NF4 rounds it a second time, `as-served` does not.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ollatune.base.errors import UsageError

BLOCK_SIZE = 64


def require_bitsandbytes(setting: str, instead: str) -> None:
    """Raise UsageError where the extra that `setting` needs is not installed; `instead` is what else can be chosen."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{setting} needs bitsandbytes, which is not installed.",
            hint=f"pip install 'ollatune[quantization]', or choose {instead}.",
        )


class _NF4Product(torch.autograd.Function):
    """W x + b; keeps nothing for the backward pass but the layer itself."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return layer.matmul_forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return cast(NF4Linear, ctx.layer).matmul_backward(gradient), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight [O, I] is kept in NF4 and decoded as it computes.

    Args:
        weight: decoded, on the device where the layer stays.
        bias: a parameter, filled now or later; None without one.
        dtype: of the decoded weight.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        self.out_features, self.in_features = weight.shape
        self.blocks, self._state = quantize_4bit(
            weight.detach().float().contiguous(), blocksize=BLOCK_SIZE,
            compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        self._state.dtype = dtype
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, _NF4Product).apply(inputs, self))

    @torch.no_grad()
    def matmul_forward(self, inputs: Tensor) -> Tensor:
        """x Wᵀ + b, without autograd, in the inputs' dtype."""
        return functional.linear(inputs, self.dequantized(inputs.dtype), self.bias)

    @torch.no_grad()
    def matmul_backward(self, gradient: Tensor) -> Tensor:
        """The gradient of `matmul_forward` with respect to its inputs."""
        return gradient @ self.dequantized(gradient.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [O, I]."""
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(self.blocks, self._state)).to(dtype)

    @property
    def size_bytes(self) -> int:
        """Memory of the blocks and their scales."""
        scales = [self._state.absmax]
        if self._state.nested:
            scales.append(self._state.state2.absmax)
        return sum(t.numel() * t.element_size() for t in (self.blocks, *scales))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, type=NF4"


def is_quantizable(name: str, module: nn.Module) -> bool:
    """Whether the module called `name` becomes an `NF4Linear`: linear, in a decoder layer, rows of whole blocks.

    bitsandbytes cuts blocks across the ends of rows, but its decoder on a CPU does not expect them there.
    """
    return (
        isinstance(module, nn.Linear)
        and ".layers." in name
        and module.in_features % BLOCK_SIZE == 0
    )
