"""Break runs in every way we know and count what does not come back. `make faults`; FAULTS=quick does a tenth.

Every run is a child forked from this process, which has the imports behind it and computes nothing before. The last
line printed is one JSON object: {goal: {"tried": n, "failed": m}}; the exit code is 1 if anything failed.
"""

# ruff: noqa: E402  the environment and the path come before the imports they are for

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child cannot use its parent's threads

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # not this folder: gguf.py in it would hide a package

from benchmarks.faulting import (
    clock,
    interrupting,
    places,
    processes,
    repeating,
    running,
    storage,
)
from benchmarks.faulting.crash_points import CrashPoint, SaveUnderTrace, can_trace
from benchmarks.faulting.world import NUM_STEPS, World

from ollatune.checkpoint.format import read_checkpoint

GOALS: dict[str, tuple[Callable[[World, int, random.Random], str], int]] = {
    "kill -9": (running.kill_anywhere, 40),
    "kill between file operations": (running.kill_between_operations, 60),
    "stop at every step": (running.stop_at_every_step, 2 * NUM_STEPS),
    "disk full": (storage.disk_full, 20),
    "signals": (interrupting.signals, 50),
    "not finite and loss spikes": (running.not_finite, 30),
    "out of memory": (running.out_of_memory, 20),
    "lock races": (running.lock_races, 50),
    "places that cannot be written": (places.denied, len(places.DENIED)),
    "paths": (places.paths, 40),
    "clocks": (clock.clocks, len(clock.CLOCKS)),
    "bit flips": (storage.bit_flips, 200),
    "same run twice": (repeating.same_twice, 5 * len(repeating.KINDS)),
    "same run in other processes": (processes.same_elsewhere, 6),
    "settings changed on resume": (repeating.config_drift, len(repeating.DRIFT)),
    "100 saves and loads": (repeating.save_and_load, 1),
    "2000 steps": (repeating.long_run, 1),
}
CRASHES = ("kill at each system call of a save", "disk full at each system call of a save")
LONGEST_FIRST = (
    "disk full at each system call of a save", "kill at each system call of a save", "2000 steps",
    "kill between file operations", "same run in other processes", "signals", "same run twice",
)  # fmt: skip
"""What takes longest is begun first, so that no lane is left with it at the end."""


def attempts(count: int, share: float) -> Sequence[int]:
    """Which of `count` attempts are made: all, or a share of them spread over all."""
    tried = max(1, round(count * share))
    return [number * count // tried for number in range(tried)]


def try_goal(world: World, goal: str, share: float, seed: int) -> dict[str, int]:
    """Make the attempts of one goal; every problem is printed."""
    attempt_one, count = GOALS[goal]
    chosen = attempts(count, share)
    problems = []
    for number in chosen:
        rng = random.Random(f"{seed}:{goal}:{number}")
        if goal == "2000 steps":
            problem = repeating.long_run(world, number, rng, max(200, round(2000 * share)))
        elif goal == "100 saves and loads":
            problem = repeating.save_and_load(world, number, rng, max(20, round(100 * share)))
        else:
            problem = attempt_one(world, number, rng)
        if problem:
            problems.append(problem)
            print(f"{goal}, attempt {number}: {problem}", flush=True)
    return {"tried": len(chosen), "failed": len(problems)}


def try_crashes(world: World, goal: str, share: float) -> dict[str, int]:
    """Crash points of one save: killed at each system call, or told by it that the disk is full."""
    checkpoints = world.references["lora"] / "checkpoints"
    save = SaveUnderTrace(
        world.new_output(), *(read_checkpoint(checkpoints / f"epoch_{n}.pt") for n in (1, 2))
    )
    points: list[CrashPoint] = save.crash_points() if goal == CRASHES[0] else save.full_disks()
    chosen = [points[i] for i in attempts(len(points), share)]
    problems = [problem for point in chosen if (problem := save.attempt(point))]
    for problem in problems:
        print(f"{goal}: {problem}", flush=True)
    return {"tried": len(chosen), "failed": len(problems)}


def in_lanes(
    goals: Sequence[str], num_lanes: int, attempt: Callable[[str], dict[str, int]], folder: Path
) -> dict[str, dict[str, int]]:
    """The results of `attempt` for each goal, several at a time, each in a process of its own."""
    waiting = sorted(goals, key=lambda g: LONGEST_FIRST.index(g) if g in LONGEST_FIRST else 99)
    running_now: dict[int, tuple[str, float]] = {}
    results: dict[str, dict[str, int]] = {}
    while waiting or running_now:
        while waiting and len(running_now) < num_lanes:
            goal = waiting.pop(0)
            running_now[_fork(goal, attempt, folder)] = goal, time.perf_counter()
        pid, status = os.wait()
        goal, started = running_now.pop(pid)
        file = folder / f"{goal}.json"
        results[goal] = {"tried": 0, "failed": 1}
        if status == 0 and file.exists():
            results[goal] = json.loads(file.read_text())
        counts, seconds = results[goal], time.perf_counter() - started
        print(
            f"{goal}: {counts['tried']} tried, {counts['failed']} failed, {seconds:.0f} s",
            flush=True,
        )
    return {goal: results[goal] for goal in goals}


def _fork(goal: str, attempt: Callable[[str], dict[str, int]], folder: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        (folder / f"{goal}.json").write_text(json.dumps(attempt(goal)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*GOALS, *CRASHES]
    parser.add_argument("--only", action="append", choices=names, help="Only this goal.")
    parser.add_argument(
        "--share", type=float, default=0.1 if os.environ.get("FAULTS") == "quick" else 1.0
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    goals = [name for name in names if name in (arguments.only or names)]
    if not can_trace():
        print("No strace here, or no right to use it: system calls are not broken one by one.")
        goals = [goal for goal in goals if goal not in CRASHES]
    with tempfile.TemporaryDirectory(prefix="ollatune-faults-") as folder:
        world = World(Path(folder))

        def attempt(goal: str) -> dict[str, int]:
            world.move(goal.replace(" ", "-"))
            if goal in CRASHES:
                return try_crashes(world, goal, arguments.share)
            return try_goal(world, goal, arguments.share, arguments.seed)

        results = in_lanes(goals, arguments.lanes, attempt, Path(folder))
    print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
