"""The index of a checkpoint folder: what lies in it, with digests that say whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollatune.base.files import write_json
from ollatune.base.log import get_logger

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class IndexEntry:
    """One checkpoint as the index knows it."""

    file: str
    sha256: str
    size_bytes: int
    step: int
    epoch: int
    val_loss: float | None
    is_finite: bool
    run_id: str
    timestamp: str


def _digest_of(listed: list[dict[str, Any]]) -> str:
    """Hex sha256 of an index's entries: a flipped bit in the step would otherwise make another one the newest."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> list[IndexEntry]:
    """What the index in `folder` says; nothing where there is none, or a damaged one (a warning says so)."""
    try:
        content = json.loads((folder / INDEX_NAME).read_bytes())
        listed = content.pop("checkpoints")
        if content and content != {"sha256": _digest_of(listed)}:  # none in older indexes
            raise ValueError
        return [IndexEntry(**entry) for entry in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        get_logger("checkpoint").warning(
            "%s is damaged; the checkpoints beside it are checked one by one.", folder / INDEX_NAME
        )
        return []


def write_index(folder: Path, entries: Sequence[IndexEntry]) -> None:
    """Write the index of `entries` into `folder`. Raises StorageError."""
    listed = [asdict(entry) for entry in sorted(entries, key=lambda e: (e.step, e.file))]
    write_json(folder / INDEX_NAME, {"checkpoints": listed, "sha256": _digest_of(listed)})
