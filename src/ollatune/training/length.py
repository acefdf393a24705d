"""How many steps a run has, and the learning rate over them."""

from __future__ import annotations

import itertools
import math

from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.data.loader import BatchLoader
from ollatune.training.schedule import Schedule
from ollatune.training.state import RunState


def total_steps(config: Config, loader: BatchLoader, state: RunState | None = None) -> int:
    """Optimiser steps of the whole run: those that `state` has done (None: none yet), and those still to do."""
    state = state or RunState()
    settings, limit = loader.settings, config.training.max_steps
    if settings.token_budget is not None:  # how many fit into a row differs from step to step
        ahead = loader.steps(state.position, num_epochs=config.training.epochs)
        most = None if limit is None else max(0, limit - state.step)
        steps = state.step + sum(1 for _ in itertools.islice(ahead, most))
    else:
        epochs_left = max(0, config.training.epochs - state.epoch)
        steps = state.step + epochs_left * loader.steps_per_epoch()
        examples = settings.batch_size * settings.accumulation_steps * settings.world_size
        if epochs_left:  # the first of them may have begun
            left = loader.epoch_size - state.position % loader.epoch_size
            steps += -(-left // examples) - loader.steps_per_epoch()
    return steps if limit is None else min(steps, limit)


def make_schedule(config: Config, num_steps: int) -> Schedule:
    """The learning-rate schedule. Says so when the warm-up would eat most of the run."""
    training = config.training
    warmup = training.warmup_steps
    if training.warmup_fraction is not None:
        warmup = math.ceil(training.warmup_fraction * num_steps)
    if warmup >= num_steps:
        get_logger("training").warning(
            "The warm-up (%d steps) is as long as the run (%d): the learning rate never reaches %g. "
            "Lower training.warmup_steps, or set training.warmup_fraction: 0.1.",
            warmup, num_steps, training.learning_rate,
        )  # fmt: skip
    return Schedule(
        training.scheduler,
        training.learning_rate,
        warmup,
        num_steps,
        training.min_learning_rate_fraction,
        training.scheduler_power,
    )
