"""Memory that a training run will need, modelled phase by phase from shapes alone.

The coefficients were measured on SmolLM2-135M; `benchmarks/memory.py` measures real runs to compare.
What is modelled is resident memory of the process on a CPU, or of the device on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ollatune.config.schema import Config
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.architectures import architecture_of
from ollatune.modeling.fast.loss import CHUNK_LOGITS
from ollatune.modeling.packed import KEPT_BYTES

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PHASES = ("load", "step", "validation", "checkpoint", "finish")
_RUNTIME_BYTES = 400 << 20
"""Python, torch, Transformers and a model class, resident before any weight is there."""
_MOMENTS = {"adamw": 2.0, "adam": 2.0, "sgd": 1.0, "adafactor": 0.0, "adamw_8bit": 0.5}
_FILL_BYTES = 192 << 20
"""Decoded pieces and their intermediate values, while dense weights are filled."""
_PACKED_DECODE_BYTES = 64 << 20
"""The same while a packed layer computes."""
_NF4_DECODE_BYTES = 6
"""Per weight of the layer that computes: bitsandbytes decodes it whole, in fp32 and in the type of the products."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256
"""Per weight: four bits, an 8-bit scale for each 64, an fp32 one for each 256 of those."""
_PLAIN_FACTOR = 1.35
"""Transformers' own layers keep this many times the inputs and outputs of their linear layers."""
_PLAIN_ADAPTER_FACTOR = 2.2
"""The same with adapters, whose inputs after dropout are kept besides."""
_MIXED_BYTES = 3
"""Per number that is kept where weights are fp32 and products are not: some are in the one type, some in the other."""
_INSIDE_FACTOR = 1.5
"""Values inside a layer at once, forward or backward, over what is kept of it."""
_GAPS_SHARE = 0.25
"""What the allocator holds in gaps beside a step's activations, as a share of these; 0.13 to 0.43 were seen."""
_RECOMPUTED_GAPS_SHARE = 0.4
"""More of them where layers are computed again, as a share of what is not kept for it; 0.2 to 0.8 were seen."""
_NATIVE_GAPS_SHARE, _NATIVE_GAPS_BYTES = 0.05, 96 << 20
"""The same with the compiled kernels, which keep activations in memory of their own; scratch is among it."""
_JOINED_SHARE = 0.35
"""Gaps left where weights were joined for the fused step, as a share of the decoder's linear layers."""


@dataclass(frozen=True)
class ModelSizes:
    """Counts of weights, and of numbers per token.

    Attributes:
        total: all weights; linear: those of the decoder's linear layers, which every token passes; trained: adapter's
            or all; stored_bytes: of the file's tensors; largest_tensor: weights of the largest one; largest_linear: of
            the decoder's largest linear layer.
        width, vocabulary, layers: of the decoder; inputs_outputs: sum over a layer's linear layers.
        kept: numbers per token and layer that the fused forward pass keeps.
    """

    total: int
    linear: int
    trained: int
    stored_bytes: int
    largest_tensor: int
    largest_linear: int
    width: int
    vocabulary: int
    layers: int
    inputs_outputs: int
    kept: int


