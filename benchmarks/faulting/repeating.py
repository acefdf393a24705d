"""Runs that are repeated, resumed with other settings, or go on for long: same bytes, a clear word, no growth."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks.faulting.world import World, start, wait
from tests.run_helpers import steps_of, write_records

from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.training.recorder import Recorder

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("full", ()),
    "lora": ("lora", ("--set", "advanced.lora_dropout=0")),
    "packed": ("packed", ()),
    "recomputed": ("lora", ("--set", "training.activation_checkpointing=true")),
    "dropout": ("lora", ("--set", "advanced.lora_dropout=0.3")),
    "bf16": ("bf16", ("--set", "advanced.lora_dropout=0.3")),
    "packed bf16": ("packed", ("--set", "model.dtype=bf16", "--set", "advanced.lora_dropout=0.3")),
}
DRIFT: tuple[tuple[str, str], ...] = (
    ("free", "training.keep_checkpoints=5"),
    ("free", "training.on_non_finite=skip"),
    ("free", "training.on_loss_spike=skip"),
    ("free", "validation.batch_size=1"),
    ("free", "training.evaluate_every_steps=3"),
    ("free", "training.activation_checkpointing=true"),
    ("warn", "training.learning_rate=0.002"),
    ("warn", "training.epochs=3"),
    ("warn", "training.scheduler=linear"),
    ("warn", "training.label_smoothing=0.1"),
    ("warn", "advanced.lora_dropout=0.2"),
    ("refuse", "training.seed=7"),
    ("refuse", "advanced.lora_rank=4"),
    ("refuse", "training.optimizer=sgd"),
    ("refuse", "model.base_model={other}"),
    ("refuse", "data.sources=[{{path: {other_data}}}]"),
)
"""What is changed before a resume, and what must come of it."""
FLAGS = {
    "model.base_model": "--model",
    "data.sources": "--data",
    "training.epochs": "--epochs",
    "training.learning_rate": "--learning-rate",
}
LONG_STEPS = 2000
_MAX_SLOPE = 1024.0


def same_twice(world: World, attempt: int, rng: random.Random) -> str:
    """A run repeated elsewhere, in another time zone, with another priority: the same bytes, and the same export."""
    kind = list(KINDS)[attempt % len(KINDS)]
    digests = []
    for repetition in range(2):
        if repetition == 0 and kind in world.digests:
            digests.append(world.digests[kind])
            continue

        def elsewhere(repetition: int = repetition) -> None:
            os.environ["TZ"] = ("UTC", "Asia/Kathmandu")[repetition]
            time.tzset()
            os.nice(3 * repetition)
            if repetition:
                os.chdir("/")

        method, more = KINDS[kind]
        output = world.new_output()
        if code := wait(start(world.command(method, output, *more), prepare=elsewhere)):
            return f"{kind}: exit code {code}"
        (output / "export").mkdir()
        export = [
            "create-modelfile",
            "--checkpoint",
            output / "best_model.pt",
            "--output",
            output / "export",
        ]
        if code := wait(start([str(part) for part in export])):
            return f"{kind}: export ended with {code}"
        digests.append(digests_of(output))
        world.digests.setdefault(kind, digests[0])
    different = [name for name in digests[0] if digests[0][name] != digests[1].get(name)]
    return f"{kind}: {', '.join(different)} differ" if different else ""


def digests_of(output: Path) -> dict[str, str]:
    """sha256 of the adapter, the exported GGUF and the loss log (without what depends on the clock)."""
    files = [output / "export" / "model.gguf", output / "adapter_model.safetensors"]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}
    return digests | {"losses": hashlib.sha256(json.dumps(steps_of(output)).encode()).hexdigest()}


def config_drift(world: World, attempt: int, rng: random.Random) -> str:
    """A run is stopped and resumed with one setting changed: goes on silently, says so, or refuses."""
    kind, setting = DRIFT[attempt]
    setting = setting.format(other=world.other_base, other_data=world.other_data)
    output = world.new_output()
    if wait(start(world.command("lora", output), faults="train.step:kill@6")) != -9:
        return "was not killed"
    log = output / "log"
    before = log.stat().st_size
    command = world.command("lora", output, "--resume", "auto", "--set", setting)
    key = setting.partition("=")[0]
    if (flag := FLAGS.get(key)) is not None:  # a flag beside it would win over --set
        at = command.index(flag)
        del command[at : at + 2]
    code = wait(start(command))
    said = log.read_bytes()[before:].decode()
    found = {
        "free": code == 0 and "Changed since the checkpoint" not in said,
        "warn": code == 0 and f"Changed since the checkpoint: {key}" in said,
        "refuse": code == 2
        and ("cannot change in the middle" in said or "not the run that" in said),
    }[kind]
    if not found:
        return f"{kind} {setting}: exit code {code}"
    return "" if kind != "refuse" else world.goes_on("lora", output)


def long_run(world: World, attempt: int, rng: random.Random, steps: int = LONG_STEPS) -> str:
    """Many steps with a save at every hundredth: memory grows by less than 1 KiB a step, files and threads do not."""
    output = world.new_output()
    data = write_records(output / "data", train=steps // 2, validation=4, test=0)  # four epochs
    command = world.command(
        "lora", output, "--data", str(data), "--epochs", "8", "--max-steps", str(steps),
        "--set", "training.checkpoint_every_steps=100",
    )  # fmt: skip
    path = output / "growth.npy"
    if code := wait(start(command, prepare=lambda: record_growth(path, steps))):
        return f"exit code {code}"
    return growth_problem(np.load(path))


def record_growth(path: Path, steps: int) -> None:
    """Note resident memory, open files and threads after every step of this process's run."""
    process, seen = psutil.Process(), np.zeros((steps, 3), np.int64)
    original: Callable[..., None] = Recorder.step

    def step(self: Recorder, *arguments: Any) -> None:
        original(self, *arguments)
        number = arguments[0].step
        if number % 10 == 0:
            gc.collect()
        seen[number - 1] = process.memory_info().rss, process.num_fds(), process.num_threads()
        if number == steps:
            np.save(path, seen)

    Recorder.step = step  # type: ignore[method-assign]


