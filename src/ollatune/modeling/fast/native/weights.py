"""Weights of frozen layers as the compiled kernels read them: dense in bf16, or in the blocks of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ollatune.gguf.types import GGMLType
from ollatune.modeling.fast.native.lora import MAX_RANK
from ollatune.modeling.lora import FrozenLinear, LoRALinear, frozen_base

if TYPE_CHECKING:
    from ollatune.modeling.packed import PackedLinear

PANEL = 32
"""Columns of a weight that are laid out together (`linear.c`)."""
BF16_BYTES = 2
DECODED = frozenset(
    GGMLType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
)
"""Block types that `blocks.h` decodes."""


@dataclass(frozen=True)
class Weight:
    """A frozen layer's weight as the kernels read it: `rows` of `columns`, `row_bytes` apart, of a ggml type."""

    address: int
    rows: int
    columns: int
    row_bytes: int
    type: int
    bias: int | None


def sizes_fit(rows: int, columns: int) -> bool:
    """Whether the kernels take a weight of these sizes."""
    return rows % PANEL == columns % PANEL == 0


def weight_of(layer: nn.Module) -> Weight | None:
    """The weight of the frozen layer below, if it can be read as it lies."""
    base = frozen_base(layer)
    if isinstance(base, nn.Linear):
        stored: Tensor = base.weight
        if stored.dtype is not torch.bfloat16 or stored.stride(1) != 1:
            return None
        row_bytes, ggml_type = stored.stride(0) * BF16_BYTES, GGMLType.BF16
    elif getattr(base, "ggml_type", None) in DECODED:
        packed = cast("PackedLinear", base)
        stored, ggml_type = packed.blocks, packed.ggml_type
        row_bytes = stored.stride(0)
    else:
        return None
    sizes = cast(FrozenLinear, base)
    bias: Tensor | None = getattr(base, "bias", None)
    if bias is not None and bias.dtype is not torch.bfloat16:
        return None
    if stored.device.type != "cpu" or not sizes_fit(sizes.out_features, sizes.in_features):
        return None
    return Weight(
        stored.data_ptr(), sizes.out_features, sizes.in_features, row_bytes, ggml_type,
        None if bias is None else bias.data_ptr(),
    )  # fmt: skip


def layer_fits(layer: nn.Module) -> bool:
    """Whether a layer, with its adapter if it has one, is one that the kernels take (see `Plan.fits`)."""
    if isinstance(layer, LoRALinear):
        adapter_fits = layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
        fits = sizes_fit(layer.out_features, layer.in_features)
        return fits and layer.rank <= MAX_RANK and adapter_fits
    return weight_of(layer) is not None