def model_sizes(gguf: GGUFFile, config: Config) -> ModelSizes:
    """The sizes of a file's model, trained as `config` says."""
    architecture = architecture_of(gguf.metadata, gguf.tensors)
    tensors = gguf.tensors.values()
    shapes = {
        rule.hf_name: gguf.tensors[rule.gguf_name].shape for rule in architecture.present_rules()
    }
    linear = {
        name: shape
        for name, shape in shapes.items()
        if ".layers." in name and len(shape) >= 2 and "norm" not in name
    }
    layers = 1 + max(_layer(name) for name in linear)
    vocabulary, width = next(s for n, s in shapes.items() if "embed" in n)
    sides = sum(shape[-2] + shape[-1] for shape in linear.values()) // layers
    outputs = sum(shape[-2] for shape in linear.values()) // layers
    total = sum(math.prod(info.shape) for info in tensors)
    return ModelSizes(
        total=total,
        linear=sum(math.prod(shape) for shape in linear.values()),
        trained=_adapter_weights(linear, layers, config) if config.advanced.lora_enabled else total,
        stored_bytes=sum(info.size_bytes for info in tensors),
        largest_tensor=max(math.prod(info.shape) for info in tensors),
        largest_linear=max(math.prod(shape[-2:]) for shape in linear.values()),
        width=width,
        vocabulary=vocabulary,
        layers=layers,
        inputs_outputs=sides,
        kept=outputs + width,
    )


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _adapter_weights(linear: dict[str, tuple[int, ...]], layers: int, config: Config) -> int:
    advanced = config.advanced
    chosen = {  # a router is no linear layer to Transformers
        n: s for n, s in linear.items() if len(s) == 2 and n.endswith("_proj.weight")
    }
    if not isinstance(advanced.lora_target_modules, str):
        wanted = tuple(advanced.lora_target_modules)
        chosen = {n: s for n, s in chosen.items() if n.split(".")[-2] in wanted}
    first = 0 if advanced.lora_layers is None else layers - advanced.lora_layers
    return sum(
        advanced.lora_rank * sum(shape) + (shape[0] if advanced.use_dora else 0)
        for name, shape in chosen.items()
        if _layer(name) >= first
    )


@dataclass(frozen=True)
class Rows:
    """The heaviest rows of a run, in tokens, and the targets among them: of training and of validation."""

    tokens: int
    targets: int
    validation_tokens: int
    validation_targets: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part (of the training step, the heaviest moment as a rule) and by phase."""

    parts: dict[str, int]
    phases: dict[str, int]
    sizes: ModelSizes
    checkpoint_bytes: int

    @property
    def total_bytes(self) -> int:
        """The peak of the run."""
        return max(self.phases.values())

    @property
    def heaviest_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase])

    def as_dict(self) -> dict[str, Any]:
        return {
            "total_bytes": self.total_bytes,
            "heaviest_phase": self.heaviest_phase,
            "phases": self.phases,
            "parts": self.parts,
            "checkpoint_bytes": self.checkpoint_bytes,
        }


def weights_bytes(sizes: ModelSizes, *, mode: str, dtype: str) -> int:
    """What the frozen weights take in `mode`."""
    width = DTYPE_BYTES[dtype]
    if mode == "packed":
        return sizes.stored_bytes
    if mode == "nf4":
        return int(sizes.linear * _NF4_BYTES) + (sizes.total - sizes.linear) * width
    return sizes.total * width


def estimate_memory(
    gguf: GGUFFile,
    config: Config,
    *,
    mode: str,
    dtype: str,
    rows: Rows,
    is_fused: bool,
    is_native: bool = False,
    teacher_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate for micro-batches no heavier than `rows`.

    `is_fused` says whether the fused forward pass is used, `is_native` whether compiled kernels compute it.
    """
    sizes = model_sizes(gguf, config)
    is_full = not config.advanced.lora_enabled
    weights = weights_bytes(sizes, mode=mode, dtype="fp32" if is_full else dtype)
    decoding = {
        "packed": 0 if is_native else _PACKED_DECODE_BYTES,
        "nf4": _NF4_DECODE_BYTES * sizes.largest_linear,
    }.get(mode, 0)
    own = 0 if is_full else 4 * sizes.trained  # an adapter's weights; all weights are the base's
    moments = _moment_bytes(sizes, config)
    gradients = 4 * sizes.trained
    is_mixed = is_full and dtype != "fp32"
    # Autocast keeps the weights in the products' type until the way back.
    copies = sizes.total * DTYPE_BYTES[dtype] if is_mixed else 0
    width = _MIXED_BYTES if is_mixed else DTYPE_BYTES[dtype]
    everything = _activation_bytes(sizes, config, rows.tokens, width, is_fused=is_fused)
    activations, saved = everything, 0
    if config.training.activation_checkpointing:
        decodes = mode == "packed" and not is_native
        activations = _recomputed_bytes(
            sizes, config, rows.tokens, width, is_fused=is_fused, is_packed=decodes
        )
        saved = everything - activations
    logits = _logit_bytes(sizes, dtype, rows.targets, 3 if config.distillation.teacher else 2)
    gaps = int(_GAPS_SHARE * activations)
    if is_native:
        gaps = int(_NATIVE_GAPS_SHARE * activations) + _NATIVE_GAPS_BYTES
        if config.distillation.teacher is None:  # one chunk in bf16, which becomes its gradient
            logits = DTYPE_BYTES[dtype] * _chunk(sizes, rows.targets)
    elif is_fused and mode == "dense":
        gaps += int(_JOINED_SHARE * sizes.linear * DTYPE_BYTES[dtype])
    if not is_native:
        gaps += int(_RECOMPUTED_GAPS_SHARE * max(0, saved))
    parts = {
        "runtime": _RUNTIME_BYTES,
        "weights": weights + decoding,
        "weights as products take them": copies,
        "teacher": teacher_bytes,
        "adapter": own,
        "gradients": gradients,
        "moments": moments,
        "activations": activations,
        "logits": logits,
        "gaps": gaps,
    }
    resident = _RUNTIME_BYTES + weights + teacher_bytes
    forward = int(
        _INSIDE_FACTOR * sizes.inputs_outputs * rows.validation_tokens * DTYPE_BYTES[dtype]
    )
    trained = own + moments
    largest = 4 * sizes.largest_tensor
    phases = {
        "load": resident + min(largest, _FILL_BYTES) + decoding,
        "step": sum(parts.values()),
        "validation": resident + decoding + trained + gradients + forward
        + _logit_bytes(sizes, dtype, rows.validation_targets, 2),
        "checkpoint": resident + trained + gradients,
        "finish": resident + trained + gradients + 8 * sizes.trained,
    }  # fmt: skip
    return MemoryEstimate(parts, phases, sizes, checkpoint_bytes(sizes, config))


