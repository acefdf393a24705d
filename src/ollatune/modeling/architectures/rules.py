"""How one GGUF tensor and one Transformers parameter hold the same weights, as an exact mapping in both directions.

Everything is a matter of rows: a tensor is seen as rows of `columns` weights (experts stacked above each other), and
a transform may reorder rows or add a constant. Reordering rows never looks inside a row, so it works on packed blocks
as well as on decoded weights, and on the rows of a LoRA `B`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Transform:
    """The identity, and the base of the other transforms."""

    def hf_order(self, num_rows: int) -> Tensor | None:
        """Index of length `num_rows`: Transformers' row i is GGUF row `hf_order[i]`. None: the same order."""
        return None

    def gguf_order(self, num_rows: int) -> Tensor | None:
        """The inverse of `hf_order`: GGUF row i is Transformers' row `gguf_order[i]`."""
        order = self.hf_order(num_rows)
        return None if order is None else torch.argsort(order)

    @property
    def offset(self) -> float:
        """GGUF value minus Transformers value."""
        return 0.0

    def part(self, parameter: Tensor) -> Tensor:
        """The view of the Transformers parameter that this one GGUF tensor fills."""
        return parameter

    def gguf_to_hf(self, tensor: Tensor) -> Tensor:
        """Decoded GGUF weights (or biases) as the Transformers model holds them."""
        order = self.hf_order(tensor.shape[0])
        values = tensor if order is None else tensor[order]
        return values - self.offset if self.offset else values

    def hf_to_gguf(self, tensor: Tensor) -> Tensor:
        """The inverse of `gguf_to_hf`."""
        order = self.gguf_order(tensor.shape[0])
        values = tensor if order is None else tensor[order]
        return values + self.offset if self.offset else values

    def lora_hf_to_gguf(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """LoRA factors A [rank, in] and B [out, rank] in GGUF order: the rows of B move, A stays as it is."""
        order = self.gguf_order(b.shape[0])
        return (a, b) if order is None else (a, b[order])

    def lora_gguf_to_hf(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `lora_hf_to_gguf`."""
        order = self.hf_order(b.shape[0])
        return (a, b) if order is None else (a, b[order])


class Identity(Transform):
    """The same rows, the same values."""


@dataclass(frozen=True)
class InterleavedHeads(Transform):
    """Query and key rows of architecture `llama`: GGUF holds the two halves of each head interleaved.

    llama.cpp rotates neighbouring pairs (2i, 2i+1), Transformers rotates pairs (i, i + head_dim/2); the converter
    therefore stores `w.reshape(heads, 2, head_dim/2, in).swapaxes(1, 2)` (llama.cpp, LlamaModel.permute).
    """

    num_heads: int

    def hf_order(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows).view(self.num_heads, -1, 2).transpose(1, 2).reshape(-1)


class CentredNorm(Transform):
    """Gemma's norms: Transformers stores the distance from 1 and adds it back in `forward`, GGUF stores the sum."""

    @property
    def offset(self) -> float:
        return 1.0


@dataclass(frozen=True)
class StackedHalf(Transform):
    """One half of the rows of each expert: Transformers fuses gate and up as [experts, 2·intermediate, hidden]."""

    index: int

    def part(self, parameter: Tensor) -> Tensor:
        return parameter.chunk(2, dim=1)[self.index]


IDENTITY = Identity()
CENTRED_NORM = CentredNorm()


@dataclass(frozen=True)
class TensorRule:
    """One GGUF tensor, the Transformers parameter (or part of it) that holds its weights, and the way between them.

    `is_optional`: a bias that many files do not have; the model then has none either.
    """

    gguf_name: str
    hf_name: str
    transform: Transform = IDENTITY
    is_optional: bool = False

    @property
    def hf_module(self) -> str:
        """The module that owns the parameter: `model.layers.0.self_attn.q_proj`."""
        return self.hf_name.rpartition(".")[0]
