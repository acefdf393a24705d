"""How long the phases of a run will take; the speeds of products and of decoding are measured here, in a moment."""

from __future__ import annotations

import time

import torch
from torch.nn import functional

from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.load import TensorSource
from ollatune.modeling.memory import MemoryEstimate, ModelSizes
from ollatune.training.environment import DTYPES
from ollatune.training.placement import Placement, computes_on_blocks

_EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a whole fused step reaches."""
_PLAIN_EFFICIENCY = {
    ("adapter", "fp32"): 0.6, ("adapter", "bf16"): 0.25,
    ("all weights", "fp32"): 0.95, ("all weights", "bf16"): 0.45,
}  # fmt: skip
"""The same of Transformers' own layers: quick products leave more of a step to what is between them."""
_REPEATS = 12
_DISK_BYTES_PER_SECOND = 150e6
_PROBE = (256, 1024, 2048)
_PROBE_WEIGHTS = 1 << 20


def phase_seconds(
    config: Config,
    gguf: GGUFFile,
    splits: DatasetSplits,
    placement: Placement,
    memory: MemoryEstimate,
    batch_size: int,
    num_steps: int,
    num_validations: int,
    teacher: ModelSizes | None,
    *,
    is_fused: bool,
) -> dict[str, float]:
    """Seconds by phase, for micro-batches of `batch_size` examples; `is_fused` as in `estimate_memory`."""
    efficiency = _EFFICIENCY
    if not is_fused:
        trained = "adapter" if config.advanced.lora_enabled else "all weights"
        efficiency = _PLAIN_EFFICIENCY[trained, "fp32" if placement.dtype == "fp32" else "bf16"]
    speed = efficiency * measured_flops(placement)
    decoding = 0.0 if placement.mode == "nf4" else _seconds_per_decoded_weight(gguf, placement)
    sizes = memory.sizes
    train = splits.report.splits["train"]
    batches = num_steps * config.training.gradient_accumulation_steps
    share = min(config.training.epochs, batches * batch_size / len(splits.train))
    tokens, targets = train.num_tokens * share, train.num_target_tokens * share
    backward = 1 if config.advanced.lora_enabled else 2
    passes = 1 + backward + (1 if config.training.activation_checkpointing else 0)
    head = 2 * sizes.vocabulary * sizes.width
    flops = tokens * 2 * sizes.linear * passes + targets * head * (1 + backward)
    if teacher is not None:
        flops += tokens * 2 * teacher.linear + targets * 2 * teacher.vocabulary * teacher.width
    training = flops / speed
    on_blocks = computes_on_blocks(config, gguf, placement.dtype, placement.device)
    if placement.mode == "packed" and not on_blocks:
        training += 2 * batches * sizes.total * decoding
    validation = 0.0
    if splits.validation is not None:
        part = splits.report.splits["validation"]
        forward = part.num_tokens * 2 * sizes.linear + part.num_target_tokens * head
        answers = config.validation.samples
        if config.validation.metrics:
            answers = len(splits.validation)
        generated = answers * config.validation.max_new_tokens * 2 * sizes.total
        validation = num_validations * (forward / speed + generated / (speed / 8))
    saves = num_validations + (
        0
        if config.training.checkpoint_every_steps is None
        else num_steps // config.training.checkpoint_every_steps
    )
    stored = sizes.stored_bytes
    return {
        "load": sizes.total * decoding if placement.mode != "packed" else stored / 1e9,
        "step": training,
        "validation": validation,
        "checkpoint": saves
        * (memory.checkpoint_bytes + 4 * sizes.trained)
        / _DISK_BYTES_PER_SECOND,
        "export": 2 * stored / _DISK_BYTES_PER_SECOND + sizes.linear * decoding,
    }


def measured_flops(placement: Placement) -> float:
    """Floating-point operations per second of a large matrix product, here and now."""
    rows, inner, columns = _PROBE
    dtype, device = DTYPES[placement.dtype], placement.device
    inputs, weight = (torch.ones(n, inner, dtype=dtype, device=device) for n in (rows, columns))
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        float(functional.linear(inputs, weight)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * inner * columns / best


def _seconds_per_decoded_weight(gguf: GGUFFile, placement: Placement) -> float:
    """Measured on a piece of the file's largest two-dimensional tensor."""
    source = TensorSource(gguf)
    name = max(
        (n for n, info in gguf.tensors.items() if len(info.shape) == 2),
        key=lambda n: gguf.tensors[n].size_bytes,
    )
    info = source.info(name)
    rows = max(1, min(info.shape[0], _PROBE_WEIGHTS // info.shape[1]))
    blocks = source.mapped(name)[:rows].to(placement.device)
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        float(dequantize(blocks, info.type, dtype=DTYPES[placement.dtype])[0, 0])
        best = min(best, time.perf_counter() - started)
    return best / (rows * info.shape[1])
