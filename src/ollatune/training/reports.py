"""What the loop tells the others, and what its parts tell each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from ollatune.training.spikes import Spike
from ollatune.training.state import RunState


@dataclass
class StepReport:
    """What one optimiser step did; losses are means per target token.

    `num_tokens` of the examples were trained on; with shared beginnings fewer, `num_computed`, were computed.
    `data_seconds` of `seconds` went into making this process's batches.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_computed: int
    num_targets: int
    seconds: float
    data_seconds: float


class NonFiniteError(Exception):
    """Loss or gradient of the optimiser batch is NaN or infinite; nothing has been updated."""


class LossSpikeError(Exception):
    """The loss of the optimiser batch is a spike that is not only to be warned of; nothing has been updated."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(str(spike))
        self.spike = spike


@dataclass(frozen=True)
class SpikeReport:
    """A spike at step `at_step`, and what was done about it: warn, skip, rollback or stop."""

    spike: Spike
    action: str
    at_step: int


class OverflowedError(Exception):
    """Gradients under a loss scale are not finite, the loss is; nothing has been updated."""


class RanOutOfMemoryError(Exception):
    """Some process had no memory for a micro-batch; nothing has been updated on any of them."""


@dataclass
class MicroBatchSums:
    """What the micro-batches of one process add up to."""

    loss: torch.Tensor
    num_tokens: int = 0
    num_computed: int = 0
    data_seconds: float = 0.0
    memory_error: BaseException | None = None


class PhaseClock:
    """Adds up the seconds of each phase of a step, and names it for the profiler.

    On a GPU, work that was started in one phase may be waited for in a later one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to phase `name`."""
        started = time.perf_counter()
        with record_function(name):
            yield
        passed = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + passed


class ValidationLeftError(Exception):
    """A signal came in the middle of a validation, which is left out."""


@dataclass
class Hooks:
    """What the loop reports to; each is called on every process and decides itself where it writes."""

    on_step: Callable[[RunState, StepReport], None]
    validate: Callable[[RunState], float | None]
    save: Callable[[RunState, str, bool], None]
    roll_back: Callable[[], RunState]
    on_spike: Callable[[RunState, SpikeReport], None] = lambda state, report: None
