"""Architectures `qwen2` (Qwen 2, 2.5) and `qwen3` (dense)."""

from __future__ import annotations

from typing import Any

from ollatune.modeling.architectures.base import Architecture, ReadTensor
from ollatune.modeling.architectures.rules import TensorRule


class Qwen2(Architecture):
    """Llama's layout with biases on query, key and value; no permutation of heads."""

    name = "qwen2"
    families = "Qwen 2, Qwen 2.5, DeepSeek-R1 distilled Qwen"
    transformers_names = ("qwen2", "Qwen2Config", "Qwen2ForCausalLM")

    def layer_rules(self, layer: int) -> list[TensorRule]:
        gguf, hf = f"blk.{layer}.", f"model.layers.{layer}."
        return [
            TensorRule(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight"),
            TensorRule(f"{gguf}ffn_norm.weight", f"{hf}post_attention_layernorm.weight"),
            TensorRule(f"{gguf}attn_output.weight", f"{hf}self_attn.o_proj.weight"),
            *(
                TensorRule(f"{gguf}attn_{part}.{kind}", f"{hf}self_attn.{part}_proj.{kind}")
                for part in ("q", "k", "v")
                for kind in self.projection_kinds()
            ),
            *(
                TensorRule(f"{gguf}ffn_{part}.weight", f"{hf}mlp.{part}_proj.weight")
                for part in ("gate", "up", "down")
            ),
        ]

    def projection_kinds(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        self.require_whole_heads()
        self.require(
            self.sizes.head_dim * self.sizes.num_heads == self.sizes.hidden_size,
            f"{self.sizes.num_heads} heads of {self.sizes.head_dim}",
            f"heads that make up the hidden size {self.sizes.hidden_size}",
        )
        return {
            "rope_parameters": self.rope_parameters(),
            "use_sliding_window": False,
        }


class Qwen3(Qwen2):
    """Qwen 2's layout without biases, with a norm on each query and key head, and a free head size."""

    name = "qwen3"
    families = "Qwen 3 (dense)"
    transformers_names = ("qwen3", "Qwen3Config", "Qwen3ForCausalLM")

    def layer_rules(self, layer: int) -> list[TensorRule]:
        return [
            *super().layer_rules(layer),
            *(
                TensorRule(
                    f"blk.{layer}.attn_{part}_norm.weight",
                    f"model.layers.{layer}.self_attn.{part}_norm.weight",
                )
                for part in ("q", "k")
            ),
        ]

    def projection_kinds(self) -> tuple[str, ...]:
        return ("weight",)

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        self.require_whole_heads()
        return {
            "head_dim": self.sizes.head_dim,
            "rope_parameters": self.rope_parameters(),
            "attention_bias": False,
            "use_sliding_window": False,
        }
