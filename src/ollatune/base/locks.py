"""One owner at a time for a folder, by a lock of the operating system, or by a file where it knows of none."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ollatune.base.errors import LockedError
from ollatune.base.files import make_folder, storage_error
from ollatune.base.log import get_logger

_OWNER_WAIT_SECONDS = 0.3
_HINT = "Wait until it ends, stop it, or choose another folder with --output."
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class LocksUnsupportedError(Exception):
    """The file system knows no locks, as some network file systems do."""


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process alone; False where another has it. The system frees it when we end.

    Raises LocksUnsupportedError where the file system cannot do it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise LocksUnsupportedError(error.strerror) from error
    return True


@contextlib.contextmanager
def own_folder(folder: Path, name: str) -> Iterator[None]:
    """Own `folder`, by its file `name`, for the length of the block. Raises LockedError naming the owner.

    The operating system frees its lock when the holder dies, however it dies. Where there are no such locks, a file
    `name` + `.owner` stands for one, and a dead process's is taken over. Either way a note says so.
    """
    path = make_folder(folder) / name
    try:
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error
    with stream:
        try:
            if not try_lock(stream.fileno()):
                raise _locked(folder, path)
        except LocksUnsupportedError:
            with _owner_file(folder, _owner_path(path)):
                yield
            return
        if (before := _read_owner(path)) is not None:
            _note_takeover(before)
        stream.truncate(0)
        stream.write(json.dumps(_ourselves()))
        stream.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                stream.truncate(0)  # nobody: what a dead process leaves here names it


def refuse_owned(folder: Path, name: str) -> None:
    """Raise LockedError where another process owns `folder` now; `own_folder` makes sure later.

    The lock itself is only tried where somebody says to have it: trying it would refuse another that starts now.
    """
    path = folder / name
    for place in (path, _owner_path(path)):
        owner = _read_owner(place)
        if owner is None or owner["host"] != socket.gethostname() or not _is_alive(owner):
            continue
        if place == path:
            with contextlib.suppress(OSError, LocksUnsupportedError), path.open("r+") as stream:
                if try_lock(stream.fileno()):
                    continue  # its number is another process's by now
        raise _owned_by(folder, owner)


def _owner_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.owner")


def _ourselves() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "started": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
    }


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _read_owner(path: Path) -> dict[str, Any] | None:
    """What the owner wrote of itself; None where nobody has, or not all of it yet."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = ("pid", "host", "boot", "started")
    return owner if isinstance(owner, dict) and all(key in owner for key in keys) else None


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner runs still; of another machine's nobody knows, so it does."""
    import psutil

    if owner["host"] != socket.gethostname():
        return True
    return owner["boot"] == _boot_id() and psutil.pid_exists(int(owner["pid"]))


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _note_takeover(before: dict[str, Any]) -> None:
    get_logger("training").warning(
        "The run before, %s, ended without letting go of the folder; it is taken over.",
        _named(before),
    )


def _owned_by(folder: Path, owner: dict[str, Any] | None) -> LockedError:
    who = "another process" if owner is None else _named(owner)
    return LockedError(f"{folder} is in use by {who}.", hint=_HINT)


def _locked(folder: Path, path: Path) -> LockedError:
    """The error that names the owner; one that has only just got the lock is given a moment to write its name."""
    owner = None
    deadline = time.monotonic() + _OWNER_WAIT_SECONDS
    while time.monotonic() < deadline:
        owner = _read_owner(path) or owner
        if owner is not None and _is_alive(owner):
            break
        time.sleep(0.01)
    return _owned_by(folder, owner)


@contextlib.contextmanager
def _owner_file(folder: Path, path: Path) -> Iterator[None]:
    """Own the file `path`, whole from its first instant: a link to one that is written already."""
    mine = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    mine.write_text(json.dumps(_ourselves()), encoding="utf-8")
    try:
        _take(folder, path, mine)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        mine.unlink(missing_ok=True)


def _take(folder: Path, path: Path, mine: Path) -> None:
    """Make `path` from `mine`, if nobody alive has it. Raises LockedError."""
    if _linked(mine, path):
        return
    owner = _read_owner(path)
    if owner is None or _is_alive(owner):
        raise _owned_by(folder, owner)
    # One of those that find it dead may replace it; the others see that one at work.
    claim = path.with_name(f"{path.name}.claim")
    if not _linked(mine, claim):
        claimer = _read_owner(claim)
        if claimer is not None and not _is_alive(claimer):
            claim.unlink(missing_ok=True)  # killed just there: the next start finds the way free
        raise _owned_by(folder, claimer)
    try:
        if _read_owner(path) != owner:
            raise _owned_by(folder, _read_owner(path))
        _note_takeover(owner)
        os.replace(claim, path)
    finally:
        claim.unlink(missing_ok=True)


def _linked(source: Path, target: Path) -> bool:
    """Give `source` the second name `target`; False where that exists. Without links, a copy made exclusively."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:
        try:
            with target.open("x", encoding="utf-8") as stream:
                stream.write(source.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True
