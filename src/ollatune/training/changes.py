"""Which settings may change between a checkpoint and the run that goes on from it: free, warned, refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger

FREE_KEYS = (
    "training.keep_checkpoints", "training.checkpoint_every_steps", "training.evaluate_every_steps",
    "training.early_stopping_patience", "training.early_stopping_min_delta", "training.on_non_finite",
    "training.on_loss_spike",
    "training.overfitting_patience", "training.overfitting_gap",
    "training.overfitting_raise_dropout",
    "validation.", "export.", "ollama.", "output.", "distributed.",
    "training.activation_checkpointing", "training.fast_path", "training.native_kernels",
    "training.torch_compile", "advanced.share_prefixes",
    "data.num_workers", "data.prefetch_batches", "data.pin_memory",
)  # fmt: skip
WARN_KEYS = (
    "training.epochs", "training.max_steps", "training.learning_rate", "training.scheduler", "training.scheduler_power",
    "training.warmup_steps", "training.warmup_fraction", "training.min_learning_rate_fraction",
    "training.weight_decay", "training.max_grad_norm", "training.batch_size",
    "training.gradient_accumulation_steps", "training.adam_", "training.label_smoothing",
    "training.deterministic", "advanced.lora_dropout", "model.dtype",
    "model.quantization", "distillation.weight", "distillation.temperature",
    "distillation.quantization",
)  # fmt: skip


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def classify_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Settings that differ between two resolved configurations: `free`, `warn` and `refuse`, each `key: old → new`."""
    before, after = dict(_flat(old)), dict(_flat(new))
    changes: dict[str, list[str]] = {"free": [], "warn": [], "refuse": []}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        kind = "refuse"
        if key.startswith(FREE_KEYS):
            kind = "free"
        elif key.startswith(WARN_KEYS):
            kind = "warn"
        changes[kind].append(f"{key}: {before.get(key)!r} → {after.get(key)!r}")
    return changes


def check_changes(old: dict[str, Any], new: dict[str, Any], *, force: bool) -> None:
    """Say which settings changed since the checkpoint. Raises UsageError for those that break it, unless forced."""
    changes = classify_changes(old, new)
    logger = get_logger("training")
    for change in changes["warn"]:
        logger.warning(
            "Changed since the checkpoint: %s. The run will not equal an uninterrupted one.", change
        )
    if changes["refuse"] and not force:
        raise UsageError(
            "These settings cannot change in the middle of a run: "
            + "; ".join(changes["refuse"])
            + ".",
            hint="Put them back, start a new run in another --output, or insist with --force.",
        )
    for change in changes["refuse"]:
        logger.warning("Changed by force: %s.", change)
