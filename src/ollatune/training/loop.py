"""The training loop: one for LoRA, full fine-tuning and continued pre-training.

Evaluate on the way in: validation, samples and checkpoints come at the top, the break in the middle, the optimiser
step below, so that nothing is done again after the loop.

An optimiser batch is `batch_size × gradient_accumulation_steps × processes` examples, never across the end of an
epoch. The loss is a sum over its target tokens divided once by their number over all micro-batches and processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ollatune.base.errors import DivergedError, Interrupted, OutOfMemoryError
from ollatune.base.faults import fault_point
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.data.loader import BatchLoader, Step
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.lora import lora_layers
from ollatune.training.distributed import Processes
from ollatune.training.interrupts import StopRequest
from ollatune.training.optimizer import set_learning_rate
from ollatune.training.rows import row_of
from ollatune.training.schedule import Schedule
from ollatune.training.state import RunState
from ollatune.training.stopping import EarlyStopping, OverfittingWatch

MAX_SKIPS_IN_A_ROW = 3
MAX_ROLLBACKS = 3


@dataclass
class StepReport:
    """What one optimiser step did; losses are means per target token.

    `num_tokens` of the examples were trained on; with shared beginnings fewer, `num_computed`, were computed.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_computed: int
    num_targets: int
    seconds: float


class NonFiniteError(Exception):
    """Loss or gradient of the optimiser batch is NaN or infinite; nothing has been updated."""


@dataclass
class Hooks:
    """What the loop reports to; each is called on every process and decides itself where it writes."""

    on_step: Callable[[RunState, StepReport], None]
    validate: Callable[[RunState], float | None]
    save: Callable[[RunState, str, bool], None]
    roll_back: Callable[[], RunState]


