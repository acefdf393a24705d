"""What every measured system shares: the frozen batches it reads and the figures it prints. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, THREADS = 8, 16, 1e-4, 2
MAX_GRAD_NORM = 1.0
IGNORED = -100


@dataclass(frozen=True)
class Job:
    """One measurement: SETTING FOLDER CASE WARMUP STEPS on the command line. FOLDER is made by `speed_data.freeze`."""

    setting: str
    folder: Path
    case: str
    warmup: int
    steps: int

    imports_mb: int = 0

    @classmethod
    def from_arguments(cls) -> Job:
        """To be called first of all: what is resident now is what the imports take."""
        setting, folder, case, warmup, steps = sys.argv[1:6]
        return cls(setting, Path(folder), case, int(warmup), int(steps), memory_mb("VmRSS"))

    @property
    def base(self) -> Path:
        """The base model as a Hugging Face folder in fp32."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The adapter everyone starts from, in PEFT's format."""
        return self.folder / "adapter"

    def batches(self) -> list[list[dict[str, Any]]]:
        """warmup + steps batches of {"input_ids": [...], "labels": [...]}; labels are -100 outside targets.

        With the word `grouped` in the setting, those of each few batches are dealt out again by length, as
        `group_by_length` does: the same examples, next to no padding.
        """
        found = json.loads((self.folder / f"{self.case}.json").read_text())["batches"]
        count = self.warmup + self.steps
        batches = [found[index % len(found)] for index in range(count)]
        return grouped(batches) if "grouped" in self.setting.split("-") else batches


def grouped(batches: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Each run of as many batches as a batch has examples, sorted by length and cut again."""
    size = len(batches[0])
    found = []
    for start in range(0, len(batches), size):
        run = batches[start : start + size]
        examples = sorted(chain.from_iterable(run), key=lambda e: len(e["input_ids"]))
        found += [examples[i : i + size] for i in range(0, len(examples), size)]
    return found


@dataclass
class Clock:
    """Times the steps; `start` before the first one, `lap` after each. Notes the memory of loading and of stepping."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    loading_mb: int = 0
    _last: float = 0.0

    def start(self) -> None:
        self.loading_mb = memory_mb("VmHWM")
        forget_peak()
        self._last = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.graphs.append(compiled_graphs())
        self._last = time.perf_counter()


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def padded(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch padded on the right to its longest example."""
    import torch

    width = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, value: int) -> Any:
        return torch.tensor([e[name] + [value] * (width - len(e[name])) for e in examples])

    mask = torch.tensor(
        [[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]
    )
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", IGNORED),
        "attention_mask": mask,
    }


def memory_mb(key: str) -> int:
    """MiB of this process: resident now (VmRSS) or at most so far (VmHWM, also where the system tells nothing else)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return round(int(line.split()[1]) / 1024)
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 1024)


def forget_peak() -> None:
    """Start VmHWM again from what is resident; without effect where the system has no such thing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def report(job: Job, clock: Clock, **more: Any) -> None:
    """Print the figures of the measured steps; tokens are those of the examples, padding does not count.

    `loss` is the mean over all steps, warm-up included: after the same number of steps it compares systems.
    """
    batches = job.batches()
    tokens = [sum(len(example["input_ids"]) for example in batch) for batch in batches]
    if len(clock.seconds) != len(batches) or len(clock.losses) != len(batches):
        raise RuntimeError(
            f"{len(batches)} steps were wanted, {len(clock.seconds)} timed, {len(clock.losses)} losses."
        )
    steps_mb = memory_mb("VmHWM")
    compiled = clock.graphs[-1] - (clock.graphs[job.warmup - 1] if job.warmup else 0)
    figures = {
        "tokens_per_second": sum(tokens[job.warmup :]) / sum(clock.seconds[job.warmup :]),
        "peak_mb": max(clock.loading_mb, steps_mb),
        "loading_mb": clock.loading_mb,
        "steps_mb": steps_mb,
        "imports_mb": job.imports_mb,
        "loss": sum(clock.losses) / len(clock.losses),
        "losses": clock.losses,
        "seconds": clock.seconds,
        "compiled_while_measured": compiled,
    }
    print("\n" + json.dumps(figures | more))
