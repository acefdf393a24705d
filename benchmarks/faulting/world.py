"""Bases, data, uninterrupted runs to compare with, and children that are made to fail."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  what every child would import
from tests.run_helpers import run, steps_of, tiny_base, train_command, write_records

import ollatune.training.session  # noqa: F401
from ollatune.base import faults as base_faults
from ollatune.checkpoint.format import Checkpoint, read_checkpoint

METHODS = {
    "lora": [],
    "full": ["--set", "advanced.lora_enabled=false"],
    "packed": ["--set", "model.quantization=as-served"],
    "bf16": ["--set", "model.dtype=bf16"],  # with the compiled kernels, where they can be had
}
LONG = ["--batch-size", "1", "--epochs", "5"]
"""For what needs more steps: LONG_STEPS, under the name `long`."""
SAVE_POINTS = (
    "save.before_best",
    "save.before_checkpoint",
    "save.after_checkpoint",
    "train.boundary",
)
NUM_STEPS = 8
LONG_STEPS = 40
SAVE_EVERY = 2


class World:
    """Bases, data and the uninterrupted runs that everything is compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_records(folder / "data", train=8, validation=2, test=0)
        dense = tiny_base(folder / "dense")
        packed = tiny_base(folder / "packed", tensor_type="Q8_0")
        self.bases = {"long": dense, "lora": dense, "full": dense, "packed": packed, "bf16": dense}
        self.other_base = tiny_base(folder / "other", seed=5)
        self.other_data = write_records(folder / "other-data", train=9, validation=2, test=0)
        self.references: dict[str, Path] = {}
        self.digests: dict[str, dict[str, str]] = {}
        self.seconds = 1.0
        self._count = 0
        for method in METHODS:
            started = time.perf_counter()
            self.add_reference(method)
            self.seconds = time.perf_counter() - started

    def add_reference(self, method: str) -> None:
        """Run `method` uninterrupted, for others to be compared with."""
        output = self.new_output()
        code = wait(start(self.command(method, output)))
        assert code == 0, (output / "log").read_text()
        self.references[method] = output

    def new_output(self) -> Path:
        self._count += 1
        path = self.folder / f"run{self._count}"
        path.mkdir()
        return path

    def move(self, name: str) -> None:
        """From now on outputs go into a folder of this name: a copy of this process goes on with its own."""
        self.folder /= name
        self.folder.mkdir()

    def command(self, method: str, output: Path, *more: str) -> list[str]:
        return train_command(
            self.bases[method], self.data, output, "--gradient-accumulation-steps", "1",
            "--set", f"training.checkpoint_every_steps={SAVE_EVERY}",
            "--set", "validation.samples=0", *(METHODS | {"long": LONG})[method], *more,
        )  # fmt: skip

    def goes_on(self, method: str, output: Path, *more: str) -> str:
        """Resume (or restart, where nothing had been saved) to the end; "" if it ends like the reference."""
        checkpoints = output / "checkpoints"
        has_any = checkpoints.is_dir() and any(checkpoints.glob("*.pt"))
        flags = ["--resume", "auto"] if has_any else []
        if not has_any and (output / "best_model.pt").exists():
            flags = ["--overwrite"]  # a kill between the two: nothing is thrown away unasked
        code = wait(start(self.command(method, output, *more, *flags)))
        if code != 0:
            return f"resume ended with {code}"
        return self.differs(method, output)

    def differs(self, method: str, output: Path) -> str:
        """What of the run's end is not as in the reference: weights, optimiser, generators, counters, losses."""
        reference = self.references[method]
        if steps_of(output) != steps_of(reference):
            return "other losses"
        mine, theirs = (state_of(read_checkpoint(end_of(folder))) for folder in (output, reference))
        return "" if same(mine, theirs) else "another final state"


def end_of(output: Path) -> Path:
    """The checkpoint of the last epoch."""
    return max((output / "checkpoints").glob("epoch_*.pt"))


def state_of(checkpoint: Checkpoint) -> list[Any]:
    return [
        checkpoint.model_state_dict, checkpoint.optimizer_state_dict, checkpoint.resume["state"],
        checkpoint.resume["random"], checkpoint.resume["loss_spikes"], checkpoint.val_loss,
    ]  # fmt: skip


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def start(
    command: list[str], *, faults: str = "", prepare: Callable[[], None] | None = None
) -> int:
    """Fork a child that runs `command`; returns its process id. Its output goes to `log` in the output folder."""
    log = Path(command[command.index("--output") + 1]) / "log"
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return pid
    code = 1
    try:
        for number in signals:  # before the command looks after them itself
            signal.signal(number, lambda number, frame: os._exit(128 + number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        base_faults._FAULTS.update(base_faults._parse(faults))
        if prepare is not None:
            prepare()
        code = run(command)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def after(pid: int, seconds: float, number: int) -> int:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return wait(pid)