@dataclass
class TrainingRun:
    """Everything one run needs, built by `training.build`."""

    config: Config
    model: nn.Module
    step_function: CausalStep
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    schedule: Schedule
    loader: BatchLoader
    state: RunState
    early_stopping: EarlyStopping
    overfitting: OverfittingWatch
    hooks: Hooks
    processes: Processes
    device: torch.device
    total_steps: int

    @property
    def shares_prefixes(self) -> bool:
        return self.config.advanced.share_prefixes and self.step_function.can_share

    def run(self) -> None:
        """Train to the end. Raises Interrupted, DivergedError or OutOfMemoryError; state is saved where it can be."""
        self.model.train()
        steps = self.loader.steps(self.state.position)
        with StopRequest() as stop:
            while True:
                self._at_boundary()
                if self._is_finished():
                    break
                if self.processes.any(stop.signal_number is not None):
                    self._stop(stop.signal_number or 15)
                if not self._train_step(next(steps)):
                    steps = self.loader.steps(self.state.position)

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
        elif save_every and state.step % save_every == 0:
            self.hooks.save(state, f"step_{state.step}.pt", False)
        fault_point("train.boundary")

    def _validate(self, epoch_ended: bool) -> None:
        state = self.state
        state.train_loss = state.epoch_loss_sum / max(1, state.epoch_targets)
        if epoch_ended:
            state.epoch_loss_sum, state.epoch_targets = 0.0, 0
        state.last_validated_step = state.step
        state.val_loss = self.hooks.validate(state)
        is_best = True
        if state.val_loss is not None:
            is_best = self.early_stopping.update(state.val_loss)
            self._watch_overfitting(state.train_loss, state.val_loss)
            state.stopped_early = self.early_stopping.should_stop
        name = f"epoch_{state.epoch}.pt" if epoch_ended else f"step_{state.step}.pt"
        self.hooks.save(state, name, is_best)
        if state.stopped_early:
            get_logger("training").info(
                "Stopped early: no improvement over %.4f in the last %d validations.",
                self.early_stopping.best,
                self.early_stopping.num_bad,
            )

    def _watch_overfitting(self, train_loss: float, val_loss: float) -> None:
        advice = self.overfitting.update(train_loss, val_loss)
        if advice is None:
            return
        get_logger("training").warning("%s", advice)
        raised = self.config.training.overfitting_raise_dropout
        if raised:
            for layer in lora_layers(self.model).values():
                layer.dropout = min(0.5, layer.dropout + raised)

    def _stop(self, signal_number: int) -> None:
        name = f"step_{self.state.step}.pt"
        if self.state.last_validated_step != self.state.step and self.state.step > 0:
            self.hooks.save(self.state, name, False)
        raise Interrupted(
            f"Stopped after step {self.state.step} of {self.total_steps}; the state is saved.",
            signal_number=signal_number,
            hint="Continue with --resume auto.",
        )

    def _train_step(self, step: Step) -> bool:
        """One optimiser step, retried in smaller pieces when memory runs out; False after a roll-back."""
        fault_point("train.step")
        started = time.perf_counter()
        report: StepReport | None = None
        while True:
            try:
                report = self._optimizer_step(step, started)
                break
            except NonFiniteError as error:
                if not self._handle_non_finite(str(error)):
                    return False
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
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
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        num_tokens = num_computed = 0
        for batch in step.micro_batches(state.split):
            row = row_of(batch, share=self.shares_prefixes).to(self.device)
            fault_point("train.micro_batch")
            loss = self.step_function.loss_sum(row)
            (loss / num_targets).backward()
            loss_sum += loss.detach()
            num_tokens += row.num_tokens_unshared
            num_computed += row.num_tokens
        self.processes.sum_gradients(self.parameters)
        mean_loss = float(self.processes.sum_tensor(loss_sum)) / num_targets
        grad_norm = float(self._clip())
        if fault_point("train.loss"):
            mean_loss = math.nan
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise NonFiniteError(f"loss {mean_loss}, gradient norm {grad_norm}")
        rate = self.schedule.at(state.step) * state.learning_rate_factor
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        num_tokens, num_computed = self.processes.sum(num_tokens), self.processes.sum(num_computed)
        state.tokens += num_tokens
        state.targets += num_targets
        state.epoch_loss_sum += mean_loss * num_targets
        state.epoch_targets += num_targets
        seconds = time.perf_counter() - started
        return StepReport(
            mean_loss, grad_norm, rate, num_tokens, num_computed, num_targets, seconds
        )

    def _clip(self) -> torch.Tensor:
        limit = self.config.training.max_grad_norm or math.inf
        return nn.utils.clip_grad_norm_(list(self.parameters), limit)

    def _handle_non_finite(self, what: str) -> bool:
        """Apply `on_non_finite`; returns False when the state was rolled back (the step is not counted)."""
        state, action = self.state, self.config.training.on_non_finite
        where = f"step {state.step + 1}: {what}"
        self.optimizer.zero_grad(set_to_none=True)
        if action == "skip" and state.skipped_in_a_row < MAX_SKIPS_IN_A_ROW:
            state.skipped_in_a_row += 1
            get_logger("training").warning("Not finite at %s. The step is skipped.", where)
            return True
        if action == "rollback" and state.num_rollbacks < MAX_ROLLBACKS:
            get_logger("training").warning(
                "Not finite at %s. Back to the last good checkpoint, with half the learning rate.",
                where,
            )
            skip_to, rollbacks = state.position, state.num_rollbacks
            self.state = self.hooks.roll_back()
            self.state.num_rollbacks = rollbacks + 1
            self.state.learning_rate_factor *= 0.5
            self.state.extra["rolled_back_from"] = skip_to
            return False
        raise DivergedError(
            f"Not finite at {where}. Nothing was updated; the weights are as before this step.",
            hint=(
                "Lower the learning rate, look at the data of this batch with `ollatune data`, or set "
                "training.on_non_finite to skip or rollback; then --resume auto."
            ),
        )

    def _split_micro_batches(self, step: Step, error: BaseException) -> None:
        """Halve the micro-batches after running out of memory; the optimiser batch stays the same."""
        if not _is_out_of_memory(error):
            raise error
        largest = max(len(ids) for ids in step.micro_batch_ids)
        if self.state.split >= largest:
            raise OutOfMemoryError(
                "Out of memory with one example at a time.",
                hint=(
                    "Use a smaller model, `--set model.quantization=as-served`, a shorter "
                    "model.context_window, or training.activation_checkpointing."
                ),
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state.split *= 2
        get_logger("training").warning(
            "Out of memory: going on with micro-batches of %d examples, the optimiser batch stays.",
            -(-largest // self.state.split),
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
