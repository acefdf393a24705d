"""The training loop: one for LoRA, full fine-tuning and continued pre-training.

Evaluate on the way in: validation, samples and checkpoints come at the top, the break in the middle, the optimiser
step below, so that nothing is done again after the loop.

An optimiser batch is `batch_size × gradient_accumulation_steps × processes` examples, never across the end of an
epoch. The loss is a sum over its target tokens divided once by their number over all micro-batches and processes.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import nn

from ollatune.base.errors import Interrupted, OutOfMemoryError
from ollatune.base.faults import fault_point
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.data.loader import BatchLoader, Step
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.lora import lora_layers
from ollatune.training.distributed import Processes
from ollatune.training.divergence import handle_divergence, watch_spikes
from ollatune.training.feed import RowFeed
from ollatune.training.interrupts import StopRequest, stopped_before_training
from ollatune.training.loss_scale import LossScale
from ollatune.training.memory_faults import (
    OUT_OF_MEMORY_HINT,
    UPDATE_HINT,
    VALIDATION_HINT,
    is_out_of_memory,
    out_of_memory_ends,
)
from ollatune.training.reports import (
    Hooks,
    LossSpikeError,
    MicroBatchSums,
    NonFiniteError,
    OverflowedError,
    PhaseClock,
    RanOutOfMemoryError,
    StepReport,
    ValidationLeftError,
)
from ollatune.training.schedule import Schedule
from ollatune.training.sharing import Sharing
from ollatune.training.spikes import SpikeWatch
from ollatune.training.state import RunState, seed_step
from ollatune.training.stopping import EarlyStopping, OverfittingWatch


@dataclass
class TrainingRun:
    """Everything one run needs, built by `training.build`."""

    config: Config
    sharing: Sharing
    schedule: Schedule
    loader: BatchLoader
    state: RunState
    early_stopping: EarlyStopping
    loss_scale: LossScale
    overfitting: OverfittingWatch
    spikes: SpikeWatch
    hooks: Hooks
    processes: Processes
    device: torch.device
    total_steps: int
    phases: PhaseClock = field(default_factory=PhaseClock)
    stop_request: StopRequest = field(default_factory=StopRequest)
    feed: RowFeed = field(init=False)

    @property
    def model(self) -> nn.Module:
        return self.sharing.model

    @property
    def step_function(self) -> CausalStep:
        return self.sharing.step_function

    @property
    def shares_prefixes(self) -> bool:
        return self.config.advanced.share_prefixes and self.step_function.can_share

    def run(self) -> None:
        """Train to the end. Raises Interrupted, DivergedError or OutOfMemoryError; state is saved where it can be."""
        self.model.train()
        steps = self.loader.steps(self.state.position)
        self.stop_request = StopRequest(speaks=self.processes.is_main)
        self.feed = RowFeed(
            self.loader, share=self.shares_prefixes, settings=self.config.data, device=self.device
        )
        with self.stop_request, closing(self.feed):
            while True:
                self._at_boundary()
                if self._is_finished():
                    break
                if self.is_to_stop():
                    self._stop()
                if not self._train_step(next(steps)):
                    steps = self.loader.steps(self.state.position)

    def is_to_stop(self) -> bool:
        """Whether a signal has reached any process; all of them ask at the same places."""
        return self.processes.any(self.stop_request.signal_number is not None)

    def _is_finished(self) -> bool:
        return self.state.step >= self.total_steps or self.state.stopped_early

    def _at_boundary(self) -> None:
        """Validate and save where the epoch has ended, a cadence is due, or the run is over."""
        state, training = self.state, self.config.training
        if state.step == 0 or state.last_validated_step == state.step:
            return
        epoch_ended = state.position % self.loader.epoch_size == 0
        is_last = state.step >= self.total_steps
        every = training.evaluate_every_steps
        save_every = training.checkpoint_every_steps
        if epoch_ended or is_last or (every and state.step % every == 0):
            self._validate(epoch_ended)
        elif save_every and state.step % save_every == 0 and state.last_saved_step != state.step:
            self._save(f"step_{state.step}.pt", is_best=False)
        fault_point("train.boundary")

    def _validate(self, epoch_ended: bool) -> None:
        state = self.state
        before = state.train_loss
        has_trained = state.epoch_targets > 0  # not where every step was left out
        if has_trained:
            state.train_loss = state.epoch_loss_sum / state.epoch_targets
        try:
            with out_of_memory_ends(f"in the validation after step {state.step}", VALIDATION_HINT):
                val_loss = self.hooks.validate(state)
        except (ValidationLeftError, OutOfMemoryError) as error:
            state.train_loss = before  # a resumed run validates here
            if isinstance(error, ValidationLeftError):
                self._stop()
            if self.processes.count == 1 and state.last_saved_step != state.step:  # or others wait
                self._save(f"step_{state.step}.pt", is_best=False)
            raise
        if epoch_ended:
            state.epoch_loss_sum, state.epoch_targets = 0.0, 0
        state.last_validated_step, state.val_loss = state.step, val_loss
        is_best = True
        if state.val_loss is not None:
            is_best = self.early_stopping.update(state.val_loss)
            if has_trained and state.train_loss is not None:
                self._watch_overfitting(state.train_loss, state.val_loss)
            state.stopped_early = self.early_stopping.should_stop
        name = f"epoch_{state.epoch}.pt" if epoch_ended else f"step_{state.step}.pt"
        self._save(name, is_best=is_best)
        if state.stopped_early:
            get_logger("training").info(
                "Stopped early: no improvement over %.4f in the last %d validations.",
                self.early_stopping.best,
                self.early_stopping.num_bad,
            )

    def _save(self, name: str, *, is_best: bool) -> None:
        self.state.last_saved_step = self.state.step
        self.hooks.save(self.state, name, is_best)

    def _watch_overfitting(self, train_loss: float, val_loss: float) -> None:
        advice = self.overfitting.update(train_loss, val_loss)
        if advice is None:
            return
        get_logger("training").warning("%s", advice)
        raised = self.config.training.overfitting_raise_dropout
        if raised:
            layers = lora_layers(self.model).values()
            for layer in layers:
                layer.dropout = min(0.5, layer.dropout + raised)
            now = max((layer.dropout for layer in layers), default=None)
            get_logger("training").info(
                "LoRA dropout is %g now." if now is not None else "No adapter: dropout stays.",
                *(() if now is None else (now,)),
            )

    def _stop(self) -> NoReturn:
        number, step = self.stop_request.signal_number or signal.SIGTERM, self.state.step
        if step == 0:
            raise stopped_before_training(number)
        if self.state.last_saved_step != step:
            self._save(f"step_{step}.pt", is_best=False)
        raise Interrupted(
            f"Stopped after step {step} of {self.total_steps}; the state is saved.",
            signal_number=number,
            hint="Continue with --resume auto.",
        )

    def _train_step(self, step: Step) -> bool:
        """One optimiser step, retried in smaller pieces when memory runs out; False after a roll-back."""
        fault_point("train.step")
        started = time.perf_counter()
        report: StepReport | None = None
        if step.position in self.state.skipped_positions:
            get_logger("training").warning(
                "Step %d is left out: the run was rolled back from it.", self.state.step + 1
            )
        else:
            while True:
                try:
                    report = self._optimizer_step(step, started)
                    break
                except OverflowedError:
                    self._shrink_loss_scale()
                    break
                except (NonFiniteError, LossSpikeError) as error:
                    if not handle_divergence(self, step, error):
                        return False
                    break
                except RanOutOfMemoryError as error:
                    self._split_micro_batches(step, error)
        state = self.state
        state.position = step.position_after
        state.step += 1
        state.epoch = state.position // self.loader.epoch_size
        if report is not None:
            state.skipped_in_a_row = 0
            self.hooks.on_step(state, report)
        return True

    def _optimizer_step(self, step: Step, started: float) -> StepReport:
        state, num_targets = self.state, max(1, step.num_target_tokens)
        self.sharing.zero_grad()
        seed_step(self.config.training.seed, step.position, self.processes.rank)
        sums = self._accumulate(step, num_targets)
        loss_sum, num_tokens, num_computed = self._sum_over_processes(sums)
        mean_loss = loss_sum / num_targets
        self.sharing.reduce_gradients()
        self.loss_scale.unscale(self.sharing.parameters)
        grad_norm = self.sharing.clip(self.config.training.max_grad_norm)
        if (
            math.isfinite(mean_loss)
            and not math.isfinite(grad_norm)
            and self.loss_scale.can_shrink()
        ):
            raise OverflowedError
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(f"loss {mean_loss}, gradient norm {grad_norm}")
        watch_spikes(self, mean_loss)
        rate = self.schedule.at(state.step) * state.learning_rate_factor
        with self.phases.phase("optimizer"), out_of_memory_ends("in the update", UPDATE_HINT):
            fault_point("train.update")
            self.sharing.step(rate)
        self.loss_scale.went_well()
        self.spikes.took(mean_loss)
        state.tokens += num_tokens
        state.targets += num_targets
        state.epoch_loss_sum += mean_loss * num_targets
        state.epoch_targets += num_targets
        return StepReport(
            mean_loss, grad_norm, rate, num_tokens, num_computed, num_targets,
            time.perf_counter() - started, sums.data_seconds,
        )  # fmt: skip

    def _accumulate(self, step: Step, num_targets: int) -> MicroBatchSums:
        """Forward and backward over this process's micro-batches; stops where memory runs out."""
        divisor = num_targets / self.loss_scale.value
        sums = MicroBatchSums(torch.zeros((), dtype=torch.float64, device=self.device))
        try:
            rows = self.feed.rows(step, self.state.split)
            num_left = len(step.micro_batch_ids) * self.state.split
            while True:
                started = time.perf_counter()
                with self.phases.phase("data"):
                    row = next(rows, None)
                    if row is None:
                        break
                    row = row.to(self.device)
                sums.data_seconds += time.perf_counter() - started
                fault_point("train.micro_batch")
                with self.phases.phase("forward"):
                    loss = self.step_function.loss_sum(row)
                with self.phases.phase("backward"):
                    num_left -= 1
                    self.sharing.backward(loss / divisor, is_last=num_left == 0)
                sums.loss += loss.detach()
                if row.num_targets:  # not the placeholder of a process without examples
                    sums.num_tokens += row.num_tokens_unshared
                    sums.num_computed += row.num_tokens
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.sharing.may_fail_alone:
                raise OutOfMemoryError(
                    "Out of memory in the middle of a step that all processes compute together.",
                    hint=f"Lower training.batch_size. {OUT_OF_MEMORY_HINT}",
                ) from error
            sums.memory_error = error.with_traceback(None)  # its frames hold the activations
        if fault_point("train.loss"):
            sums.loss.fill_(math.nan)
        if fault_point("train.loss_spike"):
            sums.loss *= 1000
        if fault_point("train.gradient"):
            first = self.sharing.parameters[0]
            first.grad = torch.full_like(first, math.inf)
        return sums

    def _sum_over_processes(self, sums: MicroBatchSums) -> tuple[float, int, int]:
        """Loss, tokens and computed tokens of all processes; all of them learn that one ran out of memory."""
        ran_out = float(sums.memory_error is not None)
        counts = torch.tensor(
            [sums.num_tokens, sums.num_computed, ran_out], dtype=torch.float64, device=self.device
        )
        totals = self.processes.sum_tensor(torch.cat([sums.loss[None], counts]))
        loss_sum, num_tokens, num_computed, ran_out = totals.tolist()
        if ran_out:
            raise RanOutOfMemoryError from sums.memory_error
        return loss_sum, int(num_tokens), int(num_computed)

    def _shrink_loss_scale(self) -> None:
        """The step changes nothing: its gradients, lifted by the loss scale, left fp16's range."""
        self.sharing.zero_grad()
        self.loss_scale.overflowed()
        self.state.num_overflows += 1
        get_logger("training").info(
            "Step %d: gradients left the range of fp16; it is skipped, the loss scale is %g now.",
            self.state.step + 1, self.loss_scale.value,
        )  # fmt: skip

    def _split_micro_batches(self, step: Step, error: BaseException) -> None:
        """Halve the micro-batches after running out of memory; the optimiser batch stays the same."""
        largest = self.processes.max(max(len(ids) for ids in step.micro_batch_ids))
        if self.state.split >= largest:
            raise OutOfMemoryError(
                "Out of memory with one example at a time.", hint=OUT_OF_MEMORY_HINT
            ) from error
        self.sharing.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state.split *= 2
        get_logger("training").warning(
            "Out of memory: going on with micro-batches of %d examples, the optimiser batch stays.",
            -(-largest // self.state.split),
        )
