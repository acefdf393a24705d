"""What a run will take, before it is begun: memory, time and disk of every phase, against what the machine has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ollatune.base.files import free_bytes
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.catalog import load_catalog
from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.data.loader import BatchLoader
from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.decoder import SUPPORTED_MODELS
from ollatune.modeling.load import Mode, TensorSource
from ollatune.modeling.memory import (
    MemoryEstimate,
    ModelSizes,
    Rows,
    estimate_memory,
    model_sizes,
    weights_bytes,
)
from ollatune.modeling.opened import OpenBase
from ollatune.training.environment import DTYPES
from ollatune.training.placement import Placement, free_memory_bytes
from ollatune.training.teaching import teacher_mode

_EFFICIENCY = 0.6
"""Share of the speed of one large matrix product that a whole step reaches."""
_DISK_BYTES_PER_SECOND = 150e6
_PROBE = (256, 1024, 2048)
_PROBE_WEIGHTS = 1 << 20
_SHORTER = (4096, 2048, 1024, 512)

Estimator = Callable[[Config, Mode, int], MemoryEstimate]
"""From a configuration, how the base is held, and examples in a micro-batch."""


@dataclass(frozen=True)
class RunEstimate:
    """Bytes and seconds by phase; `advice` is what to change where memory will not do, in order."""

    memory: MemoryEstimate
    seconds: dict[str, float]
    disk: dict[str, int]
    memory_free_bytes: int
    disk_free_bytes: int
    advice: list[str]

    @property
    def fits_memory(self) -> bool:
        return self.memory.total_bytes <= self.memory_free_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory.as_dict(),
            "memory_free_bytes": self.memory_free_bytes,
            "fits_memory": self.fits_memory,
            "seconds": {phase: round(value, 1) for phase, value in self.seconds.items()},
            "disk": self.disk,
            "disk_bytes": sum(self.disk.values()),
            "disk_free_bytes": self.disk_free_bytes,
            "advice": self.advice,
        }


def estimate_run(
    config: Config,
    base: OpenBase,
    splits: DatasetSplits,
    placement: Placement,
    *,
    batch_size: int,
    num_steps: int,
    num_validations: int,
    teacher: OpenBase | None = None,
) -> RunEstimate:
    """Model the run from shapes and data; speeds of products and of decoding are measured here, in a moment."""
    teacher_sizes = None if teacher is None else model_sizes(teacher.gguf, config)
    memory_of = _estimator(base, splits, placement, _teacher_bytes(config, teacher, placement))
    memory = memory_of(config, placement.mode, batch_size)
    free = free_memory_bytes(placement.device) + _already_resident(placement.device)
    advice: list[str] = []
    if memory.total_bytes > free:
        advice = _advice(config, base, placement.mode, batch_size, memory_of, free)
    times = _seconds(
        config, base.gguf, splits, placement, memory, batch_size, num_steps, num_validations,
        teacher_sizes,
    )  # fmt: skip
    return RunEstimate(
        memory=memory,
        seconds=times,
        disk=_disk(config, memory, base.gguf),
        memory_free_bytes=free,
        disk_free_bytes=free_bytes(config.output.folder),
        advice=advice,
    )


def plan_estimate(
    config: Config,
    base: OpenBase,
    splits: DatasetSplits,
    placement: Placement,
    loader: BatchLoader,
    num_steps: int,
    teacher: OpenBase | None,
) -> RunEstimate:
    """`estimate_run` of the run that `loader` feeds, with as many validations as it will have."""
    epochs = min(config.training.epochs, -(-num_steps // max(1, loader.steps_per_epoch(0))))
    every = config.training.evaluate_every_steps
    return estimate_run(
        config, base, splits, placement,
        batch_size=loader.settings.batch_size, num_steps=num_steps,
        num_validations=epochs + (num_steps // every if every else 0), teacher=teacher,
    )  # fmt: skip


def warn_if_too_large(
    config: Config,
    base: OpenBase,
    splits: DatasetSplits,
    placement: Placement,
    teacher: OpenBase | None,
) -> None:
    """Say before anything is loaded that memory will probably not do, and what would."""
    batch_size = config.training.batch_size
    size = batch_size if isinstance(batch_size, int) else 1
    bytes_of_teacher = _teacher_bytes(config, teacher, placement)
    memory = _estimator(base, splits, placement, bytes_of_teacher)
    needed = memory(config, placement.mode, size).total_bytes
    free = free_memory_bytes(placement.device) + _already_resident(placement.device)
    if needed <= free:
        return
    advice = _advice(config, base, placement.mode, size, memory, free)
    get_logger("training").warning(
        "This run will probably not fit: about %s are needed, %s are free. One after the other:\n  %s",
        format_bytes(needed), format_bytes(free), "\n  ".join(advice) or "a larger machine",
    )  # fmt: skip


def _teacher_bytes(config: Config, teacher: OpenBase | None, placement: Placement) -> int:
    """What the teacher's weights take; the mode is `load_teacher`'s."""
    if teacher is None:
        return 0
    mode = teacher_mode(config, teacher, placement)
    return weights_bytes(model_sizes(teacher.gguf, config), mode=mode, dtype=placement.dtype)


def _estimator(
    base: OpenBase, splits: DatasetSplits, placement: Placement, teacher_bytes: int
) -> Estimator:
    def memory_of(changed: Config, mode: Mode, batch_size: int) -> MemoryEstimate:
        return estimate_memory(
            base.gguf, changed, mode=mode, dtype=placement.dtype,
            rows=heaviest_rows(changed, splits, batch_size), is_fused=is_fused(changed, base),
            teacher_bytes=teacher_bytes,
        )  # fmt: skip

    return memory_of


def _already_resident(device: torch.device) -> int:
    """The estimate counts this process as a whole, what is free does not."""
    if device.type != "cpu":
        return 0
    import psutil

    return int(psutil.Process().memory_info().rss)


def is_fused(config: Config, base: OpenBase) -> bool:
    """Whether the fused forward pass will be used, as far as the file can tell."""
    from ollatune.modeling.architectures import architecture_of

    if (
        not config.training.fast_path
        or not config.advanced.lora_enabled
        or config.advanced.use_dora
    ):
        return False
    architecture = architecture_of(base.gguf.metadata, base.gguf.tensors)
    return architecture.model_class().__name__ in SUPPORTED_MODELS


def heaviest_rows(config: Config, splits: DatasetSplits, batch_size: int) -> Rows:
    """The longest examples together, as one micro-batch; likewise in validation."""
    longest, targets = _heaviest(splits.train, batch_size, config.model.context_window)
    if (budget := config.data.tokens_per_batch) is not None:
        top = int(splits.train.lengths.max())
        longest = targets = max(top, min(budget, int(splits.train.lengths.sum())))
    validation = (0, 0)
    if splits.validation is not None:
        validation = _heaviest(
            splits.validation, config.validation.batch_size, config.model.context_window
        )
    return Rows(longest, targets, *validation)


def _heaviest(examples: Any, count: int, window: int) -> tuple[int, int]:
    lengths = np.sort(np.minimum(np.asarray(examples.lengths), window))[::-1]
    targets = np.sort(np.minimum(np.asarray(examples.num_targets), window))[::-1]
    return int(lengths[:count].sum()), int(targets[:count].sum())


# ----- time ----------------------------------------------------------------------------------------------------------


def _seconds(
    config: Config,
    gguf: GGUFFile,
    splits: DatasetSplits,
    placement: Placement,
    memory: MemoryEstimate,
    batch_size: int,
    num_steps: int,
    num_validations: int,
    teacher: ModelSizes | None,
) -> dict[str, float]:
    speed = _EFFICIENCY * measured_flops(placement)
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
    if placement.mode == "packed":
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
    for _ in range(4):
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


def _disk(config: Config, memory: MemoryEstimate, gguf: GGUFFile) -> dict[str, int]:
    """Bytes that the run and the export of its result will leave or need in passing."""
    sizes = memory.sizes
    trained = 4 * sizes.trained
    rewritten = sizes.linear if config.advanced.lora_enabled else sizes.total
    return {
        "checkpoints": memory.checkpoint_bytes * (config.training.keep_checkpoints + 2),
        "best_model": 2 * trained,  # the new one is whole before the old one goes
        "adapter": trained if config.advanced.lora_enabled else 0,
        "export": max(sizes.stored_bytes, int(rewritten * 34 / 32) + sizes.total - rewritten),
    }


# ----- advice --------------------------------------------------------------------------------------------------------


def _advice(
    config: Config,
    base: OpenBase,
    mode: Mode,
    batch_size: int,
    memory_of: Estimator,
    free: int,
) -> list[str]:
    """Changes, one on top of the other, until the run fits; a smaller model of the catalog where none does."""
    changed, lines = config, list[str]()

    def fits(line: str, **sections: dict[str, Any]) -> bool:
        nonlocal changed
        values = changed.model_dump()
        for section, fields in sections.items():
            values[section] |= fields
        candidate = Config.model_validate(values)
        total = memory_of(candidate, mode, batch_size).total_bytes
        if total < memory_of(changed, mode, batch_size).total_bytes or not sections:
            changed = candidate
            lines.append(f"{line}: {format_bytes(total)}")
        return total <= free

    if not config.advanced.lora_enabled and fits(
        "train an adapter (--set advanced.lora_enabled=true)", advanced={"lora_enabled": True}
    ):
        return lines
    if mode == "dense" and changed.advanced.lora_enabled:
        mode = "packed"
        if fits("keep the weights packed (--set model.quantization=as-served)"):
            return lines
    if batch_size > 1:
        product = batch_size * config.training.gradient_accumulation_steps
        batch_size = 1
        if fits(f"--batch-size 1 --gradient-accumulation-steps {product}"):
            return lines
    if not config.training.activation_checkpointing and fits(
        "--set training.activation_checkpointing=true", training={"activation_checkpointing": True}
    ):
        return lines
    for window in _SHORTER:
        if window < changed.model.context_window and fits(
            f"--set model.context_window={window}", model={"context_window": window}
        ):
            return lines
    smaller = smaller_model(base, free, config.advanced.lora_rank)
    if smaller is not None:
        lines.append(f"or a smaller model: --model {smaller}")
    return lines


def smaller_model(base: OpenBase, free: int, rank: int) -> str | None:
    """The largest trainable model of the catalog that fits `free`, of the same architecture if there is one."""
    entries = [
        entry
        for entry in load_catalog().entries()
        if entry.is_trainable and entry.training_memory_bytes("lora-packed", rank=rank) <= free
    ]
    same = [entry for entry in entries if entry.architecture == base.architecture]
    best = max(same or entries, key=lambda entry: entry.parameters, default=None)
    return None if best is None else best.name
