"""Architecture `llama`: Llama 1 to 3.3, Mistral 7B, SmolLM2 and their kin; with experts, Mixtral.

llama.cpp computes all of them with full attention: a sliding window in the metadata (Mistral 7B v0.1) is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ollatune.modeling.architectures.base import Architecture, ReadTensor
from ollatune.modeling.architectures.rules import InterleavedHeads, StackedHalf, TensorRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_FACTORS = "rope_freqs.weight"

_LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What every Llama 3.1, 3.2 and 3.3 uses; only `factor` differs between them."""


class Llama(Architecture):
    """Dense models of architecture `llama`."""

    name = "llama"
    families = "Llama 2, 3, 3.1, 3.2, 3.3 · Mistral 7B · SmolLM2 · neural-chat · TinyLlama · Zephyr"
    transformers_names = ("llama", "LlamaConfig", "LlamaForCausalLM")
    ignored_prefixes = ("rope_freqs.",)

    def layer_rules(self, layer: int) -> list[TensorRule]:
        gguf, hf = f"blk.{layer}.", f"model.layers.{layer}."
        query, key = (
            InterleavedHeads(self.sizes.num_heads),
            InterleavedHeads(self.sizes.num_kv_heads),
        )
        rules = [
            TensorRule(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight"),
            TensorRule(f"{gguf}ffn_norm.weight", f"{hf}post_attention_layernorm.weight"),
        ]
        for kind, optional in (("weight", False), ("bias", True)):
            attention = f"{hf}self_attn."
            rules += [
                TensorRule(f"{gguf}attn_q.{kind}", f"{attention}q_proj.{kind}", query, optional),
                TensorRule(f"{gguf}attn_k.{kind}", f"{attention}k_proj.{kind}", key, optional),
                TensorRule(
                    f"{gguf}attn_v.{kind}", f"{attention}v_proj.{kind}", is_optional=optional
                ),
                TensorRule(
                    f"{gguf}attn_output.{kind}", f"{attention}o_proj.{kind}", is_optional=optional
                ),
            ]
        return rules + self.feed_forward_rules(gguf, hf)

    def feed_forward_rules(self, gguf: str, hf: str) -> list[TensorRule]:
        return [
            TensorRule(
                f"{gguf}ffn_{part}.{kind}",
                f"{hf}mlp.{part}_proj.{kind}",
                is_optional=kind == "bias",
            )
            for part in ("gate", "up", "down")
            for kind in ("weight", "bias")
        ]

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        return {
            "head_dim": self.sizes.head_dim,
            "rope_parameters": self.checked_rope(read_tensor),
            "attention_bias": self._has_any("attn_q.bias", "attn_output.bias"),
            "mlp_bias": self._has_any("ffn_up.bias"),
        }

    def checked_rope(self, read_tensor: ReadTensor) -> dict[str, Any]:
        """The rotary parameters, with Llama 3's named where the file's factors are exactly those."""
        sizes = self.sizes
        self.require_whole_heads()
        scale = self.metadata.number("attention.scale", 0.0)
        self.require(
            scale == 0.0 or math.isclose(scale, sizes.head_dim**-0.5, rel_tol=1e-5),
            f"an attention scale of {scale:g}",
            f"{sizes.head_dim**-0.5:g}",
        )
        parameters = self.rope_parameters()
        if ROPE_FACTORS in self.tensors and parameters["rope_type"] == "default":
            factors = read_tensor(ROPE_FACTORS)
            parameters |= name_llama3_scaling(factors, sizes.rope_theta, sizes.head_dim)
        return parameters

    def prepare_rotary(self, model: PreTrainedModel, read_tensor: ReadTensor) -> None:
        """Divide the frequencies by the file's `rope_freqs.weight`, as llama.cpp does: the served values, exactly."""
        if ROPE_FACTORS not in self.tensors:
            return
        rotary: Any = model.get_submodule("model.rotary_emb")
        frequencies = rope_frequencies(self.sizes.rope_theta, self.sizes.head_dim)
        frequencies = frequencies / (read_tensor(ROPE_FACTORS) * self.sizes.rope_scaling.factor)
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            buffer.copy_(frequencies)

    def _has_any(self, *names: str) -> bool:
        return any(f"blk.0.{name}" in self.tensors for name in names)


class Mixtral(Llama):
    """Architecture `llama` with experts: Mixtral 8x7B and 8x22B."""

    families = "Mixtral 8x7B, 8x22B"
    transformers_names = ("mixtral", "MixtralConfig", "MixtralForCausalLM")

    def feed_forward_rules(self, gguf: str, hf: str) -> list[TensorRule]:
        experts = f"{hf}mlp.experts."
        return [
            TensorRule(f"{gguf}ffn_gate_inp.weight", f"{hf}mlp.gate.weight"),
            TensorRule(f"{gguf}ffn_gate_exps.weight", f"{experts}gate_up_proj", StackedHalf(0)),
            TensorRule(f"{gguf}ffn_up_exps.weight", f"{experts}gate_up_proj", StackedHalf(1)),
            TensorRule(f"{gguf}ffn_down_exps.weight", f"{experts}down_proj"),
        ]

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        scale = self.metadata.number("expert_weights_scale", 1.0)
        self.require(scale in (0.0, 1.0), f"an expert weight scale of {scale:g}", "1")
        return {
            "head_dim": self.sizes.head_dim,
            "rope_parameters": self.checked_rope(read_tensor),
            "num_local_experts": self.sizes.num_experts,
            "num_experts_per_tok": self.sizes.num_experts_used,
            "sliding_window": None,
        }


def llama_or_mixtral(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Llama:
    """The class for a file of architecture `llama`: by the number of experts it states."""
    has_experts = bool(metadata.get("llama.expert_count", 0))
    return (Mixtral if has_experts else Llama)(metadata, tensors)


def rope_frequencies(theta: float, dims: int) -> Tensor:
    """Unscaled rotary frequencies theta^(-2i/dims), float32 [dims/2]."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    return 1.0 / theta**exponents


def llama3_factors(theta: float, dims: int, factor: float) -> Tensor:
    """Divisors of the rotary frequencies of Llama 3.1 and later, float32 [dims/2] (llama.cpp, LlamaModel)."""
    low, high = _LLAMA3_SCALING["low_freq_factor"], _LLAMA3_SCALING["high_freq_factor"]
    turns = _LLAMA3_SCALING["original_max_position_embeddings"] * rope_frequencies(theta, dims)
    turns = turns / (2 * math.pi)  # over the original context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    divisors: Tensor = 1.0 / ((1 - smooth) / factor + smooth)
    return divisors


def name_llama3_scaling(factors: Tensor, theta: float, dims: int) -> dict[str, Any]:
    """Transformers' name for the scaling that gives these factors, or nothing where it is another one.

    The model computes with the factors themselves; the name is for whoever reads or saves the configuration.
    """
    factor = float(factors.max())
    if not torch.allclose(factors, llama3_factors(theta, dims, factor), rtol=1e-4):
        return {}
    return _LLAMA3_SCALING | {"factor": round(factor, 4)}
