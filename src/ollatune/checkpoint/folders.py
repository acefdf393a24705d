"""Checkpoints that are folders: how one comes into place, is replaced and removed; no half of one is ever found."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from ollatune.base.faults import fault_point
from ollatune.base.files import STAGING_PREFIX, fsync_folder

SHARDS_SUFFIX = ".shards"
_REPLACED_PREFIX = ".replaced-"


def is_checkpoint_folder(path: Path) -> bool:
    """Whether `path` is one sharded checkpoint (and not a folder of checkpoints)."""
    return path.suffix == SHARDS_SUFFIX and path.is_dir()


def staging_path(path: Path) -> Path:
    """Where what becomes `path` is written first."""
    return path.parent / f"{STAGING_PREFIX}{path.name}.{os.getpid()}.{secrets.token_hex(4)}"


def replace_folder(staging: Path, target: Path) -> None:
    """Let the complete folder `staging` become `target`. Raises OSError.

    No folder can be renamed over another: an earlier one steps aside first, and `finish_replacing` puts it back where
    a kill comes between.
    """
    fsync_folder(staging)
    replaced = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
    fault_point("save.before_rename")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
        fault_point("save.between_renames")
    os.replace(staging, target)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Put back, or remove, what a kill left in the middle of `replace_folder`."""
    for replaced in folder.glob(f"{_REPLACED_PREFIX}*"):
        target = folder / replaced.name.removeprefix(_REPLACED_PREFIX)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process of the run was faster
                os.replace(replaced, target)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; a folder loses its name first."""
    if not path.is_dir():
        path.unlink()
        return
    nameless = staging_path(path)
    os.replace(path, nameless)
    shutil.rmtree(nameless, ignore_errors=True)
