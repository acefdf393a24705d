"""What to change where a run will not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ollatune.base.text import format_bytes
from ollatune.catalog import load_catalog
from ollatune.config.schema import Config
from ollatune.modeling.load import Mode
from ollatune.modeling.memory import MemoryEstimate
from ollatune.modeling.opened import OpenBase

_SHORTER = (4096, 2048, 1024, 512)

Estimator = Callable[[Config, Mode, int], MemoryEstimate]
"""From a configuration, how the base is held, and examples in a micro-batch."""


def advice_to_fit(
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
