"""Runs that are killed, stopped, poisoned, starved or raced; each must come back as if nothing had happened."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

from benchmarks.faulting.world import (
    LONG_STEPS,
    METHODS,
    NUM_STEPS,
    SAVE_EVERY,
    SAVE_POINTS,
    World,
    after,
    end_of,
    start,
    wait,
)
from tests.run_helpers import steps_of

from ollatune.checkpoint.format import read_checkpoint
from ollatune.training.spikes import MIN_STEPS


def kill_anywhere(world: World, attempt: int, rng: random.Random) -> str:
    """SIGKILL at a random instant, or at a point inside the save; every second run up to ten times."""
    method = list(METHODS)[attempt // 2 % len(METHODS)]
    output = world.new_output()
    for _ in range(10 if attempt % 2 else 1):
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


def stop_at_every_step(world: World, attempt: int, rng: random.Random) -> str:
    """Stopped after the k-th step and resumed, for every k: as if it had not been."""
    method, number = ("lora", "bf16")[attempt // NUM_STEPS], attempt % NUM_STEPS + 1
    output = world.new_output()
    code = wait(start(world.command(method, output), faults=f"train.step:interrupt@{number}"))
    if code != 130 or f"Stopped after step {number} of" not in (output / "log").read_text():
        return f"step {number}: exit code {code}"
    problem = world.goes_on(method, output)
    return f"step {number}: {problem}" if problem else ""


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


def not_finite(world: World, attempt: int, rng: random.Random) -> str:
    """NaN as loss, infinity as gradient or a loss spike, at a random step, under stop, skip and rollback."""
    action = ("stop", "skip", "rollback")[attempt % 3]
    point = ("train.loss:nan", "train.gradient:nan", "train.loss_spike:spike")[attempt // 3 % 3]
    is_spike = point == "train.loss_spike:spike"
    method, num_steps = ("long", LONG_STEPS) if is_spike else ("lora", NUM_STEPS)
    at = rng.randint(MIN_STEPS + 1 if is_spike else 1, num_steps)
    if method not in world.references:
        world.add_reference(method)
    output = world.new_output()
    setting = ("--set", f"training.{'on_loss_spike' if is_spike else 'on_non_finite'}={action}")
    code = wait(start(world.command(method, output, *setting), faults=f"{point}@{at}"))
    if action == "stop" or (action == "rollback" and at <= SAVE_EVERY):
        return world.goes_on(method, output, *setting) if code == 6 else f"exit code {code}, not 6"
    if code != 0:
        return f"exit code {code}"
    values = json.loads((output / "run.json").read_text())
    if values["steps"] != num_steps or values["skipped_steps"] + values["rollbacks"] != 1:
        return f"{values['steps']} steps, {values['skipped_steps']} skipped"
    if values["loss_spikes"] != is_spike:
        return f"{values['loss_spikes']} loss spikes"
    return "" if read_checkpoint(end_of(output)).is_finite() else "weights are not finite"


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


def _without_locks() -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


def lock_races(world: World, attempt: int, rng: random.Random) -> str:
    """Four runs into one folder at once, some where the file system has no locks: one owner, the others name it."""
    output = world.new_output()
    started = time.perf_counter()
    prepare = _without_locks if attempt % 5 == 4 else None
    pids = [start(world.command("lora", output), prepare=prepare) for _ in range(4)]
    codes = {pid: wait(pid) for pid in pids}
    owners = [pid for pid, code in codes.items() if code == 0]
    if len(owners) != 1 or sorted(codes.values()) != [0, 8, 8, 8]:
        return f"exit codes {sorted(codes.values())} after {time.perf_counter() - started:.1f} s"
    named = (output / "log").read_text().count(f"is in use by process {owners[0]} on ")
    return "" if named == 3 else f"{named} of 3 named the owner"
