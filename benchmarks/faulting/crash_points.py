"""One save, broken at each of its system calls in turn: killed there, or told that the disk is full.

A child that has everything in memory stops itself, strace attaches and injects, the child goes on and saves. Counting
begins with the attachment, so that every call counted is one of the save. Linux, strace and the right to trace needed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ollatune.base.errors import InputError, StorageError
from ollatune.checkpoint.format import Checkpoint, read_checkpoint
from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.training import checkpointing
from ollatune.training.checkpointing import Saver
from ollatune.training.distributed import Processes
from ollatune.training.identity import Identity

WRITING = ("openat", "mkdir", "write", "pwrite64", "ftruncate", "fsync", "rename", "unlink")
_STORAGE, _LEFT = StorageError.exit_code, 0
_ATTACH_SECONDS = 10.0


_RUN = cast(
    Any,
    SimpleNamespace(
        processes=Processes(), sharing=SimpleNamespace(needs_all=False, saves_shards=False)
    ),
)
"""As much of a run in one process as a saver looks at; what it would make a checkpoint of is replaced below."""


@dataclass(frozen=True)
class CrashPoint:
    """The `number`-th call of `call` in the save: killed, or with ENOSPC as its result (from there on if `lasting`)."""

    call: str
    number: int
    action: str = "kill"
    lasting: bool = False

    @property
    def injection(self) -> str:
        what = "signal=KILL" if self.action == "kill" else "error=ENOSPC"
        return f"{self.call}:{what}:when={self.number}{'+' if self.lasting else ''}"


class SaveUnderTrace:
    """A folder with one earlier checkpoint, and a save of the next, better one that can be repeated and broken.

    Args:
        folder: scratch space; earlier, later: whole checkpoints of a run.
    """

    def __init__(self, folder: Path, earlier: Checkpoint, later: Checkpoint) -> None:
        self.folder = folder
        self.earlier, self.later = earlier, later
        later.val_loss = (earlier.val_loss or 1.0) / 2  # so that the earlier one is rotated away
        self.template = folder / "template"
        self._saver(self.template, 0).save(_RUN, "epoch_1.pt", is_best=True)
        shutil.copytree(self.template, folder / "warm")
        self._saver(folder / "warm", 1).save(_RUN, "epoch_2.pt", is_best=True)
        self._count = 0

    def _saver(self, folder: Path, which: int) -> Saver:
        """The run's own saver, with the checkpoint it would make of the run put in its place."""
        checkpoint = (self.earlier, self.later)[which]
        checkpointing.make_checkpoint = lambda *_, **__: checkpoint
        store = CheckpointStore(folder / "checkpoints", keep_best=1, run_id=checkpoint.run_id)
        identity = Identity(checkpoint.run_id, {}, {}, "", {})
        return Saver(store, folder / "best_model.pt", identity)

    def calls(self) -> list[str]:
        """Names of all system calls of one whole save, in order."""
        log = self.folder / "calls"
        code, _ = self._traced(["-o", str(log)])
        assert code == 0, f"the save ended with {code}"
        return re.findall(r"^\d+\s+(\w+)\(", log.read_text(), re.MULTILINE)

    def log(self) -> str:
        """strace's log of one whole save, with the paths of descriptors."""
        path = self.folder / "log"
        self._traced(["-y", "-o", str(path)])
        return path.read_text()

    def crash_points(self) -> list[CrashPoint]:
        """Every call of the save, to be killed at."""
        seen: Counter[str] = Counter()
        points = []
        for call in self.calls():
            seen[call] += 1
            points.append(CrashPoint(call, seen[call]))
        return [p for p in points if p.call != "exit_group"]

    def full_disks(self) -> list[CrashPoint]:
        """Every call of the save that can find the disk full, for once and from there on."""
        points = [p for p in self.crash_points() if p.call in WRITING]
        return [
            CrashPoint(p.call, p.number, "full", lasting)
            for p in points
            for lasting in (False, True)
        ]

    def attempt(self, point: CrashPoint) -> str:
        """Break the save at `point`; "" if a whole checkpoint, the earlier or the later, is found after it."""
        code, folder = self._traced(["-o", "/dev/null", "-e", f"inject={point.injection}"])
        expected = (-signal.SIGKILL, _LEFT) if point.action == "kill" else (_STORAGE, _LEFT)
        if code not in expected:
            return f"{point.injection}: ended with {code}"
        return self.problem(folder, point)

    def problem(self, folder: Path, point: CrashPoint) -> str:
        """What is wrong in `folder` after the break, and after saving once more."""
        try:
            _, found = newest_checkpoint(folder / "checkpoints", report=lambda text: None)
            best = read_checkpoint(folder / "best_model.pt")
        except InputError as error:
            return f"{point.injection}: {error}"
        for name, checkpoint in (("newest", found), ("best", best)):
            wanted = self.later if checkpoint.step == self.later.step else self.earlier
            if not _same_weights(checkpoint, wanted):
                return f"{point.injection}: the {name} checkpoint is neither the earlier nor the later one"
        if list((folder / "checkpoints").glob("corrupt-*")):
            return f"{point.injection}: a checkpoint was found damaged"
        self._saver(folder, 1).save(_RUN, "epoch_2.pt", is_best=True)
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        if newest_checkpoint(folder / "checkpoints")[1].step != self.later.step:
            return f"{point.injection}: saving again did not help"
        shutil.rmtree(folder)
        return "" if "epoch_2.pt" in names else f"{point.injection}: {sorted(names)}"

    def _traced(self, options: list[str]) -> tuple[int, Path]:
        """One save in a fresh folder under strace; its exit code (minus a signal) and the folder."""
        self._count += 1
        folder = self.folder / f"save{self._count}"
        shutil.copytree(self.template, folder)
        saver = self._saver(folder, 1)
        pid = os.fork()
        if pid == 0:
            _save_when_told(saver)
        os.waitpid(pid, os.WUNTRACED)
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", str(pid), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for_tracer(pid, tracer)
        os.kill(pid, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tracer.wait()
        return code, folder


def _save_when_told(saver: Saver) -> None:
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        saver.save(_RUN, "epoch_2.pt", is_best=True)
        code = 0
    except StorageError:
        code = _STORAGE
    finally:
        os._exit(code)


def _wait_for_tracer(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _ATTACH_SECONDS
    status = Path(f"/proc/{pid}/status")
    while "TracerPid:\t0\n" in status.read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise OSError("strace could not attach")
        time.sleep(0.002)


def _same_weights(left: Checkpoint, right: Checkpoint) -> bool:
    mine, theirs = left.model_state_dict, right.model_state_dict
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def can_trace() -> bool:
    """Whether this machine lets us trace a child with strace."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return False
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    tracer = subprocess.Popen(
        ["strace", "-p", str(pid), "-o", "/dev/null", "-e", "inject=close:error=EBADF:when=999"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_for_tracer(pid, tracer)
    except OSError:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    tracer.wait()
    return True
