"""A few real optimiser steps of a run, timed: speed, memory, where the time goes, and how far the ceiling is."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from ollatune.base.errors import Interrupted, UsageError
from ollatune.training.ceiling import measure_ceiling, step_products
from ollatune.training.environment import DTYPES, peak_memory_bytes
from ollatune.training.loop import TrainingRun
from ollatune.training.reports import Hooks, PhaseClock, StepReport
from ollatune.training.state import RunState


@dataclass
class StepMeter:
    """Collects the step reports of a run that is made to last `warmup` + `steps` steps; saves nothing."""

    warmup: int
    steps: int
    reports: list[StepReport] = field(default_factory=list)
    phases: PhaseClock = field(default_factory=PhaseClock)

    def hooks(self) -> Hooks:
        """For `training.build.build_run`."""
        return Hooks(self._on_step, lambda state: None, lambda state, name, is_best: None, _refuse)

    def _on_step(self, state: RunState, report: StepReport) -> None:
        self.reports.append(report)
        if len(self.reports) == self.warmup:
            self.phases.seconds.clear()

    def measure(self, run: TrainingRun, dtype: str) -> dict[str, Any]:
        """Run the steps; returns the figures (see docs/training.md). Raises what training raises."""
        run.total_steps, run.phases = self.warmup + self.steps, self.phases
        _run(run)
        measured = self.reports[self.warmup :]
        if not measured:
            raise UsageError("No step was done.", hint="Look at the log above for skipped steps.")
        peak = peak_memory_bytes(run.device)  # before the ceiling's own weights are made
        result = _figures(measured) | {"peak_mb": round(peak / 2**20)}
        return result | self._phases(measured) | _ceiling(run, measured, dtype)

    def _phases(self, measured: list[StepReport]) -> dict[str, Any]:
        """Share of each phase in the measured steps; `other` is clipping, counting and the loop itself."""
        total = sum(report.seconds for report in measured)
        shares = {name: seconds / total for name, seconds in self.phases.seconds.items()}
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        return {"phases": {name: round(share, 4) for name, share in shares.items()}}


def _run(run: TrainingRun) -> None:
    """The loop's own message on Ctrl-C would say that the state is saved."""
    try:
        run.run()
    except Interrupted as error:
        raise Interrupted(
            "Stopped while measuring; nothing was written.", signal_number=error.exit_code - 128
        ) from error


def _refuse() -> RunState:
    raise UsageError(
        "Nothing is saved while measuring, so nothing can be rolled back.",
        hint="Measure with training.on_non_finite: stop and training.on_loss_spike: warn.",
    )


def _figures(measured: list[StepReport]) -> dict[str, Any]:
    speeds = [report.num_tokens / report.seconds for report in measured]
    seconds = sum(report.seconds for report in measured)
    tokens = sum(report.num_tokens for report in measured)
    return {
        "steps": len(measured),
        "tokens_per_second": round(tokens / seconds, 2),
        "spread": [round(min(speeds), 2), round(max(speeds), 2)],
        "seconds_per_step": round(statistics.median(report.seconds for report in measured), 4),
        "tokens_per_step": round(tokens / len(measured), 1),
        "targets_per_step": round(sum(r.num_targets for r in measured) / len(measured), 1),
        "computed_share": round(sum(r.num_computed for r in measured) / tokens, 4),
        "loss": round(measured[-1].loss, 5),
    }


def _ceiling(run: TrainingRun, measured: list[StepReport], dtype: str) -> dict[str, Any]:
    """The bare products of an average step: over all its tokens, shared beginnings counted each time."""
    count = len(measured)
    tokens = sum(report.num_tokens for report in measured)
    targets = sum(report.num_targets for report in measured)
    micro_batches = run.loader.settings.accumulation_steps * run.state.split
    products = step_products(
        run.model,
        num_tokens=max(1, round(tokens / count / micro_batches)),
        num_targets=max(1, round(targets / count / micro_batches)),
    )
    ceiling = measure_ceiling(products, DTYPES[dtype], run.device)
    bare_seconds = ceiling.seconds * micro_batches * count
    return {
        "ceiling_tokens_per_second": round(tokens / bare_seconds, 1),
        "ceiling_gflops": round(ceiling.gflops, 1),
        "ceiling_share": round(bare_seconds / sum(r.seconds for r in measured), 4),
    }
