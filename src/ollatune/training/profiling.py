"""`--profile`: a trace of a few steps for a viewer, and one page that says where time and memory went."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from ollatune.base.files import make_folder, write_text
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.training.loop import TrainingRun
from ollatune.training.memory_summary import memory_by_part, memory_text
from ollatune.training.reports import StepReport

PHASES = ("data", "forward", "backward", "optimizer")
_WAIT, _WARMUP, _ACTIVE = 1, 1, 5
_TOP_OPERATIONS = 15


class StepProfiler:
    """Profiles up to five steps of a run: not the first two, where there are more.

    Args:
        folder: gets `trace.json` (for Perfetto or chrome://tracing) and `summary.txt`.
        num_steps: steps this run is going to do.
        run: for where its memory is.
    """

    def __init__(self, folder: Path, num_steps: int, run: TrainingRun) -> None:
        self.folder = make_folder(folder)
        self.run = run
        self.reports: list[StepReport] = []
        skipped = _WAIT + _WARMUP if num_steps > _WAIT + _WARMUP else 0
        self._first = skipped
        self._active = max(1, min(_ACTIVE, num_steps - skipped))
        activities = [ProfilerActivity.CPU]
        if run.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():  # a run of one or two steps cannot do without its first
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            phases = schedule(
                wait=_WAIT if skipped else 0,
                warmup=_WARMUP if skipped else 0,
                active=self._active,
                repeat=1,
            )
        self._profile = profile(
            activities=activities,
            schedule=phases,
            on_trace_ready=self._write,
            profile_memory=True,
        )
        self._seen = 0
        self._is_open = True
        self._profile.start()

    def step(self, report: StepReport) -> None:
        """One optimiser step has ended."""
        if not self._is_open:
            return
        self._seen += 1
        if self._first < self._seen <= self._first + self._active:
            self.reports.append(report)
        self._profile.step()
        if self._seen >= self._first + self._active:
            self.close()

    def close(self) -> None:
        """End the recording, also of a run that ended early."""
        if self._is_open:
            self._is_open = False
            self._profile.stop()

    def _write(self, recorded: Any) -> None:
        if not self.reports:
            return
        recorded.export_chrome_trace(str(self.folder / "trace.json"))
        text = summary(recorded.key_averages(), self.reports, memory_by_part(self.run))
        write_text(self.folder / "summary.txt", text)
        get_logger("training").info("Profile: %s\n%s", self.folder / "summary.txt", text)


def summary(averages: Any, reports: list[StepReport], memory: dict[str, int]) -> str:
    """One page: share of each phase, of data loading, the costliest operations by time and by memory."""
    total = sum(report.seconds for report in reports)
    tokens = sum(report.num_tokens for report in reports)
    by_name = {event.key: event for event in averages}
    lines = [
        f"{len(reports)} steps profiled: {total / len(reports):.4f} s a step, {tokens / total:.0f} tokens/s "
        "(the profiler itself slows small steps down).",
        f"Data loading: {100 * sum(report.data_seconds for report in reports) / total:.1f} % of the time.",
        f"Memory: {memory_text(memory)}.",
        "",
        "phase        seconds  share",
    ]
    other = total
    for phase in PHASES:
        event = by_name.get(phase)
        seconds = event.cpu_time_total / 1e6 if event else 0.0
        other -= seconds
        lines.append(f"{phase:10}  {seconds:8.4f}  {100 * seconds / total:4.1f} %")
    lines.append(f"{'other':10}  {other:8.4f}  {100 * other / total:4.1f} %")
    operations = [event for event in averages if event.key not in PHASES]
    operations = [event for event in operations if not event.key.startswith("ProfilerStep")]
    lines += ["", "costliest operations by own time              seconds   calls"]
    for event in sorted(operations, key=lambda e: -e.self_cpu_time_total)[:_TOP_OPERATIONS]:
        lines.append(
            f"{event.key[:44]:44}  {event.self_cpu_time_total / 1e6:8.4f}  {event.count:6}"
        )
    lines += ["", "largest allocations by operation, own          memory   calls"]
    for event in sorted(operations, key=lambda e: -e.self_cpu_memory_usage)[:5]:
        size = format_bytes(max(0, event.self_cpu_memory_usage))
        lines.append(f"{event.key[:44]:44}  {size:>8}  {event.count:6}")
    return "\n".join(lines) + "\n"
