"""What every measured system shares: the frozen batches it reads and the figures it prints. Imports nothing heavy."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
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

    @classmethod
    def from_arguments(cls) -> Job:
        setting, folder, case, warmup, steps = sys.argv[1:6]
        return cls(setting, Path(folder), case, int(warmup), int(steps))

    @property
    def base(self) -> Path:
        """The base model as a Hugging Face folder in fp32."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The adapter everyone starts from, in PEFT's format."""
        return self.folder / "adapter"

    def batches(self) -> list[list[dict[str, Any]]]:
        """warmup + steps batches of {"input_ids": [...], "labels": [...]}; labels are -100 outside targets."""
        found = json.loads((self.folder / f"{self.case}.json").read_text())["batches"]
        count = self.warmup + self.steps
        return [found[index % len(found)] for index in range(count)]


@dataclass
class Clock:
    """Times the steps; `start` before the first one, `lap` after each."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _last: float = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


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


def peak_mb() -> int:
    """The most memory this process has held, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024)
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 1024)


def report(job: Job, clock: Clock, **more: Any) -> None:
    """Print the figures of the measured steps; tokens are those of the examples, padding does not count."""
    batches = job.batches()
    tokens = [sum(len(example["input_ids"]) for example in batch) for batch in batches]
    if len(clock.seconds) != len(batches) or len(clock.losses) != len(batches):
        raise RuntimeError(
            f"{len(batches)} steps were wanted, {len(clock.seconds)} timed, {len(clock.losses)} losses."
        )
    figures = {
        "tokens_per_second": sum(tokens[job.warmup :]) / sum(clock.seconds[job.warmup :]),
        "peak_mb": peak_mb(),
        "loss": clock.losses[-1],
        "losses": clock.losses,
        "seconds": clock.seconds,
    }
    print("\n" + json.dumps(figures | more))
