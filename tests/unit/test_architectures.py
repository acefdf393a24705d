"""GGUF tensors and metadata against the Transformers models they came from, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ollatune.base.errors import GGUFError, InputError
from ollatune.gguf.codecs import dequantize, quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType
from ollatune.modeling.architectures import ARCHITECTURES, FAMILIES, architecture_of
from ollatune.modeling.architectures.llama import llama3_factors, name_llama3_scaling
from ollatune.modeling.architectures.rules import CENTRED_NORM, InterleavedHeads, StackedHalf
from ollatune.modeling.architectures.updates import (
    LoraFactors,
    export_updates,
    lora_in_gguf_order,
    rules_of,
)
from ollatune.modeling.fast.attention import register_attention
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import linear_names
from ollatune.modeling.packed import packed_layers
from tests.tiny_models import (
    RECIPES,
    VOCABULARY_SIZE,
    TinyModel,
    gguf_tensors,
    tiny_gguf,
    tiny_model,
)

TOKENS_BT = torch.randint(VOCABULARY_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))

# The largest difference between eager and fused attention on these models is a few 1e-6.
LOGIT_TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Each recipe's model, written once."""
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, TinyModel] = {}

    def get(recipe: str) -> TinyModel:
        if recipe not in written:
            written[recipe] = tiny_model(recipe, folder)
        return written[recipe]

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS_BT).logits
        return found


# ----- the mapping ------------------------------------------------------------------------------------------------


@given(heads=st.integers(1, 8), half=st.integers(1, 16))
def test_interleaved_heads_is_the_converter_s_permutation(heads: int, half: int) -> None:
    rows = heads * 2 * half
    hf = np.arange(rows * 3).reshape(rows, 3)
    stored = hf.reshape(heads, 2, half, 3).swapaxes(1, 2).reshape(rows, 3)  # LlamaModel.permute
    rule = InterleavedHeads(heads)
    assert np.array_equal(rule.hf_to_gguf(torch.from_numpy(hf)).numpy(), stored)
    assert np.array_equal(rule.gguf_to_hf(torch.from_numpy(stored)).numpy(), hf)


def test_reordering_packed_rows_is_reordering_decoded_rows() -> None:
    weights = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    blocks = quantize(weights, GGMLType.Q8_0)
    order = InterleavedHeads(4).hf_order(32)
    reordered = dequantize(blocks[order], GGMLType.Q8_0)
    assert torch.equal(reordered, dequantize(blocks, GGMLType.Q8_0)[order])


def test_centred_norm_differs_by_one() -> None:
    norm = torch.tensor([-0.5, 0.0, 0.25])
    assert CENTRED_NORM.hf_to_gguf(norm).tolist() == [0.5, 1.0, 1.25]
    assert CENTRED_NORM.gguf_to_hf(torch.tensor([0.5, 1.0, 1.25])).tolist() == norm.tolist()


