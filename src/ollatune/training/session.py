"""One run from its configuration to its finished output folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ollatune.base.errors import Interrupted, OllatuneError, OutOfMemoryError, StorageError
from ollatune.base.faults import fault_point
from ollatune.base.files import require_writable
from ollatune.base.leaving import first_process_speaks
from ollatune.base.log import add_log_file, configure_logging, get_logger, remove_log_file
from ollatune.base.signals import StopSignal, name_of
from ollatune.checkpoint.format import Checkpoint, read_checkpoint
from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.config.load import dump_config
from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.modeling.base import FindRemote, check_family, resolve_base
from ollatune.modeling.compiled import require_compiler
from ollatune.modeling.memory import model_sizes
from ollatune.modeling.opened import open_base
from ollatune.modeling.peft_format import save_adapter
from ollatune.modeling.trained import lora_settings
from ollatune.training.agreement import agreed_checkpoint, require_same
from ollatune.training.backends import require_backend
from ollatune.training.batch_plan import resumed_plan
from ollatune.training.best_model import settle_best_model
from ollatune.training.build import (
    build_run,
    load_data,
)
from ollatune.training.build_validator import build_validator
from ollatune.training.checkpointing import (
    Saver,
    restore,
)
from ollatune.training.debug import debugging, log_gradients
from ollatune.training.disk import require_disk
from ollatune.training.distributed import (
    Processes,
    connect_processes,
    disconnect_processes,
)
from ollatune.training.environment import (
    DETERMINISM,
    choose_device,
    choose_dtype,
    configure_threads,
    git_commit,
    hardware,
    log_environment,
    package_versions,
)
from ollatune.training.estimate import warn_if_too_large
from ollatune.training.identity import identity_of, require_same_run
from ollatune.training.interrupts import stopped_before_training
from ollatune.training.length import make_schedule, total_steps
from ollatune.training.loop import TrainingRun
from ollatune.training.memory_faults import OUT_OF_MEMORY_HINT, is_out_of_memory
from ollatune.training.memory_summary import memory_by_part, memory_text
from ollatune.training.placement import Placement, choose_mode
from ollatune.training.profiling import StepProfiler
from ollatune.training.recorder import Recorder
from ollatune.training.reports import Hooks, SpikeReport, StepReport
from ollatune.training.run_folder import RunFolder, new_run_id, utc_now
from ollatune.training.state import RunState
from ollatune.training.teaching import open_teacher
from ollatune.training.validation import Metric

Decision = TypeVar("Decision")


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
    recorder: Recorder | None = None
    profiler: StepProfiler | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end; returns what is in run.json. Raises any OllatuneError, with the status written first."""
        with first_process_speaks():
            require_backend(self.config, distributed=self.distributed)
            device = choose_device()
            if self.config.training.torch_compile:
                require_compiler(device)
        self.folder = RunFolder(self.config.output.folder)
        self.processes = Processes(device=device)
        if self.distributed:
            self.processes = connect_processes(
                device, timeout_seconds=self.config.distributed.timeout_seconds
            )
        if not self.processes.is_main:
            configure_logging(is_main_process=False)
        try:
            lock = self.folder.lock() if self.processes.is_main else contextlib.nullcontext()
            with lock:
                return self._run_locked(device)
        except (Exception, StopSignal) as error:
            raise self.processes.ended_by(self._known(error)) from error.__cause__
        finally:
            disconnect_processes()

    def _run_locked(self, device: torch.device) -> dict[str, Any]:
        self.resume_from = agreed_checkpoint(self.processes, self.resume_from)
        self.run_id = self.resume_from[1].run_id if self.resume_from else ""
        self.run_id = self.run_id or self.processes.share(new_run_id())
        self.store = CheckpointStore(
            self.checkpoints,
            keep_best=self.config.training.keep_checkpoints,
            run_id=self.run_id,
        )
        if self.processes.is_main:
            self._claim_folders()
            for folder in (self.folder.path, self.checkpoints, self.config.output.logs):
                require_writable(folder)
        self.processes.barrier()
        log_path = self.config.output.logs / f"{self.run_id}.log"
        handler = add_log_file(log_path) if self.processes.is_main else None
        try:
            return self._train(device)
        except (Exception, StopSignal) as error:
            known = self.processes.ended_by(self._known(error))
            get_logger("training").debug("Ended: %s", known)
            if self.recorder is not None:
                self.recorder.failed(known)
            raise known from error.__cause__
        finally:
            if handler is not None:
                remove_log_file(handler)

    def _known(self, error: BaseException) -> Exception:
        """A signal outside the loop as an error that says how to go on; a failing disk with what is safe on it."""
        if not isinstance(error, StopSignal):
            assert isinstance(error, Exception)
            if is_out_of_memory(error) and not isinstance(error, OllatuneError):
                cause, error = error, OutOfMemoryError("Out of memory.", hint=OUT_OF_MEMORY_HINT)
                error.__cause__ = cause
            newest = getattr(self, "store", None) and self.store.newest
            if isinstance(error, StorageError) and newest and str(newest) not in error.hint:
                error.hint += f" {newest} is whole: --resume auto goes on from it."
            run = getattr(self, "run_state", None)
            if isinstance(error, OutOfMemoryError) and run and "Memory: " not in error.message:
                error.message += f" Memory: {memory_text(memory_by_part(run))}."
            return error
        has_saved = self.recorder is not None and self.run_state.state.last_saved_step > 0
        if self.resume_from is None and not has_saved:
            return stopped_before_training(error.number)
        return Interrupted(
            f"Stopped by {name_of(error.number)}; what was saved is whole.",
            signal_number=error.number,
            hint="Continue with --resume auto.",
        )

    def _claim_folders(self) -> None:
        """A new run needs folders without another run's results; nothing is removed unless --overwrite was given."""
        if self.resume_from is not None:
            self.folder.refuse_other_run(self.run_id)
            self.store.refuse_other_run(resumes=True)
            if self.folder.read_run().get("run_id", self.run_id) != self.run_id:
                self.folder.clear()  # of a run that ended before it saved anything
            return
        if self.overwrite:
            self.folder.clear()
            self.store.clear()
            return
        self.folder.refuse_other_run()
        self.store.refuse_other_run()
        if self.folder.run_path.exists():  # of a run that ended before it saved anything
            self.folder.clear()

    def _train(self, device: torch.device) -> dict[str, Any]:
        logger = get_logger("training")
        num_threads = configure_threads()
        dtype, reason = self._decided(lambda: choose_dtype(self._dtype_setting(), device))
        native = self.config.training.native_kernels
        log_environment(device, dtype, reason, num_threads, native_kernels=native)
        source = resolve_base(
            self.config.model.base_model,
            models_folder=self.config.ollama.models,
            find_remote=self.find_remote,
        )
        self.base = open_base(source)
        check_family(source, self.config.model.model_family, self.base.architecture)
        if self.config.training.deterministic:
            logger.info("%s", DETERMINISM[device.type == "cuda"])
        logger.info("Base model %s, %s template.", source.name, self.base.template.source)
        teacher = open_teacher(self.config, self.base, self.find_remote)
        splits = load_data(
            self.config, self.base, show_progress=self.show_progress and self.processes.is_main
        )
        if splits.rejections.errors and self.processes.is_main:
            splits.rejections.write(self.folder.path / "rejected.jsonl")
        mode = self._decided(lambda: choose_mode(self.config, self.base, dtype, device))
        placement = Placement(device, dtype, mode)
        self.identity = identity_of(
            self.run_id, self.config, self.base, splits, self.overrides,
            dtype=dtype, mode=mode, teacher=teacher,
        )  # fmt: skip
        require_same(self.processes, self.identity.facts())
        if self.processes.is_main:
            require_disk(self.config, model_sizes(self.base.gguf, self.config), self.checkpoints)
            warn_if_too_large(self.config, self.base, splits, placement, teacher)
        plan = None
        if self.resume_from is not None:
            require_same_run(self.resume_from[1], self.identity, force=self.force)
            plan = resumed_plan(self.config, self.resume_from[1], self.processes.count)
        fault_point("train.build")
        run = build_run(
            self.config, self.base, splits, placement, self.processes, self._hooks(), plan,
            teacher,
        )  # fmt: skip
        self.run_state = run
        self.validator = build_validator(run, self.base, splits, self.metrics)
        self.saver = Saver(self.store, self.folder.best_path, self.identity)
        if self.resume_from is not None:
            self._resume(run, *self.resume_from)
        if self.processes.is_main:
            self._open_run(splits)
        return self._loop(run)

    def _decided(self, choose: Callable[[], Decision]) -> Decision:
        """What the main process chooses: two that measure the same machine may come to different ends."""
        chosen: Decision = self.processes.share(choose() if self.processes.is_main else None)
        return chosen

    def _dtype_setting(self) -> str:
        """A resumed run computes in the type it began with, on whatever machine it goes on."""
        if self.resume_from is not None and self.config.model.dtype == "auto":
            return str(self.resume_from[1].base.get("dtype", "auto"))
        return self.config.model.dtype

    def _resume(self, run: TrainingRun, path: Path, checkpoint: Checkpoint) -> None:
        restore(run, checkpoint)
        run.total_steps = total_steps(self.config, run.loader, run.state)
        run.schedule = make_schedule(self.config, run.total_steps)
        get_logger("training").info(
            "Resumed from %s: epoch %d, step %d of %d.",
            path, checkpoint.epoch, checkpoint.step, run.total_steps,
        )  # fmt: skip
        if run.state.step >= run.total_steps or run.state.stopped_early:
            get_logger("training").warning(
                "There is nothing left to train: %s. For more, raise training.epochs or training.max_steps, "
                "or training.early_stopping_patience where that ended it.",
                "the run was stopped early" if run.state.stopped_early else
                f"the checkpoint is of step {run.state.step}, the run ends at step {run.total_steps}",
            )  # fmt: skip
        best = run.early_stopping.best
        if self.processes.is_main:
            if later := self.store.adopt(checkpoint.step):
                get_logger("training").warning(
                    "Checkpoints of later steps are set aside as later-…: %s.", ", ".join(later)
                )
            best = settle_best_model(self.folder.best_path, path, checkpoint, best)
            self.folder.truncate_logs(checkpoint.step)
        run.early_stopping.best = self.processes.share(best)

    def _open_run(self, splits: DatasetSplits) -> None:
        self.folder.write_config(dump_config(self.config))
        settings = self.run_state.loader.settings
        values = {
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
            "batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation_steps,
            "checkpoints": str(self.checkpoints),
        }
        self.recorder = Recorder(
            self.folder, values, self.run_state, show_progress=self.show_progress
        )

    def _hooks(self) -> Hooks:
        return Hooks(self._on_step, self._validate, self._save, self._roll_back, self._on_spike)

    def _loop(self, run: TrainingRun) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            if self.recorder is not None:
                stack.callback(self.recorder.close)
            if self.profile and self.processes.is_main:
                steps = run.total_steps - run.state.step
                self.profiler = StepProfiler(self.folder.path / "profile", steps, run)
                stack.callback(self.profiler.close)
            if self.debug:
                self.gradients_shown = False
                stack.enter_context(debugging(run, self.base.tokenizer.decode))
            run.run()
        return self._finish(run)

    def _on_step(self, state: RunState, report: StepReport) -> None:
        if self.recorder is not None:
            self.recorder.step(state, report)
        if self.debug and not self.gradients_shown:
            self.gradients_shown = True
            log_gradients(self.run_state.model)
        if self.profiler is not None:
            self.profiler.step(report)

    def _on_spike(self, state: RunState, report: SpikeReport) -> None:
        if self.recorder is not None:
            self.recorder.spike(state, report)

    def _validate(self, state: RunState) -> float | None:
        if self.validator is None:
            return None
        fault_point("train.validate")
        report = self.validator.validate(self.run_state.is_to_stop)
        if self.recorder is not None:
            self.recorder.validation(state, report)
        return report.loss

    def _save(self, state: RunState, name: str, is_best: bool) -> None:
        self.saver.save(self.run_state, name, is_best)
        self.processes.barrier()

    def _roll_back(self) -> RunState:
        newest = None
        if self.processes.is_main:
            newest = newest_checkpoint(self.checkpoints, with_tensors=False)
        agreed = agreed_checkpoint(self.processes, newest)
        assert agreed is not None
        path, checkpoint = agreed
        restore(self.run_state, checkpoint)
        if self.recorder is not None:
            self.recorder.rolled_back(self.run_state)
        self.processes.barrier()
        get_logger("training").warning("Rolled back to %s (step %d).", path, checkpoint.step)
        return self.run_state.state

    def _finish(self, run: TrainingRun) -> dict[str, Any]:
        """The adapter of the best model in PEFT's format, and the run's last word."""
        if self.recorder is None:
            return {}
        best = read_checkpoint(self.folder.best_path)
        if self.config.advanced.lora_enabled:
            save_adapter(
                self.folder.path,
                best.model_state_dict,
                lora_settings(self.config),
                base_name=self.identity.base["name"],
            )
        seconds = time.perf_counter() - self.started
        self.recorder.finish(run, seconds=seconds, best_val_loss=best.val_loss)
        return self.recorder.values
