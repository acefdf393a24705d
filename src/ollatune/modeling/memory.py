"""Memory that a training run will need, modelled part by part from shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ollatune.config.schema import Config
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.architectures import architecture_of
from ollatune.modeling.fast.loss import CHUNK_LOGITS
from ollatune.modeling.packed import KEPT_BYTES

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_RUNTIME_BYTES = 450 << 20
"""Python, torch and Transformers themselves, resident before any weight is there."""
_OPTIMIZER_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 0, "adamw_8bit": 0.5}
_PACKED_SCRATCH_BYTES = 192 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. `peak` is weights + trained + activations + logits + runtime, the moment of the backward pass."""

    total_parameters: int
    trainable_parameters: int
    weights_bytes: int
    trained_bytes: int
    activations_bytes: int
    logits_bytes: int
    runtime_bytes: int
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.trained_bytes + self.activations_bytes
            + self.logits_bytes + self.runtime_bytes
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        parts = {
            name: values[name]
            for name in (
                "weights_bytes", "trained_bytes", "activations_bytes", "logits_bytes", "runtime_bytes",
            )
        }  # fmt: skip
        return {
            "total_bytes": self.total_bytes,
            "parts": parts,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def estimate_memory(
    gguf: GGUFFile, config: Config, *, mode: str, dtype: str, row_tokens: int, row_targets: int
) -> MemoryEstimate:
    """Estimate for micro-batches of `row_tokens` tokens, `row_targets` of them targets.

    Activations kept for the backward pass, per token and layer: the layer's input twice (both residual branches), the
    normalised inputs, query, key, value and attention output, and gate, up and their product.
    """
    architecture = architecture_of(gguf.metadata, gguf.tensors)
    tensors = gguf.tensors.values()
    total = sum(math.prod(info.shape) for info in tensors)
    width_bytes = _DTYPE_BYTES[dtype]
    shapes = {
        rule.hf_name: gguf.tensors[rule.gguf_name].shape for rule in architecture.present_rules()
    }
    linear = {
        name: shape
        for name, shape in shapes.items()
        if ".layers." in name and len(shape) == 2 and name.endswith(".weight")
    }
    advanced = config.advanced
    if advanced.lora_enabled:
        chosen = linear
        if not isinstance(advanced.lora_target_modules, str):
            wanted = tuple(advanced.lora_target_modules)
            chosen = {n: s for n, s in linear.items() if n.split(".")[-2] in wanted}
        if advanced.lora_layers is not None:
            num_layers = 1 + max(int(n.split(".layers.")[1].split(".")[0]) for n in linear)
            first = num_layers - advanced.lora_layers
            chosen = {
                n: s
                for n, s in chosen.items()
                if int(n.split(".layers.")[1].split(".")[0]) >= first
            }
        trainable = sum(advanced.lora_rank * (rows + columns) for rows, columns in chosen.values())
    else:
        trainable = total
    moments = _OPTIMIZER_MOMENTS[config.training.optimizer]
    trained = int(trainable * 4 * (1 + moments + (1 if advanced.lora_enabled else 0)))
    packed = sum(info.size_bytes for info in tensors)
    weights = packed + _PACKED_SCRATCH_BYTES if mode == "packed" else total * width_bytes
    per_token = sum(rows for rows, _ in linear.values()) + sum(
        columns for _, columns in linear.values()
    )
    activations = per_token * row_tokens * width_bytes
    if config.training.activation_checkpointing:
        layers = max(1, sum(1 for n in linear if n.endswith(("o_proj.weight",))))
        activations = activations // layers + layers * row_tokens * width_bytes * min(
            s[1] for s in linear.values()
        )
        if mode == "packed":
            layer = sum(math.prod(shape) for shape in linear.values()) // layers * width_bytes
            activations += min(KEPT_BYTES, layer)
    vocabulary = max(s[0] for n, s in shapes.items() if "embed" in n)
    logits = 3 * 4 * min(CHUNK_LOGITS, vocabulary * max(1, row_targets))
    return MemoryEstimate(
        total, trainable, weights, trained, activations, logits, _RUNTIME_BYTES,
        int(trainable * 4 * (1 + moments)) + (1 << 20),
    )  # fmt: skip
