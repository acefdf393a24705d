"""SIGTERM and Ctrl-C, whatever a command is doing: exit code, a word, nothing half-written, and it goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from pathlib import Path

from benchmarks.faulting.world import SAVE_POINTS, World, start, wait

PLACES = (
    "anywhere", "data", "save", "validation", "export",
    "twice", "build", "save", "answers", "preprocess",
)  # fmt: skip
"""Where the signal comes, attempt after attempt; with 50 attempts each of them five times, and the save ten times."""
NUM_DATA_RECORDS = 10
NUM_EXPORTED_TENSORS = 12


def signals(world: World, attempt: int, rng: random.Random) -> str:
    """One signal, SIGTERM and Ctrl-C in turn, at the place that is this attempt's."""
    place = PLACES[attempt % len(PLACES)]
    number = (signal.SIGTERM, signal.SIGINT)[attempt // len(PLACES) % 2]
    found = {
        "anywhere": _anywhere, "twice": _twice, "export": _export, "preprocess": _preprocess,
    }.get(place, _at_a_point)(world, place, number, rng)  # fmt: skip
    return f"{place}, {number.name}: {found}" if found else ""


def _at_a_point(world: World, place: str, number: signal.Signals, rng: random.Random) -> str:
    """At a place of a training run that has a name."""
    last = {"data": NUM_DATA_RECORDS, "build": 1, "save": 2, "validation": 2, "answers": 4}[place]
    point = {
        "data": "data.record", "build": "train.build", "save": rng.choice(SAVE_POINTS),
        "validation": "train.validate", "answers": "train.answer",
    }[place]  # fmt: skip
    at = rng.randint(1, last)
    more = ("--set", "validation.samples=2") if place == "answers" else ()
    output = world.new_output()
    fault = f"{point}:{_ACTIONS[number]}@{at}"
    code = wait(start(world.command("lora", output, *more), faults=fault))
    if code == 0 and place == "save" and at == 2:  # it came when everything had been done
        return world.differs("lora", output)
    if problem := _problem(output, code, number):
        return f"{fault}: {problem}"
    said = (output / "log").read_text()
    if place in ("data", "build") and "Run the same command again." not in said:
        return f"{fault}: it does not say how to go on"
    if place in ("validation", "answers") and "Epoch 1, step 4" in said and at == 1:
        return f"{fault}: the validation went on to its end"
    return world.goes_on("lora", output, *more)


_ACTIONS = {signal.SIGTERM: "terminate", signal.SIGINT: "interrupt"}


def _anywhere(world: World, place: str, number: signal.Signals, rng: random.Random) -> str:
    output = world.new_output()
    pid = start(world.command("lora", output))
    time.sleep(rng.uniform(0, world.seconds))
    code = _send(pid, number)
    if code == 0:
        return world.differs("lora", output)
    return _problem(output, code, number) or world.goes_on("lora", output)


def _twice(world: World, place: str, number: signal.Signals, rng: random.Random) -> str:
    """The second one means: at once. Nothing is tidied up, and what had been saved still counts."""
    output = world.new_output()
    pid = start(world.command("lora", output))
    time.sleep(rng.uniform(0, world.seconds))
    code = _send(pid, number, times=2)
    if code == 0:
        return world.differs("lora", output)
    if code != 128 + number:
        return f"exit code {code}"
    return world.goes_on("lora", output)


def _send(pid: int, number: signal.Signals, *, times: int = 1) -> int:
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(0.01)
    return wait(pid)


def _problem(output: Path, code: int, number: signal.Signals) -> str:
    """What is wrong after one signal: another exit code, no word about it, something half-written."""
    if code != 128 + number:
        return f"exit code {code}"
    said = (output / "log").read_text() if (output / "log").exists() else ""
    if said and ("error: Stopped " not in said or "Traceback" in said):
        return f"it said {said[-200:]!r}"
    left = [path.name for path in output.rglob(".staging-*")]
    return f"{left} were left" if left else ""


def _export(world: World, place: str, number: signal.Signals, rng: random.Random) -> str:
    """While the model is written; then the same command again gives the same file."""
    command = ["create-modelfile", "--checkpoint", str(world.references["lora"] / "best_model.pt")]
    whole = world.new_output()
    if code := wait(start([*command, "--output", str(whole)])):
        return f"the export itself ended with {code}"
    output = world.new_output()
    fault = f"export.tensor:{_ACTIONS[number]}@{rng.randint(1, NUM_EXPORTED_TENSORS)}"
    code = wait(start([*command, "--output", str(output)], faults=fault))
    if problem := _problem(output, code, number):
        return f"{fault}: {problem}"
    if (output / "model.gguf").exists() or (output / "export.json").exists():
        return f"{fault}: an unfinished model is there"
    if code := wait(start([*command, "--output", str(output)])):
        return f"{fault}: once more ended with {code}"
    return "" if _digests(whole) == _digests(output) else f"{fault}: another file"


def _preprocess(world: World, place: str, number: signal.Signals, rng: random.Random) -> str:
    """While raw data is read or written; then the same command again gives the same files."""
    command = ["preprocess", str(world.data / "train.jsonl")]
    whole, output = world.new_output(), world.new_output()
    if code := wait(start([*command, "--output", str(whole)])):
        return f"preprocess itself ended with {code}"
    fault = f"data.record:{_ACTIONS[number]}@{rng.randint(1, 16)}"  # each of eight is read twice
    code = wait(start([*command, "--output", str(output)], faults=fault))
    if problem := _problem(output, code, number):
        return f"{fault}: {problem}"
    if left := [path.name for path in output.iterdir() if path.name != "log"]:
        return f"{fault}: {left} were written"
    if code := wait(start([*command, "--output", str(output)])):
        return f"{fault}: once more ended with {code}"
    return "" if _digests(whole) == _digests(output) else f"{fault}: other files"


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of the results in an output folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".gguf", ".jsonl")
    }
