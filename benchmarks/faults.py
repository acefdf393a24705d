"""Break runs in every way we know and count what does not come back. `make faults`; FAULTS=quick does a tenth.

Every run is a child forked from this process, which has the imports behind it and computes nothing before. The last
line printed is one JSON object: {goal: {"tried": n, "failed": m}}; the exit code is 1 if anything failed.
"""

# ruff: noqa: E402  the environment and the path come before the imports they are for

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use its parent's threads

import argparse
import contextlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # not this folder: gguf.py in it would hide a package

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  what every child would import
from tests.run_helpers import run, steps_of, tiny_base, train_command, write_records

import ollatune.training.session  # noqa: F401
from ollatune.base import faults as base_faults
from ollatune.base.errors import InputError
from ollatune.checkpoint.format import Checkpoint, read_checkpoint
from ollatune.checkpoint.store import newest_checkpoint

METHODS = {
    "lora": [],
    "full": ["--set", "advanced.lora_enabled=false"],
    "packed": ["--set", "model.quantization=as-served"],
}
SAVE_POINTS = (
    "save.before_best",
    "save.before_checkpoint",
    "save.after_checkpoint",
    "train.boundary",
)
NUM_STEPS = 8
SAVE_EVERY = 2


class World:
    """Bases, data and the uninterrupted runs that everything is compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_records(folder / "data", train=8, validation=2, test=0)
        dense = tiny_base(folder / "dense")
        packed = tiny_base(folder / "packed", tensor_type="Q8_0")
        self.bases = {"lora": dense, "full": dense, "packed": packed}
        self.references: dict[str, Path] = {}
        self.seconds = 1.0
        self._count = 0
        for method in METHODS:
            output = self.new_output()
            started = time.perf_counter()
            code = wait(start(self.command(method, output)))
            assert code == 0, (output / "log").read_text()
            self.seconds = time.perf_counter() - started
            self.references[method] = output

    def new_output(self) -> Path:
        self._count += 1
        path = self.folder / f"run{self._count}"
        path.mkdir()
        return path

    def command(self, method: str, output: Path, *more: str) -> list[str]:
        return train_command(
            self.bases[method], self.data, output, "--gradient-accumulation-steps", "1",
            "--set", f"training.checkpoint_every_steps={SAVE_EVERY}",
            "--set", "validation.samples=0", *METHODS[method], *more,
        )  # fmt: skip

    def goes_on(self, method: str, output: Path, *more: str) -> str:
        """Resume (or restart, where nothing had been saved) to the end; "" if it ends like the reference."""
        checkpoints = output / "checkpoints"
        has_any = checkpoints.is_dir() and any(checkpoints.glob("*.pt"))
        flags = ["--resume", "auto"] if has_any else ["--overwrite"]
        code = wait(start(self.command(method, output, *more, *flags)))
        if code != 0:
            return f"resume ended with {code}"
        return self.differs(method, output)

    def differs(self, method: str, output: Path) -> str:
        """What of the run's end is not as in the reference: weights, optimiser, generators, counters, losses."""
        reference = self.references[method]
        if steps_of(output) != steps_of(reference):
            return "other losses"
        mine, theirs = (
            state_of(read_checkpoint(folder / "checkpoints" / "epoch_2.pt"))
            for folder in (output, reference)
        )
        return "" if same(mine, theirs) else "another final state"


