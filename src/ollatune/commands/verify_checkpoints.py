"""`ollatune verify --checkpoint FOLDER`: is every checkpoint in it still what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.checkpoint.folders import is_checkpoint_folder


def is_folder_of_checkpoints(path: Path) -> bool:
    """Whether `path` holds checkpoints, and is not one that is a folder itself."""
    return path.is_dir() and not is_checkpoint_folder(path)


def run_verify_checkpoints(folder: Path) -> dict[str, Any]:
    """Read every checkpoint in `folder` and compare it with its digest; nothing is changed.

    Raises InputError where there is none, or one is damaged; the error names all of them.
    """
    from ollatune.checkpoint.store import checkpoints_in, load_checkpoint

    checked, damaged = [], []
    for path in checkpoints_in(folder):
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            damaged.append(error.message)
            continue
        checked.append({"file": path.name, "step": checkpoint.step, "epoch": checkpoint.epoch})
    if damaged:
        raise InputError(
            " ".join(damaged),
            hint=f"{len(checked)} whole ones are left; --resume auto takes the newest of them.",
        )
    if not checked:
        raise InputError(
            f"There is no checkpoint in {folder}.", hint="Pass the folder of a run's checkpoints."
        )
    return {"passed": True, "checkpoints": sorted(checked, key=lambda row: row["step"])}
