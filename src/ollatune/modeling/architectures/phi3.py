"""Architecture `phi3`: Phi-3, Phi-3.5, Phi-4 and their mini models; query/key/value and gate/up stay fused."""

from __future__ import annotations

from typing import Any

from ollatune.modeling.architectures.base import Architecture, ReadTensor
from ollatune.modeling.architectures.rules import TensorRule

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


class Phi3(Architecture):
    """Fused projections, rotation of a part of each head, two sets of rotary factors for short and long contexts.

    llama.cpp computes full attention whatever window the metadata names, and so does what is trained here.
    """

    name = "phi3"
    families = "Phi-3, Phi-3.5, Phi-4, Phi-4-mini"
    transformers_names = ("phi3", "Phi3Config", "Phi3ForCausalLM")
    ignored_prefixes = ("rope_factors_",)

    def layer_rules(self, layer: int) -> list[TensorRule]:
        gguf, hf = f"blk.{layer}.", f"model.layers.{layer}."
        return [
            TensorRule(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight"),
            TensorRule(f"{gguf}ffn_norm.weight", f"{hf}post_attention_layernorm.weight"),
            TensorRule(f"{gguf}attn_qkv.weight", f"{hf}self_attn.qkv_proj.weight"),
            TensorRule(f"{gguf}attn_output.weight", f"{hf}self_attn.o_proj.weight"),
            TensorRule(f"{gguf}ffn_up.weight", f"{hf}mlp.gate_up_proj.weight"),
            TensorRule(f"{gguf}ffn_down.weight", f"{hf}mlp.down_proj.weight"),
        ]

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        sizes = self.sizes
        self.require(
            sizes.head_dim * sizes.num_heads == sizes.hidden_size,
            f"{sizes.num_heads} heads of {sizes.head_dim}",
            f"heads that make up the hidden size {sizes.hidden_size}",
        )
        return {
            "rope_parameters": self._rope(read_tensor, serving_context),
            "original_max_position_embeddings": sizes.rope_scaling.original_context_length,
            # the older releases of Transformers look for it here, the newer ones among the rotary parameters
            "partial_rotary_factor": sizes.rope_dims / sizes.head_dim,
            "sliding_window": None,
        }

    def _rope(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        sizes, scaling = self.sizes, self.sizes.rope_scaling
        partial = {"partial_rotary_factor": sizes.rope_dims / sizes.head_dim}
        if _SHORT not in self.tensors:
            return self.rope_parameters() | partial
        short, long = (read_tensor(name).tolist() for name in (_SHORT, _LONG))
        original = scaling.original_context_length
        if serving_context is not None and serving_context > original:
            # llama.cpp chooses by the context it is given, not by the length of the text (get_rope_factors).
            short = long
        return partial | {
            "rope_type": "longrope",
            "rope_theta": sizes.rope_theta,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            "attention_factor": 1.0
            if scaling.attention_factor is None
            else scaling.attention_factor,
        }
