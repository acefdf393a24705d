"""How an optimiser batch is cut into micro-batches: as configured, as measured, or as before a resume.

`batch_size: auto` leaves the optimiser batch what it is with the default batch size and finds by trying how much of
it can be computed at once, so that the machine decides about speed and not about the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ollatune.base.errors import OutOfMemoryError, UsageError
from ollatune.base.faults import fault_point
from ollatune.base.log import get_logger
from ollatune.base.memory import forget_peak, recent_peak_bytes
from ollatune.base.text import format_bytes
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config, TrainingConfig
from ollatune.data.loader import BatchLoader
from ollatune.modeling.fast.forward import CausalStep
from ollatune.training.distributed import Processes
from ollatune.training.memory_faults import OUT_OF_MEMORY_HINT, is_out_of_memory
from ollatune.training.placement import free_memory_bytes
from ollatune.training.rows import row_of

_ROOM_SHARE = 0.8
"""Probing stops at this share of the free memory: validation and the system want some, too."""
_ADAM_BYTES = 8
"""Two fp32 moments of each trained weight, made by the first step, after the probing."""


@dataclass(frozen=True)
class BatchPlan:
    """One process's share of an optimiser batch: `accumulation_steps` micro-batches of `batch_size` examples."""

    batch_size: int
    accumulation_steps: int

    @property
    def num_examples(self) -> int:
        return self.batch_size * self.accumulation_steps


def configured_plan(config: Config) -> BatchPlan:
    """The plan that the configuration names; for `auto`, the one that probing cuts anew."""
    training = config.training
    size = training.batch_size
    if not isinstance(size, int):
        size = TrainingConfig().batch_size
        assert isinstance(size, int)
    return BatchPlan(size, training.gradient_accumulation_steps)


def resumed_plan(config: Config, checkpoint: Checkpoint, num_processes: int) -> BatchPlan | None:
    """The plan a run goes on with, its optimiser batch shared out among today's processes.

    None where the checkpoint has none or the settings were changed since. Raises UsageError where the optimiser
    batch cannot be shared out evenly.
    """
    saved = checkpoint.resume.get("batch_plan")
    before = checkpoint.config["training"]
    training = config.training
    if saved is None or (before["batch_size"], before["gradient_accumulation_steps"]) != (
        training.batch_size,
        training.gradient_accumulation_steps,
    ):
        return None
    micro_batches = saved["micro_batches"]
    if micro_batches % num_processes:
        raise UsageError(
            f"The run's optimiser batch is {micro_batches} micro-batches of {saved['batch_size']}; "
            f"{num_processes} processes cannot share them evenly.",
            hint=f"Start a number of processes that divides {micro_batches}.",
        )
    return BatchPlan(saved["batch_size"], micro_batches // num_processes)


def probed_plan(
    plan: BatchPlan, step_function: CausalStep, loader: BatchLoader,
    parameters: Sequence[nn.Parameter], processes: Processes,
) -> BatchPlan:  # fmt: skip
    """`plan` cut into the largest micro-batches that fit on every process. Raises OutOfMemoryError if none does."""
    sizes = [n for n in range(1, plan.num_examples + 1) if plan.num_examples % n == 0]
    sizes = [n for n in sizes if n <= len(loader.examples)]
    moments = _ADAM_BYTES * sum(p.numel() for p in parameters)
    room = int(_ROOM_SHARE * free_memory_bytes(processes.device)) - moments
    best = _largest_that_fits(step_function, loader, parameters, sizes, room, processes.device)
    best = processes.min(best)
    if best == 0:
        raise OutOfMemoryError("The longest example does not fit.", hint=OUT_OF_MEMORY_HINT)
    return BatchPlan(best, plan.num_examples // best)


def _largest_that_fits(
    step_function: CausalStep, loader: BatchLoader, parameters: Sequence[nn.Parameter],
    sizes: Sequence[int], room: int, device: torch.device,
) -> int:  # fmt: skip
    """Forward and backward on the longest examples, more and more of them; 0 where not even one fits."""
    longest_first = np.argsort(-loader.examples.lengths, kind="stable")
    best = growth = 0
    reason = "the optimiser batch is no larger"
    for size in sizes:
        if best and growth * size // best > room:
            reason = f"{size} would need {format_bytes(growth * size // best)}"
            break

        def compute(ids: np.ndarray = longest_first[:size]) -> None:
            fault_point("probe.micro_batch")
            row = row_of(loader.batch(ids)).to(device)
            step_function.loss_sum(row).backward()

        try:
            growth = memory_growth(compute, device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"memory ran out with {size}"
            break
        finally:
            for parameter in parameters:
                parameter.grad = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
        best = size
    get_logger("training").info(
        "training.batch_size auto: %d examples at a time take %s of %s free (%s).",
        best, format_bytes(growth), format_bytes(max(0, room)), reason,
    )  # fmt: skip
    return best


def memory_growth(compute: Callable[[], None], device: torch.device) -> int:
    """Bytes by which the peak during `compute` is above the memory in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    before = forget_peak()
    compute()
    return max(0, recent_peak_bytes() - before)
