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
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # not this folder: gguf.py in it would hide a package

from benchmarks.faulting import interrupting, repeating, running, storage
from benchmarks.faulting.crash_points import CrashPoint, SaveUnderTrace, can_trace
from benchmarks.faulting.world import World

from ollatune.checkpoint.format import read_checkpoint

GOALS: dict[str, tuple[Callable[[World, int, random.Random], str], int]] = {
    "kill -9": (running.kill_anywhere, 40),
    "kill between file operations": (running.kill_between_operations, 60),
    "disk full": (storage.disk_full, 20),
    "not finite": (running.not_finite, 30),
    "out of memory": (running.out_of_memory, 20),
    "signals": (interrupting.signals, 50),
    "lock races": (running.lock_races, 50),
    "bit flips": (storage.bit_flips, 200),
    "same run twice": (repeating.same_twice, 25),
    "settings changed on resume": (repeating.config_drift, len(repeating.DRIFT)),
    "100 saves and loads": (repeating.save_and_load, 1),
    "2000 steps": (repeating.long_run, 1),
}
CRASHES = ("kill at each system call of a save", "disk full at each system call of a save")


def attempts(count: int, share: float) -> Sequence[int]:
    """Which of `count` attempts are made: all, or a share of them spread over all."""
    tried = max(1, round(count * share))
    return [number * count // tried for number in range(tried)]


def try_goal(world: World, goal: str, share: float, seed: int) -> dict[str, int]:
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


def try_crashes(world: World, share: float) -> dict[str, dict[str, int]]:
    """Every crash point of one save; nothing where strace cannot be used (the file operations are still killed)."""
    if not can_trace():
        print("No strace here, or no right to use it: system calls are not broken one by one.")
        return {}
    checkpoints = world.references["lora"] / "checkpoints"
    save = SaveUnderTrace(
        world.new_output(), *(read_checkpoint(checkpoints / f"epoch_{n}.pt") for n in (1, 2))
    )
    kinds: tuple[list[CrashPoint], ...] = (save.crash_points(), save.full_disks())
    results = {}
    for goal, points in zip(CRASHES, kinds, strict=True):
        chosen = [points[i] for i in attempts(len(points), share)]
        problems = [problem for point in chosen if (problem := save.attempt(point))]
        for problem in problems:
            print(f"{goal}: {problem}", flush=True)
        results[goal] = {"tried": len(chosen), "failed": len(problems)}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*GOALS, "crashes"]
    parser.add_argument("--only", action="append", choices=names, help="Only this goal.")
    parser.add_argument(
        "--share", type=float, default=0.1 if os.environ.get("FAULTS") == "quick" else 1.0
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="ollatune-faults-") as folder:
        world = World(Path(folder))
        for goal in arguments.only or names:
            started = time.perf_counter()
            if goal == "crashes":
                found = try_crashes(world, arguments.share)
            else:
                found = {goal: try_goal(world, goal, arguments.share, arguments.seed)}
            results |= found
            seconds = time.perf_counter() - started
            for name, counts in found.items():
                print(
                    f"{name}: {counts['tried']} tried, {counts['failed']} failed, {seconds:.0f} s",
                    flush=True,
                )
    print(json.dumps(results))
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