def checkpoint_bytes(sizes: ModelSizes, config: Config) -> int:
    """Size of one checkpoint: what is trained, in fp32, and the optimiser's state."""
    return 4 * sizes.trained + _moment_bytes(sizes, config) + (1 << 20)


def _moment_bytes(sizes: ModelSizes, config: Config) -> int:
    return int(4 * _MOMENTS[config.training.optimizer] * sizes.trained)


def _layer_numbers(sizes: ModelSizes, config: Config, *, is_fused: bool) -> tuple[float, float]:
    """Numbers per token and layer: kept for backward, and inside the layer that is being computed."""
    factor = _PLAIN_ADAPTER_FACTOR if config.advanced.lora_enabled else _PLAIN_FACTOR
    kept = sizes.kept if is_fused else factor * sizes.inputs_outputs
    return kept, _INSIDE_FACTOR * kept


def _activation_bytes(
    sizes: ModelSizes, config: Config, tokens: int, width: int, *, is_fused: bool
) -> int:
    """What forward keeps for backward, and the inside of the layer that is being computed."""
    kept, inside = _layer_numbers(sizes, config, is_fused=is_fused)
    return int(tokens * width * (sizes.layers * kept + inside))


def _recomputed_bytes(
    sizes: ModelSizes, config: Config, tokens: int, width: int, *, is_fused: bool, is_packed: bool
) -> int:
    """The same where only layers' inputs are kept. A layer in blocks keeps some of its decoded weights meanwhile."""
    kept, inside = _layer_numbers(sizes, config, is_fused=is_fused)
    decoded = min(KEPT_BYTES, sizes.linear // sizes.layers * width) if is_packed else 0
    return decoded + int(tokens * width * (sizes.layers * sizes.width + inside + kept))


def _logit_bytes(sizes: ModelSizes, dtype: str, targets: int, copies: int) -> int:
    """Logits of one chunk of targets in fp32 and their gradient; bf16 and fp16 besides where they are computed so."""
    return _chunk(sizes, targets) * (4 * copies + (0 if dtype == "fp32" else 4))


def _chunk(sizes: ModelSizes, targets: int) -> int:
    """Logits computed at a time."""
    return min(CHUNK_LOGITS, sizes.vocabulary * max(1, targets))
