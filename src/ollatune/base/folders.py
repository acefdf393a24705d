"""Folders of the user's: home, cache; also for users that have none, as in some containers."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from functools import lru_cache
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with `~` at its beginning replaced by a home; a name that merely begins so stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no home
        return Path(path)


def home_folder() -> Path:
    """The user's home. A user without one gets a folder among the temporary files that nobody else can write to."""
    try:
        return Path.home()
    except RuntimeError:
        return _own_temporary_folder()


@lru_cache(maxsize=1)
def _own_temporary_folder() -> Path:
    """The same one for all processes of this user, unless somebody else has put something there: programs lie in it."""
    if sys.platform == "win32":  # where the folder of temporary files is the user's own
        return Path(tempfile.gettempdir()) / "ollatune"
    path = Path(tempfile.gettempdir()) / f"ollatune-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="ollatune-"))
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return path
    return Path(tempfile.mkdtemp(prefix="ollatune-"))


def user_cache_folder() -> Path:
    """Where downloaded weights and prepared data are kept: OLLATUNE_CACHE, or the system's cache folder."""
    if configured := os.environ.get("OLLATUNE_CACHE"):
        return Path(configured)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", home_folder())) / "ollatune" / "cache"
    if (base := os.environ.get("XDG_CACHE_HOME")) is not None and base:
        return Path(base) / "ollatune"
    library = home_folder() / "Library" / "Caches"
    return (library if library.is_dir() else home_folder() / ".cache") / "ollatune"