def test_stacked_half_is_the_gate_then_the_up_rows_of_each_expert() -> None:
    fused = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(StackedHalf(0).part(fused), fused[:, :2])
    assert torch.equal(StackedHalf(1).part(fused), fused[:, 2:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_of_the_file_comes_from_its_parameter(
    recipe: str, tiny: Callable[[str], TinyModel]
) -> None:
    source = tiny(recipe)
    parameters = dict(source.model.named_parameters())
    with GGUFFile.open(source.path) as file:
        rules = architecture_of(file.metadata, file.tensors).present_rules()
    converted = {
        rule.gguf_name: rule.transform.hf_to_gguf(
            rule.transform.part(parameters[rule.hf_name].detach())
        )
        for rule in rules
    }
    expected = {
        name: values
        for name, values in gguf_tensors(source.model).items()
        if not name.startswith("rope_")
    }
    assert converted.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(converted[name].numpy(), values), name


# ----- the loaded model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_model_is_the_source_model(recipe: str, tiny: Callable[[str], TinyModel]) -> None:
    source = tiny(recipe)
    with GGUFFile.open(source.path) as file:
        model = load_base_model(file)
    assert type(model) is type(source.model)
    expected = dict(source.model.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        if "norm" in name and recipe.startswith("gemma"):  # (w + 1) - 1 in float32
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=2e-7)
        else:
            assert torch.equal(found[name], parameter), name
    rotary, expected_rotary = model.model.rotary_emb, source.model.model.rotary_emb
    for name, buffer in expected_rotary.named_buffers():
        torch.testing.assert_close(rotary.get_buffer(name), buffer, rtol=1e-6, atol=0)
    difference = (logits(model) - logits(source.model)).abs().max().item()
    assert difference < LOGIT_TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_rows_give_what_transformers_gives(
    recipe: str, tiny: Callable[[str], TinyModel]
) -> None:
    with GGUFFile.open(tiny(recipe).path) as file:
        model = load_base_model(file)
    ids_T, lengths = TOKENS_BT[0], [25, TOKENS_BT.shape[1]]
    with torch.no_grad():
        apart = [model(ids_T[None, :length]).logits[0] for length in lengths]
        model.config._attn_implementation = register_attention()
        together = model(
            torch.cat([ids_T[:length] for length in lengths])[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            segment_lengths=lengths,
            use_cache=False,
        ).logits[0]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_training_step_computes_what_transformers_computes(
    recipe: str, tiny: Callable[[str], TinyModel]
) -> None:
    with GGUFFile.open(tiny(recipe).path) as file:
        model = load_base_model(file)
    expected = logits(model)[0].log_softmax(-1)
    found = CausalStep(model).next_token_logprobs(
        TOKENS_BT[0].tolist(), list(range(TOKENS_BT.shape[1]))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_loaded_model_is_frozen_tied_and_in_evaluation(tiny: Callable[[str], TinyModel]) -> None:
    with GGUFFile.open(tiny("llama-tied").path) as file:
        model = load_base_model(file, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_biases_the_file_does_not_have_are_not_there(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    # Query, key and value biases without an output bias: Transformers' one switch would add the fourth.
    kept = rewrite(tiny("llama-bias").path, tmp_path, drop=("attn_output.bias", "ffn_gate.bias"))
    with GGUFFile.open(kept) as file:
        model = load_base_model(file)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.bias is not None
    assert layer.self_attn.o_proj.bias is None
    assert layer.mlp.gate_proj.bias is None
    assert layer.mlp.up_proj.bias is not None
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("recipe", "tensor_type", "hidden_size"),
    [("llama", "Q8_0", 64), ("mixtral", "Q8_0", 64), ("llama", "Q6_K", 256), ("phi3", "F16", 64)],
)
def test_quantised_tensors_are_decoded_and_placed(
    recipe: str, tensor_type: str, hidden_size: int, tmp_path: Path
) -> None:
    source = tiny_model(recipe, tmp_path, tensor_type=tensor_type, hidden_size=hidden_size)
    with GGUFFile.open(source.path) as file:
        model = load_base_model(file)
        rules = architecture_of(file.metadata, file.tensors).present_rules()
        reference = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(source.path).tensors
        }
    parameters = dict(model.named_parameters())
    for rule in rules:
        expected = rule.transform.gguf_to_hf(torch.from_numpy(reference[rule.gguf_name].copy()))
        assert torch.equal(rule.transform.part(parameters[rule.hf_name].data), expected)


def test_a_tensor_is_decoded_in_pieces(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollatune.modeling.load._PIECE_WEIGHTS", 7 * 64)
    source = tiny("llama")
    with GGUFFile.open(source.path) as file:
        model = load_base_model(file)
    expected = dict(source.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "recipe",
    ["llama", "llama-tied", "llama-bias", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"],
)
def test_packed_model_is_the_dense_model(recipe: str, tmp_path: Path) -> None:
    path = tiny_gguf(recipe, tmp_path, tensor_type="Q8_0")
    with GGUFFile.open(path) as file:
        dense, packed = load_base_model(file), load_base_model(file, mode="packed")
    embedded = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for model in (dense, packed):
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)
    left = [name for name, parameter in packed.named_parameters() if parameter.dim() > 1]
    assert left == [name for name in left if name.endswith("mlp.gate.weight")]  # Mixtral's router
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_packed_rows_that_stay_in_order_are_those_of_the_mapped_file(tmp_path: Path) -> None:
    path = tiny_gguf("llama-tied", tmp_path, tensor_type="Q8_0")
    with GGUFFile.open(path) as file:
        model = load_base_model(file, mode="packed")
        stored = file.tensor_data("blk.1.ffn_down.weight")
        embedding = file.tensor_data("token_embd.weight")
    assert model.model.layers[1].mlp.down_proj.blocks.data_ptr() == stored.ctypes.data
    assert model.model.embed_tokens.blocks.data_ptr() == embedding.ctypes.data
    assert model.lm_head.blocks.data_ptr() == embedding.ctypes.data
    assert torch.isfinite(logits(model)).all()  # the file was closed; its mapping lives on


def test_packed_experts_are_no_target_of_adapters(tmp_path: Path) -> None:
    path = tiny_gguf("mixtral", tmp_path, tensor_type="Q8_0")
    with GGUFFile.open(path) as file:
        model = load_base_model(file, mode="packed")
    assert {name.split(".")[3] for name in linear_names(model)} == {"self_attn"}


def test_float_matrices_of_a_packed_model_have_the_dtype(
    tiny: Callable[[str], TinyModel],
) -> None:
    with GGUFFile.open(tiny("mixtral").path) as file:
        model = load_base_model(file, mode="packed", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not packed_layers(model)


def test_phi3_takes_the_long_factors_when_it_will_be_served_with_a_long_context(
    tiny: Callable[[str], TinyModel],
) -> None:
    rope = tiny("phi3-longrope").model.config.rope_parameters
    with GGUFFile.open(tiny("phi3-longrope").path) as file:
        short = load_base_model(file, serving_context=256).config.rope_parameters
        long = load_base_model(file, serving_context=257).config.rope_parameters
    assert short["short_factor"] == pytest.approx(rope["short_factor"])
    assert long["short_factor"] == long["long_factor"] == pytest.approx(rope["long_factor"])


# ----- metadata ---------------------------------------------------------------------------------------------------


def fields(recipe: str, tiny: Callable[[str], TinyModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's metadata and tensor shapes, free to be changed."""
    with GGUFFile.open(tiny(recipe).path) as file:
        metadata = {key: file.metadata[key] for key in file.metadata if "ggml" not in key}
        shapes = {name: SimpleNamespace(shape=info.shape) for name, info in file.tensors.items()}
    return metadata, shapes


def no_tensor(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} should not be read")


def test_llama3_scaling_is_named_where_the_factors_are_exactly_its_own() -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=dict(rope))
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    factors = plain / scaled
    torch.testing.assert_close(llama3_factors(500000.0, 64, 32.0), factors)
    assert name_llama3_scaling(factors, 500000.0, 64) | {"rope_theta": 500000.0} == rope
    factors[3] *= 1.01
    assert name_llama3_scaling(factors, 500000.0, 64) == {}


def test_unknown_architecture_is_refused_by_name_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="architecture `mamba`") as caught:
        architecture_of({"general.architecture": "mamba"}, {})
    assert all(name in str(caught.value) for name in ARCHITECTURES)
    with pytest.raises(InputError, match=r"no `general.architecture`"):
        architecture_of({}, {})
    assert set(FAMILIES.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, r"no llama\.block_count"),
        ("block_count", "two", r"llama\.block_count is 'two'; a whole number"),
        ("block_count", True, r"llama\.block_count is True"),
        ("context_length", -1, r"llama\.context_length is -1"),
        ("attention.head_count_kv", [2, 1], "differs between layers"),
        ("attention.head_count_kv", 3, "whole groups of heads"),
        ("attention.head_count", 0, "at least one head"),
        ("attention.value_length", 8, "equal lengths"),
        ("embedding_length", 32, r"\(vocabulary, 32\)"),
        ("attention.layer_norm_rms_epsilon", "small", "a number was expected"),
        ("rope.scaling.type", "ntk", "Rope scaling `ntk`"),
        ("rope.scaling.type", 3, "text was expected"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    key: str, value: Any, message: str, tiny: Callable[[str], TinyModel]
) -> None:
    metadata, shapes = fields("llama", tiny)
    if value is None:
        del metadata[f"llama.{key}"]
    else:
        metadata[f"llama.{key}"] = value
    with pytest.raises(InputError, match=message):
        architecture_of(metadata, shapes)


@pytest.mark.parametrize(
    ("recipe", "key", "value", "message"),
    [
        ("llama", "rope.dimension_count", 8, "rotary embeddings on 8 of 16"),
        ("llama", "attention.scale", 0.5, "attention scale of 0.5"),
        ("llama", "rope.scaling.type", "longrope", "known for phi3 only"),
        ("mixtral", "expert_weights_scale", 2.5, "expert weight scale of 2.5"),
        ("qwen2", "rope.dimension_count", 8, "rotary embeddings on 8 of 16"),
        ("gemma2", "rope.freq_base_swa", 5.0, "one base for all layers"),
        ("gemma3", "attention.sliding_window_pattern", [True], "one for each of the 7 layers"),
    ],
)
def test_a_model_that_would_be_computed_otherwise_is_refused(
    recipe: str, key: str, value: Any, message: str, tiny: Callable[[str], TinyModel]
) -> None:
    metadata, shapes = fields(recipe, tiny)
    metadata[f"{metadata['general.architecture']}.{key}"] = value
    with pytest.raises(InputError, match=message):
        architecture_of(metadata, shapes).config(no_tensor)


def test_sizes_that_transformers_refuses_are_an_input_error(
    tiny: Callable[[str], TinyModel],
) -> None:
    metadata, shapes = fields("phi3-longrope", tiny)
    with pytest.raises(
        InputError, match=r"(?s)refuses the sizes of this phi3 model: .*must have length 6"
    ):
        architecture_of(metadata, shapes).config(lambda name: torch.ones(5))


def test_one_value_for_each_layer_is_taken_where_all_are_equal(
    tiny: Callable[[str], TinyModel],
) -> None:
    metadata, shapes = fields("llama", tiny)
    metadata["llama.attention.head_count_kv"] = [2, 2]
    assert architecture_of(metadata, shapes).sizes.num_kv_heads == 2


def test_missing_and_unknown_tensors_are_named(tiny: Callable[[str], TinyModel]) -> None:
    metadata, shapes = fields("llama", tiny)
    with pytest.raises(InputError, match=r"lacks 1 tensor .* `blk\.1\.ffn_up\.weight`"):
        architecture_of(metadata, without(shapes, "blk.1.ffn_up.weight")).present_rules()
    more = shapes | {"blk.0.attn_sub_norm.weight": shapes["blk.0.attn_norm.weight"]}
    with pytest.raises(InputError, match=r"1 tensor that .* `blk\.0\.attn_sub_norm\.weight`"):
        architecture_of(metadata, more).present_rules()
    with pytest.raises(InputError, match=r"no tensor `token_embd\.weight`"):
        architecture_of(metadata, without(shapes, "token_embd.weight"))


def test_a_tensor_of_another_shape_is_refused(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    path = rewrite(tiny("llama").path, tmp_path, truncate="blk.0.ffn_up.weight")
    message = r"`blk\.0\.ffn_up\.weight` has shape \(127, 64\); \(128, 64\) was expected"
    with GGUFFile.open(path) as file, pytest.raises(InputError, match=message):
        load_base_model(file)


def test_a_file_that_was_closed_is_refused(tiny: Callable[[str], TinyModel]) -> None:
    with GGUFFile.open(tiny("llama").path) as file:
        pass
    with pytest.raises(GGUFError, match="the file has been closed"):
        load_base_model(file)


# ----- Gemma 3 as Ollama's own converter wrote it -----------------------------------------------------------------


def test_gemma3_of_ollama_s_library_gets_the_server_s_defaults(
    tiny: Callable[[str], TinyModel],
) -> None:
    metadata, shapes = fields("gemma3", tiny)
    for key in (
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
    ):
        del metadata[f"gemma3.{key}"]
    metadata["gemma3.context_length"] = 131072
    metadata["gemma3.rope.local.freq_base"] = 12000.0
    shapes["v.patch_embedding.weight"] = SimpleNamespace(shape=(3, 3))
    architecture = architecture_of(metadata, shapes)
    config = architecture.config(no_tensor)
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "rope_theta": 1e6,
        "factor": 8.0,
    }
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 12000.0
    assert all(not rule.gguf_name.startswith("v.") for rule in architecture.present_rules())
    metadata["gemma3.context_length"] = 32768  # the 1B has no scaling
    config = architecture_of(metadata, shapes).config(no_tensor)
    assert config.rope_parameters["full_attention"]["rope_type"] == "default"


def test_gemma3_of_another_converter_gets_no_scaling(tiny: Callable[[str], TinyModel]) -> None:
    metadata, shapes = fields("gemma3", tiny)
    del metadata["gemma3.rope.scaling.type"], metadata["gemma3.rope.scaling.factor"]
    metadata["gemma3.context_length"] = 131072
    config = architecture_of(metadata, shapes).config(no_tensor)
    assert config.rope_parameters["full_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(None, "LLLLLGL"), (2, "LGLGLGL"), ([True, False] * 3 + [True], "LGLGLGL"), (0, "LLLLLLL")],
)
def test_gemma3_layer_kinds(pattern: Any, expected: str, tiny: Callable[[str], TinyModel]) -> None:
    metadata, shapes = fields("gemma3", tiny)
    if pattern is not None:
        metadata["gemma3.attention.sliding_window_pattern"] = pattern
    kinds = architecture_of(metadata, shapes).config(no_tensor).layer_types
    assert "".join("L" if kind == "sliding_attention" else "G" for kind in kinds) == expected


def test_the_largest_gemmas_scale_attention_by_width_over_heads(
    tiny: Callable[[str], TinyModel],
) -> None:
    metadata, shapes = fields("gemma2", tiny)
    assert architecture_of(metadata, shapes).config(no_tensor).query_pre_attn_scalar == 24
    metadata["gemma2.block_count"] = 46
    assert architecture_of(metadata, shapes).config(no_tensor).query_pre_attn_scalar == 64 // 4


# ----- updates for the exporter -----------------------------------------------------------------------------------


def factors(module: Any, rank: int = 3) -> LoraFactors:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(rank, module.in_features, generator=generator)
    return a, torch.randn(module.out_features, rank, generator=generator), 0.5


@pytest.mark.parametrize("recipe", ["llama", "qwen3", "gemma3", "phi3", "mixtral"])
def test_lora_updates_are_the_merged_weights_in_file_order(
    recipe: str, tiny: Callable[[str], TinyModel]
) -> None:
    source = tiny(recipe)
    linear = {
        name: module
        for name, module in source.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    lora = {name: factors(module) for name, module in linear.items()}
    before = copies(gguf_tensors(source.model))
    originals = {name: module.weight.detach().clone() for name, module in linear.items()}
    with GGUFFile.open(source.path) as file:
        architecture = architecture_of(file.metadata, file.tensors)
        updates = export_updates(architecture, lora=lora)
        ordered = lora_in_gguf_order(architecture, lora)
    try:
        with torch.no_grad():
            for name, (a, b, scale) in lora.items():
                linear[name].weight += scale * (b @ a)
        expected = copies(gguf_tensors(source.model))
    finally:
        with torch.no_grad():
            for name, weight in originals.items():
                linear[name].weight.copy_(weight)
    assert len(updates) == len(ordered) == len(linear)
    for update in updates:
        base = torch.from_numpy(before[update.name].copy())
        tuned = update.apply(base)
        assert (update.kind, update.shape) == ("lora", tuple(base.shape))
        np.testing.assert_allclose(tuned.numpy(), expected[update.name], atol=1e-5)
        a, b, scale = ordered[update.name]
        np.testing.assert_allclose((base + scale * (b @ a)).numpy(), tuned.numpy(), atol=1e-5)


@pytest.mark.parametrize("recipe", ["llama-tied", "gemma2", "mixtral"])
def test_whole_parameters_are_updated_once_each(
    recipe: str, tiny: Callable[[str], TinyModel]
) -> None:
    source = tiny(recipe)
    expected = gguf_tensors(source.model)
    with GGUFFile.open(source.path) as file:
        updates = export_updates(
            architecture_of(file.metadata, file.tensors), parameters=source.model.state_dict()
        )
    assert {update.name for update in updates} == expected.keys()
    assert len(updates) == len(expected)
    for update in updates:
        tuned = update.apply(torch.zeros(update.shape))
        assert update.kind == "full"
        assert np.array_equal(tuned.numpy(), expected[update.name]), update.name


def test_updates_that_fit_no_tensor_are_refused(tiny: Callable[[str], TinyModel]) -> None:
    with GGUFFile.open(tiny("llama-tied").path) as file:
        architecture = architecture_of(file.metadata, file.tensors)
    query = "model.layers.0.self_attn.q_proj"
    good = (torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    with pytest.raises(InputError, match="shares it with the token embedding"):
        export_updates(architecture, lora={"lm_head": good})
    with pytest.raises(InputError, match=r"no parameter .* Did you mean `model\.layers\.0\."):
        export_updates(architecture, lora={"model.layers.0.self_attn.qproj": good})
    with pytest.raises(InputError, match=r"\[rank, 64\] and \[64, rank\] were expected"):
        export_updates(architecture, lora={query: (torch.zeros(2, 32), torch.zeros(64, 2), 1.0)})
    with pytest.raises(InputError, match="has shape"):
        export_updates(architecture, parameters={f"{query}.weight": torch.zeros(64, 63)})
    with pytest.raises(InputError, match="given twice"):
        export_updates(
            architecture, lora={query: good}, parameters={f"{query}.weight": torch.zeros(64, 64)}
        )
    tied = {
        "model.embed_tokens.weight": torch.zeros(VOCABULARY_SIZE, 64),
        "lm_head.weight": torch.ones(VOCABULARY_SIZE, 64),
    }
    with pytest.raises(InputError, match="shares it with the token embedding"):
        export_updates(architecture, parameters=tied)


def test_a_fused_parameter_has_two_tensors(tiny: Callable[[str], TinyModel]) -> None:
    with GGUFFile.open(tiny("mixtral").path) as file:
        architecture = architecture_of(file.metadata, file.tensors)
    rules = rules_of(architecture, "model.layers.1.mlp.experts.gate_up_proj")
    assert [rule.gguf_name for rule in rules] == [
        "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_up_exps.weight",
    ]


# ----- helpers ----------------------------------------------------------------------------------------------------


def without(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: info for other, info in tensors.items() if other != name}


def rewrite(path: Path, folder: Path, *, drop: tuple[str, ...] = (), truncate: str = "") -> Path:
    """A copy of an F32 file without the tensors whose names end in one of `drop`, `truncate` a row shorter."""
    reader = gguf.GGUFReader(path)
    copy = folder / path.name
    writer = gguf.GGUFWriter(copy, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        element_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], element_type)
    for tensor in reader.tensors:
        if not tensor.name.endswith(drop or ("\0",)):
            values = tensor.data[:-1] if tensor.name == truncate else tensor.data
            writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values as they are now; those of `gguf_tensors` share the model's memory."""
    return {name: values.copy() for name, values in tensors.items()}
