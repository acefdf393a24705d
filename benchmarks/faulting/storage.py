"""Disks that fill up and bits that flip."""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faulting.world import SAVE_POINTS, World, same, start, state_of, wait

from ollatune.base.errors import InputError
from ollatune.checkpoint.format import read_checkpoint
from ollatune.checkpoint.store import load_checkpoint, newest_checkpoint
from ollatune.training import disk


def disk_full(world: World, attempt: int, rng: random.Random) -> str:
    """The disk fills up in the middle of a run: exit 5, nothing lost, and it goes on.

    A small file system where one can be mounted, else a limit on file sizes; every fourth by ENOSPC.
    """
    with _output(world) as (output, is_small_disk):
        wait(start(world.command("lora", output), faults="train.step:kill@4"))
        before = {p.name: p.read_bytes() for p in (output / "checkpoints").glob("*.pt")}
        size = len(next(iter(before.values())))
        command = world.command("lora", output, "--resume", "auto")
        filler = output / "filler"
        if attempt % 4 == 0:
            code = wait(start(command, faults=f"{rng.choice(SAVE_POINTS[:2])}:enospc@1"))
        elif is_small_disk:
            _fill(filler, size * attempt // 20)
            code = wait(start(command, prepare=_ask_for_no_space))
        else:
            limit = rng.randint(4096, size - 1)
            code = wait(
                start(
                    command,
                    prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                )
            )
        if code != 5:
            return f"exit code {code}, not 5"
        said = (output / "log").read_text().splitlines()[-1]
        newest = max(before, key=lambda name: read_checkpoint(output / "checkpoints" / name).step)
        facts = ("Disk full while writing", str(output), " needed, ", " free.", newest)
        if missing := [fact for fact in facts if fact not in said]:
            return f"it does not say {missing}: {said}"
        if any(
            (output / "checkpoints" / n).read_bytes() != content for n, content in before.items()
        ):
            return "an earlier checkpoint changed"
        if list(output.rglob(".staging-*")):
            return "a half-written file was left"
        filler.unlink(missing_ok=True)
        return world.goes_on("lora", output)


@contextlib.contextmanager
def _output(world: World) -> Iterator[tuple[Path, bool]]:
    """An output folder, on a small file system of its own if this machine lets us mount one."""
    output = world.new_output()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(output)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield output, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(output)], check=True)


def _fill(filler: Path, room: int) -> None:
    """Leave `room` bytes free."""
    free = shutil.disk_usage(filler.parent).free
    filler.write_bytes(b"x" * max(0, free - room))


def _ask_for_no_space() -> None:
    """The check before the run would see that there is no room; here the run itself has to."""
    disk.free_bytes = lambda _: 1 << 40


def bit_flips(world: World, attempt: int, rng: random.Random) -> str:
    """One bit is wrong in the newest checkpoint, in the index, or in the best model: noticed, nothing is lost."""
    logging.disable(logging.WARNING)  # what is damaged is said, forty times
    output = world.new_output()
    folder = output / "checkpoints"
    shutil.copytree(world.references["lora"] / "checkpoints", folder)
    if attempt % 5 == 3:
        return _flipped_index(folder, rng)
    if attempt % 5 == 4:
        return _flipped_best(world, output, rng)
    said: list[str] = []
    newest, _ = newest_checkpoint(folder, report=said.append)
    bit = _flip(newest, rng)
    try:
        taken, _ = newest_checkpoint(folder, report=said.append)
    except InputError as error:
        return str(error)
    if taken.name == newest.name or not said:
        return f"bit {bit} was not noticed"
    return "" if (folder / f"corrupt-{newest.name}").is_file() else "not set aside"


def _flip(path: Path, rng: random.Random) -> int:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def _flipped_index(folder: Path, rng: random.Random) -> str:
    """It never makes another checkpoint the newest, nor a whole one count as damaged."""
    newest, checkpoint = newest_checkpoint(folder)
    bit = _flip(folder / "index.json", rng)
    taken, again = newest_checkpoint(folder)
    if taken != newest or not same(state_of(checkpoint), state_of(again)):
        return f"bit {bit} of the index: {taken.name} is taken"
    return "a whole checkpoint was set aside" if list(folder.glob("corrupt-*")) else ""


def _flipped_best(world: World, output: Path, rng: random.Random) -> str:
    """It is refused, or (a bit that means nothing) holds the same weights."""
    source = world.references["lora"] / "best_model.pt"
    best = Path(shutil.copy(source, output))
    bit = _flip(best, rng)
    try:
        found = load_checkpoint(best)
    except InputError:
        return ""
    whole = read_checkpoint(source)
    return "" if same(found.as_dict(), whole.as_dict()) else f"bit {bit} of the best model"
