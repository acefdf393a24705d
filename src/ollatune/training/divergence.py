"""What becomes of a step that has gone wrong: numbers that are not finite, or a loss spike.

Both are found before the update, on losses summed over all processes, so that all of them do the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollatune.base.errors import DivergedError
from ollatune.base.log import get_logger
from ollatune.data.loader import Step
from ollatune.training.reports import LossSpikeError, NonFiniteError, SpikeReport
from ollatune.training.state import RunState

if TYPE_CHECKING:
    from ollatune.training.loop import TrainingRun

MAX_SKIPS_IN_A_ROW = 3
MAX_ROLLBACKS = 3


def watch_spikes(run: TrainingRun, mean_loss: float) -> None:
    """Warn where the loss of the step in progress is a spike; raise LossSpikeError where `on_loss_spike` wants more."""
    action, state = run.config.training.on_loss_spike, run.state
    spike = run.spikes.judge(mean_loss) if action != "off" else None
    if spike is None:
        return
    if action != "warn":
        raise LossSpikeError(spike)
    state.num_spikes += 1
    get_logger("training").warning("Loss spike at step %d: %s.", state.step + 1, spike)
    run.hooks.on_spike(state, SpikeReport(spike, action, state.step + 1))


def handle_divergence(run: TrainingRun, step: Step, error: NonFiniteError | LossSpikeError) -> bool:
    """Apply `on_non_finite` or `on_loss_spike`: True where the step is skipped, False where the run was rolled back.

    Raises DivergedError where it is to stop, has skipped or rolled back too often, or has nothing to roll back to.
    """
    state, number = run.state, run.state.step + 1
    action = _action(run, error)
    what = f"{'Loss spike' if isinstance(error, LossSpikeError) else 'Not finite'} at step {number}: {error}"
    run.sharing.zero_grad()
    if action == "skip" and state.skipped_in_a_row < MAX_SKIPS_IN_A_ROW:
        state.skipped_in_a_row += 1
        state.num_skipped += 1
        state.num_spikes += isinstance(error, LossSpikeError)
        get_logger("training").warning("%s. The step is skipped.", what)
        _tell(run, error, "skip", number)
        return True
    if action == "rollback" and state.num_rollbacks < MAX_ROLLBACKS and state.last_saved_step:
        get_logger("training").warning(
            "%s. Back to the last good checkpoint, with half the learning rate; "
            "this step's batch is left out.",
            what,
        )
        _roll_back(run, step, is_spike=isinstance(error, LossSpikeError))
        _tell(run, error, "rollback", number)
        return False
    _tell(run, error, "stop", number)
    raise DivergedError(
        f"{what}. Nothing was updated; the weights are as before this step.{_given_up(state, action)}",
        hint=(
            "Lower the learning rate, look at the data of this batch with `ollatune data`, or set "
            f"training.{_alternatives(error)}; then {_next_command(state)}."
        ),
    )


def _given_up(state: RunState, action: str) -> str:
    """Why `skip` or `rollback` was not done."""
    if action == "skip":
        return f" {MAX_SKIPS_IN_A_ROW} steps in a row were skipped before it."
    if action == "rollback" and state.num_rollbacks >= MAX_ROLLBACKS:
        return f" The run was rolled back {MAX_ROLLBACKS} times before."
    if action == "rollback":
        return " There is no checkpoint to roll back to yet (training.checkpoint_every_steps makes one sooner)."
    return ""


def _next_command(state: RunState) -> str:
    return (
        "--resume auto" if state.last_saved_step else "run the command again: nothing was saved yet"
    )


def _action(run: TrainingRun, error: NonFiniteError | LossSpikeError) -> str:
    training = run.config.training
    return training.on_loss_spike if isinstance(error, LossSpikeError) else training.on_non_finite


def _alternatives(error: NonFiniteError | LossSpikeError) -> str:
    if isinstance(error, LossSpikeError):
        return "on_loss_spike to warn, skip or rollback"
    return "on_non_finite to skip or rollback"


def _tell(
    run: TrainingRun, error: NonFiniteError | LossSpikeError, action: str, at_step: int
) -> None:
    if isinstance(error, LossSpikeError):
        run.hooks.on_spike(run.state, SpikeReport(error.spike, action, at_step))


def _roll_back(run: TrainingRun, step: Step, *, is_spike: bool) -> None:
    """The state of the last checkpoint, but for what it must know of this roll-back."""
    state = run.state
    skipped = [*state.skipped_positions, step.position]
    rollbacks, factor = state.num_rollbacks + 1, state.learning_rate_factor * 0.5
    spikes = state.num_spike_rollbacks + is_spike
    run.state = run.hooks.roll_back()
    run.state.num_rollbacks = rollbacks
    run.state.num_spike_rollbacks = spikes
    run.state.learning_rate_factor = factor
    run.state.skipped_positions = skipped
