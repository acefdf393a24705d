"""Tiny random models of every architecture as GGUF files, converted independently of the code under test.

The source is a Transformers model with random weights; names, permutation, metadata keys and the `+ 1` of Gemma's
norms follow llama.cpp's converter and are written here a second time on purpose. The file is written by the `gguf`
package. Only block types that `gguf` cannot encode (the K-quants) use the project's own encoder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

VOCABULARY_SIZE = 320
"""ASCII, two control tokens and words: the size of the built-in vocabulary."""

BOS_ID, EOS_ID = 128, 129


@dataclass(frozen=True)
class TinyModel:
    """A written file and the Transformers model it was written from."""

    path: Path
    model: Any


@dataclass(frozen=True)
class Recipe:
    """How to make one kind of tiny model: fields over the common configuration, and metadata beyond the common."""

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int = 2
    head_dim: int = 16
    is_tied: bool = False


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONG_FACTORS = [1.0 + 0.5 * index for index in range(6)]
_SHORT_FACTORS = [1.0 + 0.05 * index for index in range(6)]

RECIPES: dict[str, Recipe] = {
    "llama": Recipe("llama"),
    "llama-tied": Recipe("llama", is_tied=True),
    "llama-llama3-rope": Recipe("llama", {"rope_parameters": _LLAMA3_ROPE}, head_dim=32),
    "llama-other-rope": Recipe(
        "llama",
        {"rope_parameters": _LLAMA3_ROPE | {"original_max_position_embeddings": 64}},
        head_dim=32,
    ),
    "llama-linear-rope": Recipe(
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama-head-dim": Recipe("llama", head_dim=24),
    "llama-bias": Recipe("llama", {"attention_bias": True, "mlp_bias": True}),
    "mixtral": Recipe("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Recipe("qwen2"),
    "qwen2-tied": Recipe("qwen2", is_tied=True),
    "qwen2-yarn": Recipe(
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "qwen3": Recipe("qwen3", head_dim=24),
    "gemma2": Recipe(
        "gemma2",
        {"sliding_window": 16, "query_pre_attn_scalar": 24},
        {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        num_layers=4,
        head_dim=24,
        is_tied=True,
    ),
    "gemma3": Recipe(
        "gemma3",
        {
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        num_layers=7,
        head_dim=24,
        is_tied=True,
    ),
    "phi3": Recipe("phi3"),
    "phi3-partial": Recipe(
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            }
        },
        {"rope.dimension_count": 12},
    ),
    "phi3-longrope": Recipe(
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": _SHORT_FACTORS,
                "long_factor": _LONG_FACTORS,
                "original_max_position_embeddings": 256,
                "attention_factor": 1.19,
            },
        },
        {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 256,
            "rope.scaling.attn_factor": 1.19,
        },
    ),
}
"""One for each architecture and for each thing in it that a converter can get wrong."""


def tiny_gguf(
    recipe: str,
    folder: Path,
    *,
    tokenizer: Mapping[str, tuple[Any, Any]] | None = None,
    tensor_type: str = "F32",
    hidden_size: int = 64,
    seed: int = 0,
) -> Path:
    """The path of a tiny random model `RECIPES[recipe]` in `folder`; see `tiny_model`."""
    return tiny_model(
        recipe,
        folder,
        tokenizer=tokenizer,
        tensor_type=tensor_type,
        hidden_size=hidden_size,
        seed=seed,
    ).path


def tiny_model(
    recipe: str,
    folder: Path,
    *,
    tokenizer: Mapping[str, tuple[Any, Any]] | None = None,
    tensor_type: str = "F32",
    hidden_size: int = 64,
    seed: int = 0,
) -> TinyModel:
    """Write a tiny random model and return it with the Transformers model it came from (its weights unquantised).

    `tokenizer`: metadata by key as (value, gguf.GGUFValueType), as in a real file's `tokenizer.*`; without it a
    vocabulary of VOCABULARY_SIZE. `tensor_type`: of the matrices; rows that are no whole number of its
    blocks, and everything one-dimensional, are F32. `hidden_size`: 256 for the K-quants.
    """
    plan = RECIPES[recipe]
    tokens = tokenizer or ascii_vocabulary()
    num_tokens = len(tokens["tokenizer.ggml.tokens"][0])
    model = _random_model(plan, num_tokens, hidden_size, seed)
    path = folder / f"{recipe}-{tensor_type.lower()}-{seed}.gguf"
    writer = gguf.GGUFWriter(path, "llama" if plan.family == "mixtral" else plan.family)
    _add_metadata(writer, plan, model.config)
    for key, (value, value_type) in tokens.items():
        writer.add_key_value(key, value, value_type, *_element_type(value, value_type))
    for name, values in gguf_tensors(model).items():
        _add_tensor(writer, name, values, tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, model)


@functools.cache
def ascii_vocabulary() -> dict[str, tuple[Any, Any]]:
    """A byte-level BPE vocabulary without merges: ASCII, BOS, EOS, and words up to VOCABULARY_SIZE.

    No token is a part of a character: llama.cpp's server reports no probabilities beside half a character.
    """
    symbols = [chr(byte) if 33 <= byte < 127 else chr(256 + byte) for byte in range(127)]
    symbols += [
        chr(289)
    ]  # GPT-2's symbols: itself if printable, else counted on from 256; DEL follows space
    words = [f"word{index}" for index in range(VOCABULARY_SIZE - len(symbols) - 2)]
    kinds = gguf.GGUFValueType
    control = int(gguf.TokenType.CONTROL)
    types = [int(gguf.TokenType.NORMAL)] * VOCABULARY_SIZE
    types[BOS_ID] = types[EOS_ID] = control
    return {
        "tokenizer.ggml.model": ("gpt2", kinds.STRING),
        "tokenizer.ggml.pre": ("gpt-2", kinds.STRING),
        "tokenizer.ggml.tokens": ([*symbols, "<bos>", "<eos>", *words], kinds.ARRAY),
        "tokenizer.ggml.token_type": (types, kinds.ARRAY),
        "tokenizer.ggml.merges": (
            ["w o"],
            kinds.ARRAY,
        ),  # llama.cpp insists on a list that is not empty
        "tokenizer.ggml.bos_token_id": (BOS_ID, kinds.UINT32),
        "tokenizer.ggml.eos_token_id": (EOS_ID, kinds.UINT32),
        "tokenizer.ggml.add_bos_token": (False, kinds.BOOL),
    }


# ----- the source: a Transformers model --------------------------------------------------------------------------


def _random_model(plan: Recipe, num_tokens: int, hidden_size: int, seed: int) -> Any:
    config_class, model_class = _classes(plan.family)
    fields: dict[str, Any] = {
        "vocab_size": num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": plan.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": plan.is_tied,
        "pad_token_id": None,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if plan.family not in ("qwen2", "phi3"):  # theirs is hidden_size / heads
        fields["head_dim"] = plan.head_dim if hidden_size == 64 else hidden_size // 4
    fields |= plan.fields
    if partial := fields.get("rope_parameters", {}).get("partial_rotary_factor"):
        fields["partial_rotary_factor"] = (
            partial  # where older releases of Transformers look for it
        )
    config = config_class(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, is_centred=plan.family.startswith("gemma"))
    return model


def _randomise(name: str, parameter: torch.Tensor, *, is_centred: bool) -> None:
    """Values that make every mistake visible: norms unlike each other, attention neither flat nor one-hot."""
    parameter.normal_()
    if "norm" in name:
        parameter.mul_(0.2).add_(0.0 if is_centred else 1.0)
    elif parameter.dim() == 1:
        parameter.mul_(0.3)
    elif "embed_tokens" in name:
        parameter.mul_(0.2)
    else:
        parameter.mul_(1.5 * parameter.shape[-1] ** -0.5)


def _classes(family: str) -> tuple[Any, Any]:
    if family == "llama":
        from transformers.models.llama.configuration_llama import LlamaConfig as Config
        from transformers.models.llama.modeling_llama import LlamaForCausalLM as Model
    elif family == "mixtral":
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM as Model
    elif family == "qwen2":
        from transformers.models.qwen2.configuration_qwen2 import Qwen2Config as Config
        from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM as Model
    elif family == "qwen3":
        from transformers.models.qwen3.configuration_qwen3 import Qwen3Config as Config
        from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM as Model
    elif family == "gemma2":
        from transformers.models.gemma2.configuration_gemma2 import Gemma2Config as Config
        from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM as Model
    elif family == "gemma3":
        from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig as Config
        from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM as Model
    else:
        from transformers.models.phi3.configuration_phi3 import Phi3Config as Config
        from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM as Model
    return Config, Model


# ----- the conversion, a second time --------------------------------------------------------------------------------

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """The model's weights as llama.cpp's converter names and orders them, float32."""
    family = model.config.model_type.removesuffix("_text")
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        if family.startswith("gemma") and "norm" in name:
            values = values + np.float32(1.0)
        if family in ("llama", "mixtral") and (match := re.search(r"\.([qk])_proj\.", name)):
            config = model.config
            is_query = match[1] == "q"
            values = _permute(
                values, config.num_attention_heads if is_query else config.num_key_value_heads
            )
        if name.endswith("experts.gate_up_proj"):
            prefix = _block(name)
            gate, up = np.split(values, 2, axis=1)
            tensors[f"{prefix}ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
            tensors[f"{prefix}ffn_up_exps.weight"] = np.ascontiguousarray(up)
        elif name.endswith("experts.down_proj"):
            tensors[f"{_block(name)}ffn_down_exps.weight"] = values
        else:
            tensors[_gguf_name(name, family)] = values
    return tensors | _rope_tensors(model)


def _permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's converter: LlamaModel.permute."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def _block(name: str) -> str:
    return f"blk.{name.split('.')[2]}."


def _gguf_name(name: str, family: str) -> str:
    stem, _, kind = name.rpartition(".")
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{kind}"
    part = stem.split(".", 3)[3]
    if family.startswith("gemma") and part in _GEMMA_NORMS:
        return f"{_block(name)}{_GEMMA_NORMS[part]}.{kind}"
    return f"{_block(name)}{ {**_NAMES, 'post_attention_layernorm': 'ffn_norm'}[part] }.{kind}"


def _rope_tensors(model: Any) -> dict[str, np.ndarray]:
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        rotary = model.model.rotary_emb
        plain, _ = type(rotary).compute_default_rope_parameters(model.config)
        return {"rope_freqs.weight": (plain / rotary.inv_freq).numpy()}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


# ----- the file -----------------------------------------------------------------------------------------------------


def _add_metadata(writer: gguf.GGUFWriter, plan: Recipe, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(
        f"tiny {plan.family}".replace("phi3", "phi")
    )  # llama.cpp looks for Phi-3's tokens by name
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    extra = dict(plan.metadata)
    extra.setdefault("rope.dimension_count", head_dim)
    if plan.family != "gemma3":
        extra["rope.freq_base"] = config.rope_parameters["rope_theta"]
    if plan.family == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    add: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        float: writer.add_float32,
        int: writer.add_uint32,
    }
    for key, value in extra.items():
        add[type(value)](f"{writer.arch}.{key}", value)


def _element_type(value: Any, value_type: Any) -> tuple[Any, ...]:
    if value_type != gguf.GGUFValueType.ARRAY:
        return ()
    kinds = {str: "STRING", int: "INT32", float: "FLOAT32"}
    return (gguf.GGUFValueType[kinds[type(value[0])]],)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.ndim == 1 or values.shape[-1] % block_size or "ffn_gate_inp" in name:
        kind = gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        return
    try:
        blocks = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        from ollatune.gguf.codecs import quantize
        from ollatune.gguf.types import GGMLType

        blocks = quantize(torch.from_numpy(values), GGMLType[type_name]).numpy()
    writer.add_tensor(name, blocks, raw_dtype=kind)
