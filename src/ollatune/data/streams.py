"""Opening data files: regular files only, `.gz` and `.zst` decompressed while reading, disguises recognised."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ollatune.data.position import FileError, Position
from ollatune.data.progress import OnRead

COMPRESSED_SUFFIXES = (".gz", ".zst")

_BUFFER_BYTES = 1 << 20
_MAX_ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd --long` writes; a file may declare up to 2 TiB

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed data", "Rename it so that it ends in `.gz`."),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed data", "Rename it so that it ends in `.zst`."),
    (
        b"PK\x03\x04",
        "a zip archive or an Office document",
        "Unpack it first (`unzip FILE`), or save the sheet as CSV or the document as text.",
    ),
    (b"%PDF-", "a PDF document", "Take the text out first: `pdftotext FILE`."),
    (b"BZh", "bzip2-compressed data", "Unpack it first: `bunzip2 FILE`."),
    (b"\xfd7zXZ\x00", "xz-compressed data", "Unpack it first: `unxz FILE`."),
    (b"PAR1", "a Parquet file", "Rename it so that it ends in `.parquet`."),
    (b"SQLite format 3\x00", "an SQLite database", "Export the table as CSV first."),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data itself",
        "Fetch the data: `git lfs pull`.",
    ),
    (b"\xff\xfe", "UTF-16 text", "Convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`."),
    (b"\xfe\xff", "UTF-16 text", "Convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`."),
)
_HTML = (b"<!doctype html", b"<html")


def compression(path: Path) -> str:
    """`.gz` or `.zst` where the name ends so, in any case; otherwise ''."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSED_SUFFIXES else ""


def file_error(path: Path, error: OSError) -> FileError:
    """What a user is told when the operating system refuses a file."""
    cures = {
        errno.ENOENT: "Check the path.",
        errno.EACCES: "Give yourself permission to read it: `chmod u+r FILE`.",
        errno.EPERM: "Give yourself permission to read it: `chmod u+r FILE`.",
        errno.ELOOP: "The symbolic links point at each other: replace them with the file itself.",
        errno.EISDIR: "Name a file, or the folder that holds the data files.",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    cause = f"cannot be read: {reason[:1].lower()}{reason[1:]}"
    return FileError(Position(str(path)), cause, cures.get(error.errno or 0, "Check the disk."))


def disguise(head: bytes) -> tuple[str, str] | None:
    """(what it is, cure) where the first bytes of a text file show that it is something else."""
    for magic, what, cure in _MAGIC:
        if head.startswith(magic):
            return what, cure
    if head.lstrip()[:16].lower().startswith(_HTML):
        return "an HTML page", "Download the data again: a web page was saved in its place."
    if b"\x00" in head[:4] and (head[1:2] == b"\x00" or head[:1] == b"\x00"):
        return "UTF-16 text", "Convert it: `iconv -f UTF-16LE -t UTF-8 FILE > NEW`."
    return None


class _CountedFile(io.FileIO):
    """Tells of every read from the disk."""

    def __init__(self, descriptor: int, on_read: OnRead) -> None:
        super().__init__(descriptor, "rb")
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._on_read(count or 0)
        return count


def open_regular(path: Path, on_read: OnRead | None = None) -> BinaryIO:
    """Open a regular file. Raises FileError for anything else, without ever waiting on a pipe."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except OSError as error:
        raise file_error(path, error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise FileError(
            Position(str(path)),
            f"is {kind}, not a regular file",
            "Save the data to a file and name that.",
        )
    if on_read is not None:
        return io.BufferedReader(_CountedFile(descriptor, on_read), _BUFFER_BYTES)
    return open(descriptor, "rb", buffering=_BUFFER_BYTES)


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame and, unlike zstandard's own reader, notices a missing end."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._context = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._ready = b""
        self._started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            chunk = rest or self._source.read(1 << 16)
            if not chunk:
                if self._started and not self._frame.eof:
                    raise EOFError("the compressed data ends in the middle of a frame")
                return 0
            if self._frame.eof:
                self._frame = self._context.decompressobj()
            self._started = True
            self._ready = self._frame.decompress(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def open_data(path: Path, on_read: OnRead | None = None) -> Iterator[BinaryIO]:
    """A binary stream of the file's content, decompressed; checks at the end that the file did not change.

    `on_read` is told of the bytes read from the disk, packed as they are there.

    Raises FileError for a file of another kind than its name says, and for one that changed while it was read.
    """
    with open_regular(path, on_read) as raw:
        before = os.fstat(raw.fileno())
        stream: BinaryIO = raw
        packed = compression(path)
        if packed == ".gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), _BUFFER_BYTES)
        elif packed == ".zst":
            stream = io.BufferedReader(_ZstdStream(raw), _BUFFER_BYTES)
        elif found := disguise(raw.peek(512)[:512] if isinstance(raw, io.BufferedReader) else b""):
            what, cure = found
            raise FileError(Position(str(path), 1), f"this is {what}", cure)
        yield stream
        after = os.fstat(raw.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise FileError(
                Position(str(path)),
                f"changed while it was being read (from {before.st_size} to {after.st_size} bytes)",
                "Wait until whatever writes it is done, then start again.",
            )


@contextlib.contextmanager
def damage_reported(path: Path, line: list[int]) -> Iterator[None]:
    """Turn what decompressors raise into a FileError at line `line[0]`, the last one that could be read."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise FileError(
            Position(str(path), line[0]),
            f"the compressed data is damaged or cut off here ({error})",
            "Copy or download the file again.",
        ) from error
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise file_error(path, error) from error
