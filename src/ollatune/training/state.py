"""Everything that moves during a run, and how it goes into a checkpoint and back."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ollatune.base.imports import first_import_of


@dataclass
class RunState:
    """Counters of a run.

    Attributes:
        step: optimiser steps done; epoch: epochs completed.
        position: samples consumed since the start, over all epochs and processes.
        split: parts that each micro-batch is cut into; doubled when memory runs out.
        epoch_loss_sum, epoch_targets: training loss of the epoch in progress.
        tokens, targets: computed and trained tokens so far.
        skipped_in_a_row: steps skipped one after another, not finite or spikes; num_skipped: all of them.
        num_spikes: loss spikes that were warned of or skipped; num_spike_rollbacks: those rolled back from.
        num_overflows: steps skipped because a scaled gradient left fp16's range.
        learning_rate_factor: lowered by roll-backs.
        skipped_positions: where the steps begin that a roll-back left out.
        last_saved_step: the step of the newest checkpoint; 0 before the first.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    split: int = 1
    epoch_loss_sum: float = 0.0
    epoch_targets: int = 0
    tokens: int = 0
    targets: int = 0
    skipped_in_a_row: int = 0
    num_skipped: int = 0
    num_rollbacks: int = 0
    num_spikes: int = 0
    num_spike_rollbacks: int = 0
    num_overflows: int = 0
    learning_rate_factor: float = 1.0
    train_loss: float | None = None
    val_loss: float | None = None
    last_validated_step: int = -1
    last_saved_step: int = 0
    stopped_early: bool = False
    skipped_positions: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators as tensors and plain values."""
    python = random.getstate()
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    states: dict[str, Any] = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The reverse of `random_states`. A CUDA state is only restored on CUDA."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = states["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; allow only deterministic algorithms if asked."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:  # without it, cuBLAS refuses
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with first_import_of("torch._inductor"):  # which this imports, to set it there too
        torch.use_deterministic_algorithms(deterministic)


def seed_step(seed: int, position: int, rank: int) -> None:
    """Seed torch for the step that begins at `position`: its dropout depends on these three numbers alone.

    So a resumed or retried step draws what it would have drawn, and every process draws something else.
    """
    digest = hashlib.sha256(f"{seed}:{position}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