def state_of(checkpoint: Checkpoint) -> list[Any]:
    return [
        checkpoint.model_state_dict, checkpoint.optimizer_state_dict, checkpoint.resume["state"],
        checkpoint.resume["random"], checkpoint.val_loss,
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
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
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


# ----- one function a goal: attempt number → "" or what went wrong ---------------------------------------------------


def kill_anywhere(world: World, attempt: int, rng: random.Random) -> str:
    """SIGKILL at a random instant, or at a point inside the save; some runs are killed several times."""
    method = list(METHODS)[attempt % 3]
    output = world.new_output()
    for _ in range(1 + attempt % 2):
        checkpoints = list((output / "checkpoints").glob("*.pt"))
        flags = ["--resume", "auto"] if checkpoints else ["--overwrite"]
        command = world.command(method, output, *flags)
        if attempt % 4 < 2:
            point = f"{rng.choice(SAVE_POINTS)}:kill@{rng.randint(1, 2)}"
            code = wait(start(command, faults=point))
        else:
            code = after(start(command), rng.uniform(0, world.seconds), signal.SIGKILL)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            return f"ended with {code} instead of dying"
    else:
        return world.goes_on(method, output)
    return world.differs(method, output)


def kill_between_operations(world: World, attempt: int, rng: random.Random) -> str:
    """SIGKILL just before or after the k-th fsync, rename or unlink of a run."""

    def prepare() -> None:
        left = [1 + attempt]

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments, **named)
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        os.fsync, os.replace, os.unlink = dying(os.fsync), dying(os.replace), dying(os.unlink)

    output = world.new_output()
    code = wait(start(world.command("lora", output), prepare=prepare))
    if code == 0:
        return world.differs("lora", output)
    return world.goes_on("lora", output) if code == -signal.SIGKILL else f"ended with {code}"


def disk_full(world: World, attempt: int, rng: random.Random) -> str:
    """A limit on file sizes, or ENOSPC, in the middle of a run: exit 5, nothing lost, and it goes on."""
    output = world.new_output()
    wait(start(world.command("lora", output), faults="train.step:kill@4"))
    before = {p.name: p.read_bytes() for p in (output / "checkpoints").glob("*.pt")}
    size = len(next(iter(before.values())))
    command = world.command("lora", output, "--resume", "auto")
    if attempt % 4 == 0:
        code = wait(start(command, faults=f"{rng.choice(SAVE_POINTS[:2])}:enospc@1"))
    else:
        limit = rng.randint(4096, size - 1)

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        code = wait(start(command, prepare=prepare))
    if code != 5:
        return f"exit code {code}, not 5"
    if any((output / "checkpoints" / n).read_bytes() != content for n, content in before.items()):
        return "an earlier checkpoint changed"
    if list((output / "checkpoints").glob(".staging-*")):
        return "a half-written file was left"
    return world.goes_on("lora", output)


def not_finite(world: World, attempt: int, rng: random.Random) -> str:
    """NaN at a random step under stop, skip and rollback."""
    action = ("stop", "skip", "rollback")[attempt % 3]
    at = rng.randint(1, NUM_STEPS)
    output = world.new_output()
    setting = ("--set", f"training.on_non_finite={action}")
    code = wait(start(world.command("lora", output, *setting), faults=f"train.loss:nan@{at}"))
    if action == "stop" or (action == "rollback" and at <= SAVE_EVERY):
        return world.goes_on("lora", output, *setting) if code == 6 else f"exit code {code}, not 6"
    if code != 0:
        return f"exit code {code}"
    values = json.loads((output / "run.json").read_text())
    if values["steps"] != NUM_STEPS or values["skipped_steps"] + values["rollbacks"] != 1:
        return f"{values['steps']} steps, {values['skipped_steps']} skipped"
    finite = read_checkpoint(output / "checkpoints" / "epoch_2.pt").is_finite()
    return "" if finite else "weights are not finite"


