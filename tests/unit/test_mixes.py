"""Quantisation mixes against the types of files that llama.cpp wrote."""

from __future__ import annotations

from collections import Counter

import pytest

from ollatune.base.errors import UsageError
from ollatune.gguf.mixes import MIXES, ModelTraits, mix_named, tensor_type_for
from ollatune.gguf.types import GGMLType


def llama_shapes(
    num_layers: int, hidden: int, inner: int, kv: int, vocabulary: int, *, is_tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "rope_freqs.weight": (64,),
    }
    if not is_tied:
        shapes["output.weight"] = (vocabulary, hidden)
    for layer in range(num_layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (kv, hidden),
            f"blk.{layer}.attn_v.weight": (kv, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.ffn_gate.weight": (inner, hidden),
            f"blk.{layer}.ffn_up.weight": (inner, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, inner),
        }
    return shapes


def counts(
    mix: str, shapes: dict[str, tuple[int, ...]], traits: ModelTraits
) -> Counter[GGMLType | None]:
    return Counter(
        tensor_type_for(mix_named(mix), name, shape, traits) for name, shape in shapes.items()
    )


LLAMA_8B = llama_shapes(32, 4096, 14336, 1024, 128256, is_tied=False)
SMOLLM2_135M = llama_shapes(30, 576, 1536, 192, 49152, is_tied=True)


def test_llama_8b_q4_k_m_has_the_types_of_published_files() -> None:
    # llama.cpp prints for such a file: f32 66, q4_K 193, q6_K 33.
    expected = {None: 66, GGMLType.Q4_K: 193, GGMLType.Q6_K: 33}
    assert counts("q4_K_M", LLAMA_8B, ModelTraits(32)) == expected


def test_llama_8b_other_mixes() -> None:
    traits = ModelTraits(32)
    assert counts("q5_K_M", LLAMA_8B, traits) == {None: 66, GGMLType.Q5_K: 193, GGMLType.Q6_K: 33}
    assert counts("q4_K_S", LLAMA_8B, traits) == {
        None: 66, GGMLType.Q4_K: 217, GGMLType.Q5_K: 8, GGMLType.Q6_K: 1,
    }  # fmt: skip
    assert counts("q5_K_S", LLAMA_8B, traits) == {None: 66, GGMLType.Q5_K: 225, GGMLType.Q6_K: 1}
    assert counts("q4_0", LLAMA_8B, traits) == {None: 66, GGMLType.Q4_0: 225, GGMLType.Q6_K: 1}
    assert counts("q8_0", LLAMA_8B, traits) == {None: 66, GGMLType.Q8_0: 226}


def test_widths_that_do_not_divide_fall_back_as_in_llama_cpp() -> None:
    # llama.cpp's own q4_K_M of this model has 166 tensors of Q5_0.
    found = counts("q4_K_M", SMOLLM2_135M, ModelTraits(30, is_tied=True))
    assert found == {
        None: 62, GGMLType.Q5_0: 166, GGMLType.Q8_0: 15, GGMLType.Q4_K: 16, GGMLType.Q6_K: 14,
    }  # fmt: skip


def test_the_layers_with_more_bits() -> None:
    name = "blk.{}.ffn_down.weight"
    raised = [
        layer
        for layer in range(32)
        if tensor_type_for(mix_named("q4_k_m"), name.format(layer), (4096, 14336), ModelTraits(32))
        is GGMLType.Q6_K
    ]
    assert raised == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_eight_experts_keep_keys_and_values_fine() -> None:
    traits = ModelTraits(32, num_experts=8)
    mix = mix_named("q4_K_M")
    assert tensor_type_for(mix, "blk.9.attn_k.weight", (1024, 4096), traits) is GGMLType.Q8_0
    assert tensor_type_for(mix, "blk.9.attn_v.weight", (1024, 4096), traits) is GGMLType.Q8_0
    assert tensor_type_for(mix, "blk.9.attn_output.weight", (4096, 4096), traits) is GGMLType.Q5_K
    assert tensor_type_for(mix, "blk.9.ffn_gate_inp.weight", (8, 4096), traits) is None
    experts = tensor_type_for(mix, "blk.9.ffn_down_exps.weight", (8, 4096, 14336), traits)
    assert experts is GGMLType.Q6_K


def test_other_traits_and_names() -> None:
    mix = mix_named("q4_K_M")
    value = "blk.40.attn_v.weight"
    assert tensor_type_for(mix, value, (1024, 8192), ModelTraits(80)) is GGMLType.Q4_K
    grouped = ModelTraits(80, is_grouped_70b=True)
    assert tensor_type_for(mix, value, (1024, 8192), grouped) is GGMLType.Q5_K
    fused = tensor_type_for(mix, "blk.0.attn_qkv.weight", (9216, 3072), ModelTraits(32))
    assert fused is GGMLType.Q6_K
    assert tensor_type_for(mix, "blk.0.attn_q.bias", (4096,), ModelTraits(32)) is None
    assert tensor_type_for(mix, "blk.0.attn_q.weight", (64, 100), ModelTraits(32)) is GGMLType.F16
    assert tensor_type_for(mix, "token_embd.weight", (10, 512), ModelTraits(2)) is GGMLType.Q4_K


def test_names_and_numbers() -> None:
    assert {mix.name: mix.file_type for mix in MIXES.values()}["q4_K_M"] == 15
    with pytest.raises(UsageError, match=r"q4_K_L.*Did you mean `q4_K_M`|q4_K_L.*Known mixes"):
        mix_named("q4_K_L")
