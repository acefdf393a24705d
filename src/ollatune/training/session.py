"""One run from its configuration to its finished output folder."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ollatune.base.errors import DivergedError, Interrupted, OllatuneError, UsageError
from ollatune.base.log import add_log_file, get_logger, remove_log_file
from ollatune.checkpoint.format import Checkpoint, read_checkpoint
from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.config.load import dump_config
from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.modeling.base import BaseSource, FindRemote, check_family, resolve_base
from ollatune.modeling.opened import open_base
from ollatune.modeling.peft_format import save_adapter
from ollatune.modeling.trained import lora_settings
from ollatune.training.build import (
    Placement,
    build_run,
    build_validator,
    load_data,
)
from ollatune.training.checkpointing import (
    Identity,
    Saver,
    check_changes,
    copy_previous_best,
    require_disk,
    restore,
)
from ollatune.training.distributed import Processes, connect_processes, disconnect_processes
from ollatune.training.environment import (
    choose_device,
    choose_dtype,
    configure_threads,
    git_commit,
    hardware,
    log_environment,
    package_versions,
    peak_memory_bytes,
)
from ollatune.training.loop import Hooks, StepReport, TrainingRun
from ollatune.training.placement import choose_mode
from ollatune.training.progress import Progress
from ollatune.training.run_folder import MetricsLog, RunFolder, new_run_id, utc_now
from ollatune.training.state import RunState
from ollatune.training.validation import Metric


@dataclass
class Session:
    """Everything `ollatune train` was asked for (see `commands.train`). `run` does it once."""

    config: Config
    checkpoints: Path
    overrides: dict[str, Any]
    resume_from: tuple[Path, Checkpoint] | None = None
    overwrite: bool = False
    force: bool = False
    debug: bool = False
    profile: bool = False
    distributed: bool = False
    show_progress: bool = True
    started: float = field(default_factory=time.perf_counter)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    find_remote: FindRemote | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end; returns what is in run.json. Raises any OllatuneError, with the status written first."""
        self.folder = RunFolder(self.config.output.folder)
        device = choose_device()
        self.processes = Processes(device=device)
        if self.distributed:
            self.processes = connect_processes(
                device, timeout_seconds=self.config.distributed.timeout_seconds
            )
        try:
            lock = self.folder.lock() if self.processes.is_main else contextlib.nullcontext()
            with lock:
                return self._run_locked(device)
        finally:
            disconnect_processes()

    def _run_locked(self, device: torch.device) -> dict[str, Any]:
        self.run_id = self.resume_from[1].run_id if self.resume_from else new_run_id()
        self.store = CheckpointStore(
            self.checkpoints,
            keep_best=self.config.training.keep_checkpoints,
            run_id=self.run_id,
        )
        if self.processes.is_main:
            self._claim_folders()
        self.processes.barrier()
        log_path = self.config.output.logs / f"{self.run_id}.log"
        handler = add_log_file(log_path) if self.processes.is_main else None
        try:
            return self._train(device)
        except OllatuneError as error:
            self._record_failure(error)
            raise
        finally:
            if handler is not None:
                remove_log_file(handler)

    def _claim_folders(self) -> None:
        """A new run needs folders without another run's results; nothing is removed unless --overwrite was given."""
        if self.resume_from is not None:
            return
        if self.overwrite:
            self.folder.clear()
            self.store.clear()
            return
        self.folder.refuse_other_run()
        self.store.refuse_other_run()

    def _train(self, device: torch.device) -> dict[str, Any]:
        logger = get_logger("training")
        num_threads = configure_threads()
        dtype, reason = choose_dtype(self._dtype_setting(), device)
        log_environment(device, dtype, reason, num_threads)
        source = resolve_base(
            self.config.model.base_model,
            models_folder=self.config.ollama.models,
            find_remote=self.find_remote,
        )
        self.base = open_base(source)
        check_family(source, self.config.model.model_family, self.base.architecture)
        logger.info("Base model %s, %s template.", source.name, self.base.template.source)
        splits = load_data(self.config, self.base)
        mode = choose_mode(self.config, self.base, dtype, device)
        placement = Placement(device, dtype, mode)
        self.identity = self._identity(source, splits, dtype, mode)
        if self.resume_from is not None:
            self._check_resume(self.resume_from[1])
        run = build_run(self.config, self.base, splits, placement, self.processes, self._hooks())
        self.run_state = run
        self.validator = build_validator(run, self.base, splits, self.metrics)
        self.saver = Saver(self.store, self.folder.best_path, self.identity)
        if self.resume_from is not None:
            self._resume(run, *self.resume_from)
        if self.processes.is_main:
            require_disk(run, self.checkpoints, self.config.training.keep_checkpoints)
            self._open_run(splits)
        return self._loop(run)

    def _dtype_setting(self) -> str:
        """A resumed run computes in the type it began with, on whatever machine it goes on."""
        if self.resume_from is not None and self.config.model.dtype == "auto":
            return str(self.resume_from[1].base.get("dtype", "auto"))
        return self.config.model.dtype

    def _identity(
        self, source: BaseSource, splits: DatasetSplits, dtype: str, mode: str
    ) -> Identity:
        base = {
            "name": source.name,
            "digest": source.digest,
            "origin": source.origin,
            "path": str(source.path),
            "architecture": self.base.architecture,
            "template_digest": self.base.template.digest,
            "tokenizer_digest": self.base.tokenizer.digest,
            "dtype": dtype,
            "mode": mode,
        }
        return Identity(
            self.run_id,
            self.config.model_dump(mode="json"),
            base,
            data_digest(splits),
            self.overrides,
        )

    def _check_resume(self, checkpoint: Checkpoint) -> None:
        check_changes(checkpoint.config, self.identity.config, force=self.force)
        problems = [
            f"{what} differs ({old[:12]} → {new[:12]})"
            for what, old, new in (
                ("the base model", checkpoint.base["digest"], self.identity.base["digest"]),
                (
                    "the training data",
                    checkpoint.resume.get("data_digest", ""),
                    self.identity.data_digest,
                ),
            )
            if checkpoint.resume and old != new
        ]
        if problems and not self.force:
            raise UsageError(
                f"This is not the run that the checkpoint is of: {'; '.join(problems)}.",
                hint="Put it back, start a new run in another --output, or insist with --force.",
            )

    def _resume(self, run: TrainingRun, path: Path, checkpoint: Checkpoint) -> None:
        restore(run, checkpoint)
        get_logger("training").info(
            "Resumed from %s: epoch %d, step %d of %d.",
            path, checkpoint.epoch, checkpoint.step, run.total_steps,
        )  # fmt: skip
        if not self.processes.is_main:
            return
        previous = Path(str(checkpoint.config["output"]["folder"])) / self.folder.best_path.name
        copy_previous_best(previous, self.folder.best_path)
        self.folder.truncate_log(self.folder.metrics_path, checkpoint.step)
        self.folder.truncate_log(self.folder.samples_path, checkpoint.step)

    def _open_run(self, splits: DatasetSplits) -> None:
        self.folder.write_config(dump_config(self.config))
        self.run_values: dict[str, Any] = {
            "run_id": self.run_id,
            "status": "running",
            "started": utc_now(),
            "resumed_from": None if self.resume_from is None else str(self.resume_from[0]),
            "base": self.identity.base,
            "data": splits.report.as_dict(),
            "data_digest": self.identity.data_digest,
            "seed": self.config.training.seed,
            "deterministic": self.config.training.deterministic,
            "versions": package_versions(),
            "git_commit": git_commit(),
            "hardware": hardware(self.run_state.device),
            "processes": self.processes.count,
            "checkpoints": str(self.checkpoints),
        }
        self.folder.write_run(self.run_values)
        self.metrics_log = MetricsLog(self.folder.metrics_path)
        self.samples_log = MetricsLog(self.folder.samples_path)

    def _hooks(self) -> Hooks:
        return Hooks(self._on_step, self._validate, self._save, self._roll_back)

    def _loop(self, run: TrainingRun) -> dict[str, Any]:
        self.training_started = time.perf_counter()
        self.first_step = run.state.step
        self.tokens_before, self.targets_before = run.state.tokens, run.state.targets
        self.progress = Progress(
            run.total_steps,
            run.state.step,
            is_shown=self.show_progress and self.processes.is_main,
        )
        try:
            run.run()
        finally:
            self.progress.close()
            if self.processes.is_main:
                self.metrics_log.close()
                self.samples_log.close()
        return self._finish(run) if self.processes.is_main else {}

    def _on_step(self, state: RunState, report: StepReport) -> None:
        self.progress.step(state, report)
        if self.processes.is_main:
            self.metrics_log.write(
                {
                    "type": "step",
                    "step": state.step,
                    "epoch": state.epoch,
                    "loss": report.loss,
                    "grad_norm": report.grad_norm,
                    "learning_rate": report.learning_rate,
                    "num_tokens": report.num_tokens,
                    "num_computed": report.num_computed,
                    "num_targets": report.num_targets,
                    "tokens_per_second": round(report.num_tokens / report.seconds, 2),
                    "seconds": round(report.seconds, 4),
                }
            )

    def _validate(self, state: RunState) -> float | None:
        if self.validator is None:
            return None
        report = self.validator.validate()
        if not self.processes.is_main:
            return report.loss
        values = {
            "type": "validation",
            "step": state.step,
            "epoch": state.epoch,
            "train_loss": state.train_loss,
            "val_loss": report.loss,
            "perplexity": report.perplexity,
            "token_accuracy": report.token_accuracy,
            **report.metrics,
        }
        self.metrics_log.write(values)
        for sample in report.samples:
            self.samples_log.write({"step": state.step, "epoch": state.epoch, **sample})
        scores = "".join(f", {name} {value:.3f}" for name, value in report.metrics.items())
        get_logger("training").info(
            "Epoch %d, step %d: train loss %.4f, validation loss %.4f, perplexity %.2f, token accuracy %.3f%s",
            state.epoch, state.step, state.train_loss or 0.0, report.loss, report.perplexity,
            report.token_accuracy, scores,
        )  # fmt: skip
        return report.loss

    def _save(self, state: RunState, name: str, is_best: bool) -> None:
        if self.processes.is_main:
            self.saver.save(self.run_state, name, is_best)
        self.processes.barrier()

    def _roll_back(self) -> RunState:
        path, checkpoint = newest_checkpoint(self.checkpoints)
        restore(self.run_state, checkpoint)
        get_logger("training").warning("Rolled back to %s (step %d).", path, checkpoint.step)
        return self.run_state.state

    def _finish(self, run: TrainingRun) -> dict[str, Any]:
        """The adapter of the best model in PEFT's format, and the run's last word."""
        best = read_checkpoint(self.folder.best_path)
        if self.config.advanced.lora_enabled:
            save_adapter(
                self.folder.path,
                best.model_state_dict,
                lora_settings(self.config),
                base_name=self.identity.base["name"],
            )
        seconds = time.perf_counter() - self.training_started
        tokens = run.state.tokens - self.tokens_before
        self.run_values |= {
            "status": "finished",
            "finished": utc_now(),
            "total_seconds": round(time.perf_counter() - self.started, 2),
            "train_seconds": round(seconds, 2),
            "steps": run.state.step,
            "epochs": run.state.epoch,
            "stopped_early": run.state.stopped_early,
            "tokens": run.state.tokens,
            "target_tokens": run.state.targets,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 2),
            "peak_memory_mb": round(peak_memory_bytes(run.device) / 2**20, 1),
            "train_loss": run.state.train_loss,
            "val_loss": run.state.val_loss,
            "best_val_loss": best.val_loss,
            "best_model": str(self.folder.best_path),
        }
        self.folder.write_run(self.run_values)
        get_logger("training").info("Best model: %s", self.folder.best_path)
        return self.run_values

    def _record_failure(self, error: OllatuneError) -> None:
        """Leave the reason in run.json, if the run had begun, and in the log file."""
        get_logger("training").debug("Ended: %s", error)
        if not self.processes.is_main or not hasattr(self, "run_values"):
            return
        status = "failed"
        if isinstance(error, Interrupted):
            status = "interrupted"
        elif isinstance(error, DivergedError):
            status = "diverged"
        self.run_values |= {"status": status, "finished": utc_now(), "error": str(error)}
        with contextlib.suppress(OllatuneError):
            self.folder.write_run(self.run_values)


def data_digest(splits: DatasetSplits) -> str:
    """Hex sha256 of the training examples as they are trained on: tokens, targets, order of the file."""
    digest = hashlib.sha256()
    for index in range(len(splits.train)):
        example = splits.train[index]
        digest.update(example.token_ids.tobytes())
        digest.update(example.is_target.tobytes())
    return digest.hexdigest()
