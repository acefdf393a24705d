"""Durable files: everything the program writes for keeps goes through here.

The order is always: write to a staging name in the same folder → flush → fsync → rename over the final name →
fsync the folder. A process killed at any instant leaves the old file or the new one, never a half.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ollatune.base.errors import StorageError
from ollatune.base.text import format_bytes

STAGING_PREFIX = ".staging-"
"""Names that begin so are unfinished writes: never read, and removed by `clean_staging`."""

_HASH_CHUNK_BYTES = 4 << 20


def storage_error(error: OSError, path: Path, needed_bytes: int | None = None) -> StorageError:
    """The error a user sees for an operating-system failure at `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = format_bytes(free_bytes(path))
        needed = f"{format_bytes(needed_bytes)} needed, " if needed_bytes else ""
        return StorageError(
            f"Disk full while writing {path}: {needed}{free} free.",
            hint="Free some space or choose another folder with --output; what was there before is intact.",
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(
        f"Cannot write {path}: {reason}.", hint="Check the path and its permissions."
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` or its nearest existing parent."""
    probe = path.absolute()
    while not probe.exists() and probe != probe.parent:
        probe = probe.parent
    try:
        return shutil.disk_usage(probe).free
    except OSError:
        return 0


def make_folder(path: Path) -> Path:
    """Create `path` and its parents. Raises StorageError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        found = next(p for p in (path, *path.parents) if p.exists())
        raise StorageError(
            f"{found} is a file, a folder was expected.", hint="Choose another output folder."
        ) from None
    except OSError as error:
        raise storage_error(error, path) from error
    return path


def refuse_unwritable(path: Path) -> None:
    """Raise StorageError where the folder `path` could not be made or written to; nothing is made.

    For early on: `require_writable` makes sure.
    """
    found = path.absolute()
    while not os.path.lexists(found) and found != found.parent:
        found = found.parent
    if not found.is_dir():
        make_folder(path)
    elif not os.access(found, os.W_OK | os.X_OK):
        reason = errno.EROFS if _is_read_only(found) else errno.EACCES
        raise storage_error(OSError(reason, os.strerror(reason)), path)


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def require_writable(path: Path) -> None:
    """Create the folder `path` and see that files can be made in it. Raises StorageError."""
    make_folder(path)
    probe = path / f"{STAGING_PREFIX}probe.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        try:
            probe.touch(exist_ok=False)
        finally:  # also where a signal comes in between
            _remove(probe)
    except OSError as error:
        raise storage_error(error, path) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except BaseException:  # a signal: the first one only raises
        path.unlink(missing_ok=True)
        raise


def fsync_folder(path: Path) -> None:
    """Make renames in `path` durable. Does nothing where folders cannot be opened (Windows)."""
    with contextlib.suppress(OSError, PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def staged_file(path: Path, *, needed_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """Open a staging file that becomes `path` when the block ends without an exception.

    Raises StorageError for disk full, no permission and the like; `path` is then untouched.
    """
    make_folder(path.parent)
    staging = path.parent / f"{STAGING_PREFIX}{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with staging.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staging, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            staging.unlink()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise storage_error(error, path, needed_bytes) from error
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with staged_file(path, needed_bytes=len(content)) as stream:
        stream.write(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` atomically and durably, newlines as given."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused (ValueError): they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def clean_staging(folder: Path) -> int:
    """Remove what killed writers left in `folder`; returns how many entries went.

    Only entries of processes that are gone are touched: another live process may be writing beside us.
    """
    removed = 0
    for entry in folder.glob(f"{STAGING_PREFIX}*"):
        parts = entry.name.rsplit(".", 2)
        if len(parts) == 3 and parts[1].isdigit() and _process_is_alive(int(parts[1])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
        removed += 1
    return removed


def _process_is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own earlier failures; a write in progress cleans up after itself
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
