"""Architectures `gemma2` and `gemma3` (text): alternating local and global attention, norms stored plus one."""

from __future__ import annotations

from typing import Any

from ollatune.modeling.architectures.base import Architecture, ReadTensor
from ollatune.modeling.architectures.hyperparameters import Hyperparameters
from ollatune.modeling.architectures.rules import CENTRED_NORM, TensorRule

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class Gemma2(Architecture):
    """Every second layer global; soft caps on attention and logits."""

    name = "gemma2"
    families = "Gemma 2 (2b, 9b, 27b)"
    transformers_names = ("gemma2", "Gemma2Config", "Gemma2ForCausalLM")
    attention_implementation = "eager"  # PyTorch's fused attention has no soft cap
    layers_per_global = 2
    large_model_layers = 46
    """The 27B, whose attention is scaled by hidden size / heads and not by head size; told by its layers alone."""

    def layer_rules(self, layer: int) -> list[TensorRule]:
        gguf, hf = f"blk.{layer}.", f"model.layers.{layer}."
        return [
            self.norm_rule(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight"),
            self.norm_rule(
                f"{gguf}post_attention_norm.weight", f"{hf}post_attention_layernorm.weight"
            ),
            self.norm_rule(f"{gguf}ffn_norm.weight", f"{hf}pre_feedforward_layernorm.weight"),
            self.norm_rule(f"{gguf}post_ffw_norm.weight", f"{hf}post_feedforward_layernorm.weight"),
            TensorRule(f"{gguf}attn_output.weight", f"{hf}self_attn.o_proj.weight"),
            *(
                TensorRule(f"{gguf}attn_{part}.weight", f"{hf}self_attn.{part}_proj.weight")
                for part in ("q", "k", "v")
            ),
            *(
                TensorRule(f"{gguf}ffn_{part}.weight", f"{hf}mlp.{part}_proj.weight")
                for part in ("gate", "up", "down")
            ),
        ]

    def norm_rule(self, gguf_name: str, hf_name: str) -> TensorRule:
        return TensorRule(gguf_name, hf_name, CENTRED_NORM)

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        local_theta = self.metadata.number("rope.freq_base_swa", self.sizes.rope_theta)
        self.require(
            local_theta == self.sizes.rope_theta,
            f"rope bases {self.sizes.rope_theta:g} and {local_theta:g}",
            "one base for all layers",
        )
        return {
            **self.gemma_config(),
            "rope_parameters": self.rope_parameters(),
            "sliding_window": self.metadata.integer("attention.sliding_window", 4096),
            "layer_types": self.layer_types(),
            "attn_logit_softcapping": self.soft_cap("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": self.soft_cap("final_logit_softcapping", 30.0),
        }

    def gemma_config(self) -> dict[str, Any]:
        """The fields that Gemma 2 and 3 share."""
        sizes = self.sizes
        self.require_whole_heads()
        is_large = sizes.num_layers == self.large_model_layers
        scalar = sizes.hidden_size // sizes.num_heads if is_large else sizes.head_dim
        return {
            "head_dim": sizes.head_dim,
            "query_pre_attn_scalar": scalar,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
        }

    def soft_cap(self, key: str, default: float) -> float | None:
        """A soft cap on scores, None where there is none. llama.cpp takes 0 as none."""
        return self.metadata.number(key, default) or None

    def layer_types(self) -> list[str]:
        """Per layer its kind of attention: by the file's list or interval, else by the architecture's interval."""
        num_layers = self.sizes.num_layers
        pattern = self.metadata.raw("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            self.require(
                len(pattern) == num_layers,
                f"a sliding window pattern of {len(pattern)} entries",
                f"one for each of the {num_layers} layers",
            )
            return [_LOCAL if is_local else _GLOBAL for is_local in pattern]
        interval = self.metadata.integer("attention.sliding_window_pattern", self.layers_per_global)
        return [
            _GLOBAL if interval and layer % interval == interval - 1 else _LOCAL
            for layer in range(num_layers)
        ]


class Gemma3(Gemma2):
    """Every sixth layer global, its own rope base for local layers, a norm on each query and key head.

    Files that Ollama's converter wrote for its library name or leave out some keys; they are read as Ollama's server
    reads them (`llama-ollama-compat.cpp`, handle_gemma3). Their vision tensors are left alone.
    """

    name = "gemma3"
    families = "Gemma 3 (270m, 1b, 4b, 12b, 27b; text)"
    transformers_names = ("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM")
    attention_implementation = "sdpa"
    layers_per_global = 6
    large_model_layers = 62
    ignored_prefixes = ("v.", "mm.")

    def _read_sizes(self) -> Hyperparameters:
        stated, defaults = self.metadata, {}
        for key, library_key in (("freq_base", "global"), ("freq_base_swa", "local")):
            if stated.has(f"rope.{library_key}.freq_base"):
                defaults[f"rope.{key}"] = stated.raw(f"rope.{library_key}.freq_base")
        if self._is_from_ollama_library():
            defaults.setdefault("rope.freq_base", 1e6)
            defaults["attention.layer_norm_rms_epsilon"] = 1e-6
            if stated.integer("context_length") >= 131072:
                defaults |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
        self.metadata = stated.with_defaults(defaults)
        return super()._read_sizes()

    def _is_from_ollama_library(self) -> bool:
        return (
            not self.metadata.has("attention.layer_norm_rms_epsilon")
            or any(self.metadata.has(f"rope.{kind}.freq_base") for kind in ("global", "local"))
            or self.metadata.has("mm.tokens_per_image")
            or any(
                f"tokenizer.ggml.add_{kind}_token" in self.metadata.values
                for kind in ("padding", "unknown")
            )
            or any(name.startswith(self.ignored_prefixes) for name in self.tensors)
        )

    def layer_rules(self, layer: int) -> list[TensorRule]:
        return [
            *super().layer_rules(layer),
            *(
                self.norm_rule(
                    f"blk.{layer}.attn_{part}_norm.weight",
                    f"model.layers.{layer}.self_attn.{part}_norm.weight",
                )
                for part in ("q", "k")
            ),
        ]

    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        window = self.metadata.integer("attention.sliding_window", 0)
        local_theta = self.metadata.number("rope.freq_base_swa", 10000.0)
        return {
            **self.gemma_config(),
            "rope_parameters": {
                _GLOBAL: self.rope_parameters(),
                _LOCAL: {"rope_type": "default", "rope_theta": local_theta},
            },
            "sliding_window": window or None,
            "layer_types": self.layer_types() if window else [_GLOBAL] * self.sizes.num_layers,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": self.soft_cap("final_logit_softcapping", 0.0),
        }
