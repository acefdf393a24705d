"""llama.cpp's quantisation mixes: which type each tensor of a `q4_K_M` (and so on) file has.

Source: `llama_tensor_get_type_impl`, `tensor_allows_quantization` and `tensor_type_fallback` of llama.cpp's
`src/llama-quant.cpp`, for files made without an importance matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollatune.base.errors import UsageError
from ollatune.base.text import did_you_mean
from ollatune.gguf.types import GGMLType


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix: its name, the type most tensors get, and its number in `general.file_type`."""

    name: str
    type: GGMLType
    file_type: int


MIXES: dict[str, Mix] = {
    mix.name.casefold(): mix
    for mix in (
        Mix("q4_0", GGMLType.Q4_0, 2),
        Mix("q4_1", GGMLType.Q4_1, 3),
        Mix("q8_0", GGMLType.Q8_0, 7),
        Mix("q5_0", GGMLType.Q5_0, 8),
        Mix("q5_1", GGMLType.Q5_1, 9),
        Mix("q4_K_S", GGMLType.Q4_K, 14),
        Mix("q4_K_M", GGMLType.Q4_K, 15),
        Mix("q5_K_S", GGMLType.Q5_K, 16),
        Mix("q5_K_M", GGMLType.Q5_K, 17),
        Mix("q6_K", GGMLType.Q6_K, 18),
    )
}
"""The mixes that can be written, by case-folded name."""

FALLBACK_TYPES: dict[GGMLType, GGMLType] = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}
"""Types with smaller blocks, for rows that are no whole number of blocks. Where these do not fit either, F16 does."""

# Matrices of the architectures known here that llama.cpp leaves as they are.
_KEPT = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the rules ask of a model besides a tensor's name and shape.

    `is_tied`: no `output.weight`, the token embedding is the head. `is_grouped_70b`: 80 layers and shared key/value
    heads, which llama.cpp calls the 70B type.
    """

    num_layers: int
    num_experts: int = 0
    is_tied: bool = False
    is_grouped_70b: bool = False


def mix_named(name: str) -> Mix:
    """The mix called `name`, in any case. Raises UsageError with the nearest name."""
    found = MIXES.get(name.casefold())
    if found is None:
        names = [mix.name for mix in MIXES.values()]
        raise UsageError(
            f"There is no quantisation mix {name!r}.{did_you_mean(name, names)}",
            hint=f"Known mixes: {', '.join(names)}.",
        )
    return found


def tensor_type_for(
    mix: Mix, name: str, shape: tuple[int, ...], traits: ModelTraits
) -> GGMLType | None:
    """The type that `mix` gives to the tensor `name` of `shape` (rows, columns); None where it stays as it is."""
    if len(shape) < 2 or not name.endswith("weight") or _KEPT.search(name):
        return None
    chosen = _wanted_type(mix, name, shape[-1], traits)
    while shape[-1] % chosen.block_size:
        chosen = FALLBACK_TYPES.get(chosen, GGMLType.F16)
    return chosen


def _wanted_type(mix: Mix, name: str, num_columns: int, traits: ModelTraits) -> GGMLType:
    if name == "output.weight" or (traits.is_tied and name == "token_embd.weight"):
        if num_columns % mix.type.block_size or mix.type is GGMLType.Q8_0:
            return GGMLType.Q8_0
        return GGMLType.Q6_K
    found = _LAYER.match(name)
    if found is None:
        return mix.type
    layer = int(found[1])
    if "attn_v.weight" in name or "attn_qkv.weight" in name:
        return _attention_value_type(mix, layer, traits)
    if traits.num_experts == 8 and "attn_k.weight" in name:
        return GGMLType.Q8_0
    if traits.num_experts == 8 and "attn_output.weight" in name and mix.type is GGMLType.Q4_K:
        return GGMLType.Q5_K
    if "ffn_down" in name:
        if mix.name in ("q4_K_M", "q5_K_M") and _gets_more_bits(layer, traits.num_layers):
            return GGMLType.Q6_K
        if mix.name == "q4_K_S" and layer < traits.num_layers // 8:
            return GGMLType.Q5_K
    return mix.type


def _attention_value_type(mix: Mix, layer: int, traits: ModelTraits) -> GGMLType:
    if traits.num_experts == 8:
        return GGMLType.Q8_0
    if mix.name in ("q4_K_M", "q5_K_M") and _gets_more_bits(layer, traits.num_layers):
        return GGMLType.Q6_K
    if mix.name == "q4_K_S" and layer < 4:
        return GGMLType.Q5_K
    if traits.is_grouped_70b and mix.type is GGMLType.Q4_K:
        return GGMLType.Q5_K
    return mix.type


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third one between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