def growth_problem(seen: np.ndarray) -> str:
    """What grew, over the last three quarters of the steps."""
    settled = seen[len(seen) // 4 :]
    slope = float(np.polyfit(np.arange(len(settled)), settled[:, 0], 1)[0])
    if slope > _MAX_SLOPE and slope * len(settled) > 1 << 20:  # a short run may still be warming up
        return f"memory grows by {slope:.0f} bytes a step"
    first, last = settled[0, 1:].tolist(), settled[-1, 1:].tolist()
    return "" if first == last else f"open files and threads went from {first} to {last}"


def save_and_load(world: World, attempt: int, rng: random.Random, cycles: int = 100) -> str:
    """A checkpoint saved and loaded over and over: memory and open files do not grow."""
    folder = world.new_output() / "checkpoints"
    _, checkpoint = newest_checkpoint(world.references["lora"] / "checkpoints")
    store = CheckpointStore(folder, keep_best=2, run_id=checkpoint.run_id)
    process, seen = psutil.Process(), []
    for cycle in range(cycles):
        checkpoint.step = cycle + 1
        store.save(checkpoint, f"step_{cycle + 1}.pt")
        if newest_checkpoint(folder)[1].step != cycle + 1:
            return f"cycle {cycle} loaded another checkpoint"
        gc.collect()
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    settled = seen[len(seen) // 4 :]
    grown = settled[-1][0] - settled[0][0]
    if grown > 4 << 20:
        return f"memory grew by {grown} bytes"
    return "" if settled[0][1:] == settled[-1][1:] else "open files or threads grew"
