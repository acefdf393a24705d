"""Between a run and its checkpoints: what is put in, what is taken out, which changed settings may go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, StorageError
from ollatune.base.faults import fault_point
from ollatune.base.files import staged_file, storage_error
from ollatune.base.log import get_logger
from ollatune.checkpoint.folders import SHARDS_SUFFIX
from ollatune.checkpoint.format import Checkpoint, write_checkpoint
from ollatune.checkpoint.store import CheckpointStore
from ollatune.modeling.lora import lora_layers
from ollatune.training.environment import package_versions
from ollatune.training.identity import Identity
from ollatune.training.loop import TrainingRun
from ollatune.training.run_folder import utc_now
from ollatune.training.state import RunState, random_states, restore_random_states


def make_checkpoint(
    run: TrainingRun, identity: Identity, *, with_optimizer: bool = True, with_tensors: bool = True
) -> Checkpoint:
    """The whole state of `run`; every process calls it where `run.sharing.needs_all`.

    Without the optimiser it can be exported but not resumed. Without tensors it is what a sharded checkpoint holds
    beside them.
    """
    state, sharing = run.state, run.sharing
    optimizer_state: dict[str, Any] = {}
    if with_optimizer:
        optimizer_state = (
            sharing.optimizer_state() if with_tensors else sharing.optimizer_settings()
        )
    return Checkpoint(
        epoch=state.epoch,
        step=state.step,
        model_state_dict=sharing.trained_state() if with_tensors else {},
        optimizer_state_dict=optimizer_state,
        scheduler_state_dict={"step": state.step, "name": run.schedule.name},
        train_loss=state.train_loss,
        val_loss=state.val_loss,
        config=identity.config,
        timestamp=utc_now(),
        run_id=identity.run_id,
        base=identity.base,
        resume={
            "state": state.as_dict(),
            "random": random_states(run.device),
            "early_stopping": run.early_stopping.state(),
            "loss_scale": run.loss_scale.state(),
            "overfitting": run.overfitting.state(),
            "loss_spikes": run.spikes.state(),
            "dropout": [layer.dropout for layer in lora_layers(run.model).values()],
            "data_digest": identity.data_digest,
            "epoch_size": run.loader.epoch_size,
            "overrides": identity.overrides,
            "batch_plan": {
                "batch_size": run.loader.settings.batch_size,
                "micro_batches": run.loader.settings.accumulation_steps * run.processes.count,
            },
        }
        if with_optimizer
        else {},
        versions=package_versions(),
    )


def restore(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Put `run` into exactly the state that `checkpoint` was made in. Raises InputError or UsageError."""
    if not checkpoint.resume:
        raise InputError(
            "This checkpoint holds weights only (best_model.pt does); it cannot be resumed.",
            hint="Resume from a file under checkpoints/, or with --resume auto.",
        )
    run.sharing.load(checkpoint)
    run.state = RunState(**checkpoint.resume["state"])
    _fit_position(run, checkpoint.resume.get("epoch_size"))
    run.early_stopping.load(checkpoint.resume["early_stopping"])
    # With more patience than before, a run that was stopped early goes on.
    run.state.stopped_early = run.state.stopped_early and run.early_stopping.should_stop
    run.overfitting.load(checkpoint.resume["overfitting"])
    if "loss_scale" in checkpoint.resume:
        run.loss_scale.load(checkpoint.resume["loss_scale"])
    if "loss_spikes" in checkpoint.resume:
        run.spikes.load(checkpoint.resume["loss_spikes"])
    if checkpoint.config["advanced"]["lora_dropout"] == run.config.advanced.lora_dropout:
        for layer, dropout in zip(
            lora_layers(run.model).values(), checkpoint.resume["dropout"], strict=False
        ):
            layer.dropout = dropout
    if not run.sharing.continues_optimizer(checkpoint):
        get_logger("training").warning(
            "The checkpoint is of another optimiser (%s): its moments are left, %s begins without.",
            checkpoint.config["training"]["optimizer"], run.config.training.optimizer,
        )  # fmt: skip
    restore_random_states(checkpoint.resume["random"], run.device)


def _fit_position(run: TrainingRun, before: int | None) -> None:
    """With other data (by force) the run goes on in the same epoch, after the same share of it."""
    now = run.loader.epoch_size
    if before is None or before == now:
        return
    epoch, offset = divmod(run.state.position, before)
    run.state.position = epoch * now + offset * now // before
    run.state.skipped_positions = []  # other examples are there now
    get_logger("training").warning(
        "An epoch has %d examples now, %d before: the run goes on after %d of epoch %d.",
        now, before, offset * now // before, epoch + 1,
    )  # fmt: skip


class Saver:
    """Writes checkpoints and the best model of one run."""

    def __init__(self, store: CheckpointStore, best_path: Path, identity: Identity) -> None:
        self.store = store
        self.best_path = best_path
        self.identity = identity

    def save(self, run: TrainingRun, name: str, is_best: bool) -> None:
        """Write checkpoint `name`, and best_model.pt if it is the best so far. Raises StorageError.

        Every process calls it; only the main one writes, but for the parts of a sharded checkpoint.
        """
        if not (run.processes.is_main or run.sharing.needs_all):
            return
        try:
            if is_best:
                self._save_best(run)
            if run.sharing.saves_shards:
                name = str(Path(name).with_suffix(SHARDS_SUFFIX))
                self._save_shards(run, name)
            else:
                self._save_file(run, name)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            path = self.store.folder / name
            raise storage_error(error, path, self.store.usual_bytes) from error
        get_logger("training").debug(
            "Saved %s%s.", self.store.folder / name, " (best so far)" if is_best else ""
        )

    def _save_best(self, run: TrainingRun) -> None:
        best = make_checkpoint(run, self.identity, with_optimizer=False)
        fault_point("save.before_best")
        if run.processes.is_main:
            with staged_file(self.best_path, needed_bytes=self.store.usual_bytes) as stream:
                write_checkpoint(best, stream)

    def _save_file(self, run: TrainingRun, name: str) -> None:
        checkpoint = make_checkpoint(run, self.identity)
        fault_point("save.before_checkpoint")
        if run.processes.is_main:
            self.store.save(checkpoint, name)
        fault_point("save.after_checkpoint")

    def _save_shards(self, run: TrainingRun, name: str) -> None:
        """Every process writes its part into a staging folder, which the main one then lets become `name`."""
        processes = run.processes
        fault_point("save.before_checkpoint")
        own = self.store.stage_shards(name) if processes.is_main else None
        staging = Path(processes.share(str(own)))
        try:
            run.sharing.write_shards(staging)
            is_finite = run.sharing.is_finite()
            if processes.is_main:
                checkpoint = make_checkpoint(run, self.identity, with_tensors=False)
                self.store.adopt_shards(staging, checkpoint, name, is_finite=is_finite)
        except BaseException:
            if processes.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        fault_point("save.after_checkpoint")
