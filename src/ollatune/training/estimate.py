"""What a run will take, before it is begun: memory, time and disk of every phase, against what the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ollatune.base.files import free_bytes
from ollatune.base.log import get_logger
from ollatune.base.memory import resident_bytes
from ollatune.base.text import format_bytes
from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.data.loader import BatchLoader
from ollatune.modeling.fast.decoder import SUPPORTED_MODELS
from ollatune.modeling.load import Mode
from ollatune.modeling.memory import (
    MemoryEstimate,
    Rows,
    estimate_memory,
    model_sizes,
    weights_bytes,
)
from ollatune.modeling.opened import OpenBase
from ollatune.training.advice import Estimator, advice_to_fit
from ollatune.training.disk import disk_bytes
from ollatune.training.durations import phase_seconds
from ollatune.training.placement import Placement, free_memory_bytes, kernels_compute
from ollatune.training.teaching import teacher_mode


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
        advice = advice_to_fit(config, base, placement.mode, batch_size, memory_of, free)
    times = phase_seconds(
        config, base.gguf, splits, placement, memory, batch_size, num_steps, num_validations,
        teacher_sizes, is_fused=is_fused(config, base),
    )  # fmt: skip
    return RunEstimate(
        memory=memory,
        seconds=times,
        disk=disk_bytes(config, memory.sizes),
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
    advice = advice_to_fit(config, base, placement.mode, size, memory, free)
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
            is_native=is_fused(changed, base) and kernels_compute(changed, placement.dtype, placement.device),
            teacher_bytes=teacher_bytes,
        )  # fmt: skip

    return memory_of


def _already_resident(device: torch.device) -> int:
    """The estimate counts this process as a whole, what is free does not."""
    if device.type != "cpu":
        return 0
    return resident_bytes()


def is_fused(config: Config, base: OpenBase) -> bool:
    """Whether the fused forward pass will be used, as far as the file can tell."""
    from ollatune.modeling.architectures import architecture_of

    if (
        not config.training.fast_path
        or config.training.torch_compile
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
