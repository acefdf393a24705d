"""Clocks that are wrong or jump: what is newest is told by steps, durations never jump, times are in UTC."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import time_machine
from benchmarks.faulting.world import World, start, wait

from ollatune.checkpoint.format import read_checkpoint
from ollatune.checkpoint.store import newest_checkpoint
from ollatune.training.recorder import Recorder

_LONGEST_SECONDS = 3600.0
"""Longer than any run here, shorter than any jump."""


def _utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=timezone.utc)  # type: ignore[arg-type, misc]


_DAY = timedelta(days=1)
_NOON = _utc(2026, 6, 10, 12)


@dataclass(frozen=True)
class Clock:
    """What the clock says when a run begins, after a jump in its middle, and when it is resumed; and the zones."""

    what: str
    begin: datetime = _NOON
    resume: datetime = _NOON + timedelta(minutes=5)
    jump: timedelta = timedelta()
    zones: tuple[str, str] = ("UTC", "UTC")
    files_from: float | None = None
    """Time that all files are given before the resume."""


_BERLIN = ("Europe/Berlin", "Europe/Berlin")
CLOCKS = (
    Clock("a day back before the resume", resume=_NOON - _DAY),
    Clock("a day ahead before the resume", resume=_NOON + _DAY),
    Clock("a day back in the run", jump=-_DAY),
    Clock("a day ahead in the run", jump=_DAY),
    Clock("1970", _utc(1970, 1, 1, 0, 0, 10), _utc(1970, 1, 1, 0, 0, 5)),
    Clock("around 2038", _utc(2038, 1, 19, 3, 14, 7), _utc(2038, 1, 20)),
    Clock("after 2106", _utc(2106, 2, 7, 6, 28, 14), _utc(2107, 1, 1)),
    Clock("an hour that is left out", _utc(2026, 3, 29, 0, 59, 59), _utc(2026, 3, 29, 1), zones=_BERLIN),
    Clock("an hour that comes twice", _utc(2026, 10, 25, 0, 59, 59), _utc(2026, 10, 25, 1), zones=_BERLIN),
    Clock("Kathmandu, then Newfoundland", zones=("Asia/Kathmandu", "America/St_Johns")),
    Clock("files from the future", files_from=4e9),
    Clock("files from 1970", files_from=0.0),
)  # fmt: skip


def clocks(world: World, attempt: int, rng: random.Random) -> str:
    """A run is killed under one clock and resumed under another: it ends as under any."""
    clock = CLOCKS[attempt]
    problem = _run(world, clock)
    return f"{clock.what}: {problem}" if problem else ""


def _run(world: World, clock: Clock) -> str:
    output = world.new_output()
    command = world.command("lora", output)
    prepare = _prepared(clock.begin, clock.zones[0], clock.jump)
    if wait(start(command, faults="train.step:kill@7", prepare=prepare)) != -9:
        return f"was not killed: {(output / 'log').read_text()[-300:]}"
    checkpoints = output / "checkpoints"
    if clock.files_from is not None:
        for path in checkpoints.iterdir():
            os.utime(path, (clock.files_from, clock.files_from))
    else:  # the oldest file is the newest checkpoint
        for number, path in enumerate(sorted(checkpoints.glob("*.pt"), key=_step, reverse=True)):
            os.utime(path, (1e9 + number, 1e9 + number))
    if (step := newest_checkpoint(checkpoints)[1].step) != 6:
        return f"step {step} counts as the newest, not 6"
    prepare = _prepared(clock.resume, clock.zones[1], timedelta())
    if code := wait(start([*command, "--resume", "auto"], prepare=prepare)):
        return f"resume ended with {code}"
    return world.differs("lora", output) or _wrong_times(output, clock)


def _step(path: Path) -> int:
    return read_checkpoint(path).step


def _prepared(moment: datetime, zone: str, jump: timedelta) -> Callable[[], None]:
    """Sets the clock of a child; after its third step it jumps."""

    def prepare() -> None:
        os.environ["TZ"] = zone
        time.tzset()
        traveller = time_machine.travel(moment, tick=True)
        traveller.start()
        original: Callable[..., None] = Recorder.step

        def step(self: Recorder, *arguments: Any) -> None:
            original(self, *arguments)
            if jump and arguments[0].step == 3:
                traveller.stop()
                time_machine.travel(moment + jump, tick=True).start()

        Recorder.step = step  # type: ignore[method-assign]

    return prepare


def _wrong_times(output: Path, clock: Clock) -> str:
    """What is wrong about the times and durations that the run wrote."""
    values = json.loads((output / "run.json").read_text())
    times = [values["started"], values["finished"]]
    times.append(read_checkpoint(output / "checkpoints" / "epoch_2.pt").timestamp)
    for text in times:
        found = datetime.fromisoformat(text)
        if found.utcoffset() != timedelta() or not timedelta() <= found - clock.resume < _DAY / 2:
            return f"{text} is not just after {clock.resume}, in UTC"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["type"] == "step"]
    seconds += [values["train_seconds"], values["total_seconds"]]
    return "" if all(0 <= s < _LONGEST_SECONDS for s in seconds) else f"durations {seconds}"
