"""Sending a blob: only if it is missing, again if it was cut, and never other bytes than were announced.

The server takes a blob in one body and has no way to resume; a finished one answers HEAD with 200.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ollatune.base.errors import InputError, StorageError
from ollatune.base.files import sha256_file
from ollatune.base.log import get_logger
from ollatune.ollama.answers import Progress, ProgressCallback
from ollatune.ollama.failures import OllamaError
from ollatune.ollama.names import digest_hex
from ollatune.ollama.session import Call, Session

_CHUNK_BYTES = 1 << 20


def upload_blob(
    session: Session,
    blob_exists: Callable[[str], bool],
    path: Path,
    *,
    digest: str | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """Send the file at `path` unless the server has it, and return its digest (`sha256:…`).

    A transfer that is cut is repeated from the start. A mismatch reported by the server makes us hash the file
    once more. Raises InputError if the file changes on the way, OllamaError if the server refuses it.
    """
    identity = _identity(path)
    digest = f"sha256:{digest_hex(digest) if digest else sha256_file(path)}"
    report = _Monotone(digest, identity[0], progress)
    left = len(session.limits.retry_waits_seconds)
    may_rehash = True
    while not blob_exists(digest):
        call = Call(
            "POST", f"/api/blobs/{digest}", f"take the file {path.name}",
            content=lambda: _content(path, identity, report),
            headers={"content-type": "application/octet-stream", "content-length": str(identity[0])},
            is_work=True, may_repeat=False,
        )  # fmt: skip
        try:
            session.fetch(call)
            break
        except OllamaError as error:
            _require_same(path, identity)
            if "digest mismatch" in error.server_text and may_rehash:
                may_rehash = False
                _require_digest(path, digest)
            elif not error.is_cut or left <= 0:
                raise
            else:
                waits = session.limits.retry_waits_seconds
                session.pause(waits[len(waits) - left])
                left -= 1
            get_logger("ollama").warning("%s Sending the file again.", error.message)
    _require_same(path, identity)
    report(identity[0])
    return digest


class _Monotone:
    """Progress that never goes back, also when the file is sent again."""

    def __init__(self, digest: str, total: int, callback: ProgressCallback | None) -> None:
        self.digest, self.total, self.callback = digest, total, callback
        self.furthest = -1

    def __call__(self, sent: int) -> None:
        if sent > self.furthest and self.callback:
            self.furthest = sent
            self.callback(Progress("uploading", self.digest, sent, self.total))


def _content(path: Path, identity: tuple[int, int, int], report: _Monotone) -> Iterator[bytes]:
    sent = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sent += len(chunk)
            if sent > identity[0]:
                raise _changed(path)
            yield chunk
            report(sent)
    if sent != identity[0]:
        raise _changed(path)


def _identity(path: Path) -> tuple[int, int, int]:
    """Size, time of change and inode: what tells that the file is still the one that was hashed."""
    try:
        status = path.stat()
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {os.strerror(error.errno or 0)}.", hint="Check the path."
        ) from error
    return status.st_size, status.st_mtime_ns, status.st_ino


def _require_same(path: Path, identity: tuple[int, int, int]) -> None:
    if _identity(path) != identity:
        raise _changed(path)


def _require_digest(path: Path, digest: str) -> None:
    found = sha256_file(path)
    if found != digest_hex(digest):
        raise InputError(
            f"{path} has the sha256 {found}, {digest_hex(digest)} was expected.",
            hint="The file was changed or damaged after it was written: export it again.",
        )


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} changed while it was sent to the server.",
        hint="Nothing was created. Let its writer finish, then try again.",
    )