def out_of_memory(world: World, attempt: int, rng: random.Random) -> str:
    """Memory runs out at some micro-batch: the same as a run that began with half the size."""
    at = attempt % (NUM_STEPS // 2) + 1
    sizes = {
        "half": ("--batch-size", "2", "--gradient-accumulation-steps", "2"),
        "whole": ("--batch-size", "4", "--gradient-accumulation-steps", "1"),
    }
    outputs = {}
    for name, size in sizes.items():
        outputs[name] = world.new_output()
        plain = () if at == 1 else ("--set", "advanced.lora_dropout=0")
        command = world.command("lora", outputs[name], *size, *plain)
        fault = f"train.micro_batch:oom@{at}" if name == "whole" else ""
        if (code := wait(start(command, faults=fault))) != 0:
            return f"exit code {code}"
    half, whole = steps_of(outputs["half"]), steps_of(outputs["whole"])
    if at == 1:
        return "" if half == whole else "not bit-identical"
    far = [1 for a, b in zip(half, whole, strict=True) if abs(a["loss"] / b["loss"] - 1) > 1e-5]
    return "other losses" if far else ""


def signals(world: World, attempt: int, rng: random.Random) -> str:
    """SIGTERM or Ctrl-C at a random instant: saved and 143/130, or nothing had begun."""
    number = (signal.SIGTERM, signal.SIGINT)[attempt % 2]
    output = world.new_output()
    pid = start(world.command("lora", output))
    code = after(pid, rng.uniform(0, world.seconds), number)
    if code not in (0, 128 + number, -number):
        return f"exit code {code}"
    return world.goes_on("lora", output) if code else world.differs("lora", output)


def lock_races(world: World, attempt: int, rng: random.Random) -> str:
    """Four runs into one folder at once: one owner, the others say who it is."""
    output = world.new_output()
    started = time.perf_counter()
    pids = [start(world.command("lora", output)) for _ in range(4)]
    codes = {pid: wait(pid) for pid in pids}
    owners = [pid for pid, code in codes.items() if code == 0]
    if len(owners) != 1 or sorted(codes.values()) != [0, 8, 8, 8]:
        return f"exit codes {sorted(codes.values())} after {time.perf_counter() - started:.1f} s"
    named = (output / "log").read_text().count(f"is in use by process {owners[0]} on ")
    return "" if named == 3 else f"{named} of 3 named the owner"


def bit_flips(world: World, attempt: int, rng: random.Random) -> str:
    """One bit of the newest checkpoint is wrong: set aside, and the one before is taken."""
    folder = world.new_output() / "checkpoints"
    shutil.copytree(world.references["lora"] / "checkpoints", folder)
    said: list[str] = []
    newest, _ = newest_checkpoint(folder, report=said.append)
    content = bytearray(newest.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    newest.write_bytes(content)
    try:
        taken, _ = newest_checkpoint(folder, report=said.append)
    except InputError as error:
        return str(error)
    if taken.name == newest.name or not said:
        return f"bit {bit} was not noticed"
    return "" if (folder / f"corrupt-{newest.name}").is_file() else "not set aside"


GOALS: dict[str, tuple[Callable[[World, int, random.Random], str], int]] = {
    "kill -9": (kill_anywhere, 40),
    "kill between file operations": (kill_between_operations, 60),
    "disk full": (disk_full, 20),
    "not finite": (not_finite, 30),
    "out of memory": (out_of_memory, 20),
    "signals": (signals, 50),
    "lock races": (lock_races, 50),
    "bit flips": (bit_flips, 200),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(GOALS), help="Only this goal.")
    parser.add_argument(
        "--share", type=float, default=0.1 if os.environ.get("FAULTS") == "quick" else 1.0
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="ollatune-faults-") as folder:
        world = World(Path(folder))
        for goal, (attempt_one, count) in GOALS.items():
            if arguments.only and goal not in arguments.only:
                continue
            tried = max(1, round(count * arguments.share))
            started, failed = time.perf_counter(), 0
            stride = count // tried
            for number in range(tried):
                rng = random.Random(f"{arguments.seed}:{goal}:{number}")
                attempt = number if goal != "kill between file operations" else number * stride
                problem = attempt_one(world, attempt, rng)
                if problem:
                    failed += 1
                    print(f"{goal}, attempt {number}: {problem}", flush=True)
            results[goal] = {"tried": tried, "failed": failed}
            seconds = time.perf_counter() - started
            print(f"{goal}: {tried} tried, {failed} failed, {seconds:.0f} s", flush=True)
    print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
