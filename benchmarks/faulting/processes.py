"""The same run as real commands in processes of their own: two threads, compiled kernels, dropout; the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from benchmarks.faulting.repeating import digests_of
from benchmarks.faulting.world import World

SOURCE = Path(__file__).resolve().parents[2] / "src"
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bf16": ("bf16", ("--set", "advanced.lora_dropout=0.3")),
    "packed bf16": ("packed", ("--set", "model.dtype=bf16", "--set", "advanced.lora_dropout=0.3")),
    "full bf16": ("full", ("--set", "model.dtype=bf16")),
}
THREADS = 2


def same_elsewhere(world: World, attempt: int, rng: random.Random) -> str:
    """A run and its export, again in another place; every second time killed and resumed there."""
    kind = list(KINDS)[attempt % len(KINDS)]
    if kind not in world.digests:
        found = _digests(world, kind, 0, is_killed=False)
        if isinstance(found, str):
            return found
        world.digests[kind] = found
    found = _digests(world, kind, attempt + 1, is_killed=attempt >= len(KINDS))
    if isinstance(found, str):
        return found
    first = world.digests[kind]
    different = [name for name in first if first[name] != found.get(name)]
    return f"{kind}: {', '.join(different)} differ" if different else ""


def _digests(world: World, kind: str, number: int, *, is_killed: bool) -> dict[str, str] | str:
    """Digests of what a run of `kind` writes under the circumstances of `number`, or what went wrong."""
    method, more = KINDS[kind]
    output = world.new_output()
    command = world.command(method, output, *more)
    if is_killed:
        code = _ended(command, number, output, fault="train.step:kill@6")
        if code != -9:
            return f"{kind}: was not killed but ended with {code}"
        command += ["--resume", "auto"]
    if code := _ended(command, number, output):
        return f"{kind}: exit code {code}: {(output / 'log').read_text()[-300:]}"
    (output / "export").mkdir()
    best = str(output / "best_model.pt")
    export = ["create-modelfile", "--checkpoint", best, "--output", str(output / "export")]
    if code := _ended(export, number, output):
        return f"{kind}: export ended with {code}: {(output / 'log').read_text()[-300:]}"
    return digests_of(output)


def _ended(command: list[str], number: int, output: Path, *, fault: str = "") -> int:
    """Exit code of a real command, in circumstances that must not matter."""
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(THREADS),
        "TZ": ("UTC", "Asia/Kathmandu", "America/St_Johns")[number % 3], "OLLATUNE_FAULT": fault,
        "LC_ALL": ("C", "C.UTF-8")[number % 2],
    }  # fmt: skip
    with (output / "log").open("ab") as log:
        return subprocess.run(
            ["nice", "-n", str(number % 3), sys.executable, "-m", "ollatune", *command],
            env=environment, cwd=("/", str(output))[number % 2], stdout=log, stderr=log, check=False,
        ).returncode  # fmt: skip
