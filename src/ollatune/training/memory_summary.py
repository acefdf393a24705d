"""Where a run's memory is: base weights, what is trained, gradients, the optimiser's moments, and the peak."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor

from ollatune.base.text import format_bytes
from ollatune.modeling.nf4 import NF4Linear
from ollatune.training.environment import peak_memory_bytes
from ollatune.training.loop import TrainingRun


def memory_by_part(run: TrainingRun) -> dict[str, int]:
    """Bytes by part as they are now, tensors that share memory counted once, and the peak of the process or GPU."""
    trained = {id(parameter) for parameter in run.sharing.parameters}
    frozen = [p for p in run.model.parameters() if id(p) not in trained]
    packed = [m.size_bytes for m in run.model.modules() if isinstance(m, NF4Linear)]
    return {
        "base": _bytes([*frozen, *run.model.buffers()]) + sum(packed),
        "trained": _bytes(run.sharing.parameters),
        "gradients": _bytes(p.grad for p in run.sharing.parameters if p.grad is not None),
        "moments": _bytes(_tensors(dict(getattr(run.sharing.optimizer, "state", {})))),
        "peak": peak_memory_bytes(run.device),
    }


def memory_text(parts: dict[str, int]) -> str:
    """One line of it."""
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (
        cast(Any, t).to_local() if hasattr(t, "to_local") else t for t in tensors
    )  # of shards, ours
    by_place = {t.data_ptr(): t.numel() * t.element_size() for t in local}
    return sum(by_place.values())
