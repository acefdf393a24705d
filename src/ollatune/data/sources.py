"""From a file or folder to records: which files are data, which split each belongs to, and the reader for each."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ollatune.base.errors import InputError
from ollatune.base.folders import expanded
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes, printable
from ollatune.data.json_array import read_json
from ollatune.data.jsonl import Reject, decode_line, read_jsonl
from ollatune.data.position import FileError, Position, Record, RecordError
from ollatune.data.progress import OnRead
from ollatune.data.rejects import Rejections
from ollatune.data.streams import COMPRESSED_SUFFIXES, damage_reported, file_error, open_data
from ollatune.data.tables import read_csv, read_parquet

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

TEXT_SUFFIXES = (".txt", ".md", ".markdown")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
DATA_SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES

REPORT_NAME = "report.json"
REJECTED_NAME = "rejected.jsonl"

_NOT_DATA = re.compile(r"(?i)^(\.|dataset_infos?\.|report\.json|rejected\.jsonl)")
_ABOUT_DATA = re.compile(r"(?i)^(readme|licen[sc]e|changelog|contributing|notice)")
"""Texts that come with data; a table that is called so is data itself."""
_MAY_BE_DATA = (
    ".xlsx", ".xls", ".ods", ".docx", ".odt", ".rtf", ".epub", ".pdf", ".html", ".htm", ".xml", ".yaml", ".yml",
    ".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".arrow", ".feather", ".avro", ".orc", ".pkl", ".sqlite", ".db",
)  # fmt: skip
_SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}

_log = get_logger("data")

_TEXT_PIECE_BYTES = 1 << 20
_MAX_PARAGRAPH_BYTES = 32 << 20


@dataclass(frozen=True)
class DataFile:
    """One file to read, and the split that its name or folder says it belongs to (None: says nothing)."""

    path: Path
    split: Split | None = None


@dataclass(frozen=True)
class TextPiece:
    """A plain document, or a piece of a long one."""

    text: str
    begins: bool = True
    ends: bool = True


def data_suffix(path: Path) -> str:
    """`.jsonl` for `a.jsonl` and for `a.jsonl.gz`; '' for what is no data file."""
    name = path.name.lower()
    for compressed in COMPRESSED_SUFFIXES:
        if name.endswith(compressed):
            name = name[: -len(compressed)]
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in DATA_SUFFIXES else ""


def split_of(relative: Path) -> Split | None:
    """The split that a name such as `train.jsonl`, `emails-test.csv` or `validation/part-1.json` says."""
    parts = [relative.name.split(".")[0], *reversed(relative.parts[:-1])]
    for part in parts:
        words = [word for word in re.split(r"[^A-Za-z]+", part) if word]
        for word in (words[:1] + words[-1:]) if words else []:
            if split := _SPLIT_WORDS.get(word.lower()):
                return split
    return None


def find_files(path: str | Path) -> list[DataFile]:
    """The data files at `path` (a file, a folder or a glob pattern), in a fixed order. Raises InputError.

    A single file belongs to no split, whatever its name; files of a folder do by their name or folder.
    """
    text = str(path)
    path = expanded(path)
    try:
        mode_is_folder = path.is_dir()
        exists = os.path.lexists(path)
    except OSError as error:
        raise file_error(path, error) from error
    if mode_is_folder:
        return _files_of_folder(path)
    if exists:
        return [DataFile(path)]
    if glob.has_magic(text):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        files = [DataFile(p, split_of(Path(p.name))) for p in found if data_suffix(p)]
        if files:
            return files
        raise InputError(
            f"{text}: the pattern matches no data file.", hint="Quote it, and check the folder."
        )
    raise FileError(Position(text), "no such file or folder", _nearby(path))


def _nearby(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_dir() or data_suffix(p))
    except OSError:
        return "Check the path."
    shown = ", ".join(printable(name, limit=40) for name in names[:5])
    return f"{path.parent} holds: {shown}." if shown else "Check the path."


def _files_of_folder(folder: Path) -> list[DataFile]:
    def refuse(error: OSError) -> None:
        raise file_error(Path(error.filename or folder), error)

    files, others = [], []
    unread: list[str] = []
    visited: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:  # by a link: read once, and no loops
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if _is_data(name, data_suffix(path)):
                files.append(DataFile(path, split_of(path.relative_to(folder))))
                continue
            others.append(printable(name, limit=40))
            if path.suffix.lower() in _MAY_BE_DATA and not name.startswith("."):
                unread.append(others[-1])
    if not files:
        held = (
            f" It holds {', '.join(others[:5])}{', …' if len(others) > 5 else ''}."
            if others
            else ""
        )
        raise InputError(
            f"{folder}: no data file in this folder.{held}",
            hint=f"Expected files ending in {', '.join(DATA_SUFFIXES)}, or these with .gz or .zst.",
        )
    if unread:
        _tell_once(
            f"{folder}: {len(unread)} files are of no kind that can be read and are left out: "
            f"{', '.join(unread[:5])}{', …' if len(unread) > 5 else ''}."
        )
    return files


def _is_data(name: str, suffix: str) -> bool:
    is_about = suffix in TEXT_SUFFIXES and _ABOUT_DATA.match(name)
    return bool(suffix) and not is_about and not _NOT_DATA.match(name)


@functools.lru_cache(maxsize=100)
def _tell_once(message: str) -> None:
    """Log a warning about files, which are looked for several times in a run."""
    _log.warning("%s", message)


def iter_records(
    path: str | Path, reject: Reject | None = None, on_read: OnRead | None = None
) -> Iterator[Record]:
    """Every record of one file with its position, read as a stream.

    `reject` is told of each bad record and may raise; without it the first one raises. `on_read` is told of the bytes
    read from the disk.
    Raises RecordError for a bad record, FileError for a file that cannot be read to its end.
    """
    path = Path(path)
    reject = reject or Rejections()
    suffix = data_suffix(path)
    is_empty = True
    if suffix == ".parquet":
        if path.suffix != suffix and path.suffix.lower() != suffix:
            raise FileError(
                Position(str(path)),
                "Parquet is compressed inside; a packed file cannot be read",
                "Unpack it.",
            )
        for record in read_parquet(path, reject, on_read=on_read):
            is_empty = False
            yield record
    else:
        with open_data(path, on_read) as stream:
            for record in _read(stream, path, suffix, reject):
                is_empty = False
                yield record
    if is_empty and not (isinstance(reject, Rejections) and reject.errors):
        raise FileError(Position(str(path), 1), "no record in this file", "Remove it or fill it.")


def _read(stream: BinaryIO, path: Path, suffix: str, reject: Reject) -> Iterator[Record]:
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(stream, path, reject)
    if suffix == ".json":
        return read_json(stream, path, reject)
    if suffix in (".csv", ".tsv"):
        return read_csv(stream, path, reject)
    if suffix in TEXT_SUFFIXES:
        return read_text(stream, path)
    raise FileError(
        Position(str(path)),
        f"the name does not end like a data file ({printable(path.name, limit=60)!r})",
        f"Expected one of {', '.join(DATA_SUFFIXES)}, also with .gz or .zst.",
    )


def read_text(stream: BinaryIO, path: Path) -> Iterator[Record]:
    """A plain text or Markdown file as one document; long ones in pieces that end between paragraphs.

    A form feed between pages counts as a blank line.
    """
    here = [0]
    held: list[str] = []
    num_held_bytes = 0
    start = 1
    with damage_reported(path, here):
        while line := stream.readline(_MAX_PARAGRAPH_BYTES):
            here[0] += 1
            position = Position(str(path), here[0])
            try:
                text = decode_line(line, position)
            except RecordError as error:
                raise FileError(error.position, error.cause, error.cure) from None
            if "\x00" in text:
                raise FileError(
                    position.at(text.index("\x00") + 1),
                    "NUL byte: this is not a text file",
                    "Remove it.",
                )
            if here[0] == 1:
                text = text.removeprefix("\ufeff")
            text = text.replace("\r\n", "\n").replace("\f", "\n\n")
            if num_held_bytes >= _TEXT_PIECE_BYTES and held and text.isspace():
                yield Record(
                    TextPiece("".join(held) + text, start == 1, False), Position(str(path), start)
                )
                held, num_held_bytes, start = [], 0, here[0] + 1
                continue
            num_held_bytes += len(line)
            if num_held_bytes > _MAX_PARAGRAPH_BYTES:
                raise FileError(
                    position,
                    f"more than {format_bytes(_MAX_PARAGRAPH_BYTES)} without a blank line",
                    "Split the text into paragraphs or files.",
                )
            held.append(text)
    whole = "".join(held)
    if whole.strip() or start > 1:
        yield Record(TextPiece(whole, start == 1), Position(str(path), start))
