"""What a run says about itself while it goes on: run.json, metrics.jsonl, samples.jsonl, the progress bar."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from ollatune.base.errors import DivergedError, EndedElsewhereError, Interrupted, OllatuneError
from ollatune.base.log import get_logger
from ollatune.training.loop import TrainingRun
from ollatune.training.memory_summary import memory_by_part, memory_text
from ollatune.training.progress import Progress
from ollatune.training.reports import SpikeReport, StepReport
from ollatune.training.run_folder import MetricsLog, RunFolder, finite, utc_now
from ollatune.training.state import RunState
from ollatune.training.validation import ValidationReport


class Recorder:
    """The main process's record of one run in `folder`; `values` is what run.json holds."""

    def __init__(
        self, folder: RunFolder, values: dict[str, Any], run: TrainingRun, *, show_progress: bool
    ) -> None:
        self.folder = folder
        self.values = values
        self._started = time.perf_counter()
        self._tokens_before = run.state.tokens
        self._show_progress = show_progress
        self._open(run)
        folder.write_run(values)

    def _open(self, run: TrainingRun) -> None:
        self.metrics = MetricsLog(self.folder.metrics_path)
        self.samples = MetricsLog(self.folder.samples_path)
        self.progress = Progress(run.total_steps, run.state.step, is_shown=self._show_progress)

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        self.samples.close()

    def step(self, state: RunState, report: StepReport) -> None:
        """One optimiser step was done."""
        self.progress.step(state, report)
        self.metrics.write(
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

    def validation(self, state: RunState, report: ValidationReport) -> None:
        """One validation was done."""
        self.metrics.write(
            {
                "type": "validation",
                "step": state.step,
                "epoch": state.epoch,
                "train_loss": state.train_loss,
                "val_loss": report.loss,
                "perplexity": report.perplexity,
                "token_accuracy": report.token_accuracy,
                **report.metrics,
            }
        )
        for sample in report.samples:
            self.samples.write({"step": state.step, "epoch": state.epoch, **sample})
        if not math.isfinite(report.loss):
            get_logger("training").warning(
                "The validation loss at step %d is %s: it counts as no improvement. Look at the validation records, "
                "or compute in fp32 (model.dtype).", state.step, report.loss,
            )  # fmt: skip
        scores = "".join(f", {name} {value:.3f}" for name, value in report.metrics.items())
        get_logger("training").info(
            "Epoch %d, step %d: train loss %.4f, validation loss %.4f, perplexity %.2f, token accuracy %.3f%s",
            state.epoch, state.step, state.train_loss or 0.0, report.loss, report.perplexity,
            report.token_accuracy, scores,
        )  # fmt: skip

    def spike(self, state: RunState, report: SpikeReport) -> None:
        """A loss spike was seen. After a roll-back the line belongs to the step that the run went back to."""
        is_back = report.action == "rollback"
        self.metrics.write(
            {
                "type": "loss_spike",
                "step": state.step if is_back else report.at_step,
                "at_step": report.at_step,
                "epoch": state.epoch,
                "loss": report.spike.loss,
                "mean": report.spike.mean,
                "sigma": report.spike.sigma,
                "action": report.action,
            }
        )

    def rolled_back(self, run: TrainingRun) -> None:
        """Forget what was written after the step that `run` went back to."""
        self.close()
        self.folder.truncate_logs(run.state.step)
        self._open(run)

    def finish(self, run: TrainingRun, *, seconds: float, best_val_loss: float | None) -> None:
        """The run's last word; `seconds` since the program began."""
        state = run.state
        trained = time.perf_counter() - self._started
        memory = memory_by_part(run)
        self.values |= {
            "status": "finished",
            "finished": utc_now(),
            "total_seconds": round(seconds, 2),
            "train_seconds": round(trained, 2),
            "steps": state.step,
            "epochs": state.epoch,
            "stopped_early": state.stopped_early,
            "skipped_steps": state.num_skipped,
            "rollbacks": state.num_rollbacks,
            "loss_spikes": state.num_spikes + state.num_spike_rollbacks,
            "overflows": state.num_overflows,
            "tokens": state.tokens,
            "target_tokens": state.targets,
            "tokens_per_second": round(
                (state.tokens - self._tokens_before) / max(trained, 1e-9), 2
            ),
            "peak_memory_mb": round(memory["peak"] / 2**20, 1),
            "memory_bytes": memory,
            "train_loss": state.train_loss,
            "val_loss": finite(state.val_loss),
            "best_val_loss": finite(best_val_loss),
            "best_model": str(self.folder.best_path),
        }
        self.folder.write_run(self.values)
        get_logger("training").info("Memory: %s.", memory_text(memory))
        get_logger("training").info("Best model: %s", self.folder.best_path)

    def failed(self, error: Exception) -> None:
        """Leave the reason in run.json."""
        codes = {130: "interrupted", 143: "interrupted", DivergedError.exit_code: "diverged"}
        status = "failed"
        if isinstance(error, (DivergedError, EndedElsewhereError, Interrupted)):
            status = codes.get(error.exit_code, status)
        self.values |= {"status": status, "finished": utc_now(), "error": str(error)}
        with contextlib.suppress(OllatuneError):
            self.folder.write_run(self.values)
