"""What all processes of a run must have in common; differences are errors at once instead of a hang later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ollatune.base.errors import UsageError
from ollatune.checkpoint.format import Checkpoint
from ollatune.checkpoint.store import load_checkpoint
from ollatune.training.distributed import Processes

Found = tuple[Path, Checkpoint]


def agreed_checkpoint(processes: Processes, found: Found | None) -> Found | None:
    """The main process's checkpoint on all: one may have set a damaged file aside that another was reading."""
    mine = None if found is None else str(found[0])
    chosen = processes.share(mine)
    if chosen is None or chosen == mine:
        return found
    return Path(chosen), load_checkpoint(Path(chosen), with_tensors=False)


def digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def require_same(processes: Processes, facts: dict[str, str]) -> None:
    """Raise UsageError on every process where one has other base weights, data or settings than the main one."""
    everyone = processes.gather(facts)
    for rank, theirs in enumerate(everyone):
        differing = [name for name, value in everyone[0].items() if theirs.get(name) != value]
        if differing:
            raise UsageError(
                f"Process {rank} of {processes.count} has other {' and '.join(differing)} than process 0.",
                hint="Start every process with the same command, on the same files (or copies of them).",
            )
