"""A few real optimiser steps of a run, timed: speed, memory, where the time goes, and how far the ceiling is."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ollatune.base.errors import Interrupted, UsageError
from ollatune.training.ceiling import measure_ceiling, step_products
from ollatune.training.environment import DTYPES, peak_memory_bytes
from ollatune.training.loop import TrainingRun
from ollatune.training.profiling import PHASES
from ollatune.training.reports import Hooks, StepReport
from ollatune.training.state import RunState

_PROFILED_STEPS = 2


@dataclass
class StepMeter:
    """Collects the step reports of a run that is made to last `warmup` + `steps` + 2 steps; saves nothing.

    The last two steps run under the profiler, for the phases alone: it slows them down.
    """

    warmup: int
    steps: int
    reports: list[StepReport] = field(default_factory=list)
    profiler: profile | None = None
    peak_bytes: int = 0

    def hooks(self) -> Hooks:
        """For `training.build.build_run`."""
        return Hooks(self._on_step, lambda state: None, lambda state, name, is_best: None, _refuse)

    def _on_step(self, state: RunState, report: StepReport) -> None:
        self.reports.append(report)

    def measure(self, run: TrainingRun, dtype: str) -> dict[str, Any]:
        """Run the steps; returns the figures (see docs/training.md). Raises what training raises."""
        run.total_steps = self.warmup + self.steps
        _run(run)
        self.peak_bytes = peak_memory_bytes(run.device)
        measured = self.reports[self.warmup :]
        if not measured:
            raise UsageError("No step was done.", hint="Look at the log above for skipped steps.")
        run.total_steps += _PROFILED_STEPS
        with profile(activities=[ProfilerActivity.CPU]) as self.profiler:
            _run(run)
        profiled = self.reports[self.warmup + len(measured) :]
        result = _figures(measured) | {"peak_mb": round(self.peak_bytes / 2**20)}
        return result | self._phases(profiled) | _ceiling(run, measured, dtype)

    def _phases(self, profiled: list[StepReport]) -> dict[str, Any]:
        """Share of each phase in the profiled steps; `other` is clipping, counting and the loop itself."""
        assert self.profiler is not None
        total = sum(report.seconds for report in profiled)
        events = {event.key: event for event in self.profiler.key_averages()}
        shares = {
            phase: events[phase].cpu_time_total / 1e6 / total for phase in PHASES if phase in events
        }
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        return {"phases": {phase: round(share, 4) for phase, share in shares.items()}}


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
        hint="Measure with training.on_non_finite: stop.",
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
