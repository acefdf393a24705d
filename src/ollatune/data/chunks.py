"""Cutting data files into pieces that can be read on their own, each knowing the line it begins at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ollatune.base.files import write_json
from ollatune.data.jsonl import Reject, read_jsonl
from ollatune.data.position import Record
from ollatune.data.sources import DataFile, data_suffix, iter_records
from ollatune.data.split import split_number
from ollatune.data.streams import compression, damage_reported, open_data, open_regular
from ollatune.data.tables import open_parquet, read_parquet

CHUNK_BYTES = 8 << 20
"""About how much of a file one worker reads at a time, and what a killed build loses at most per worker."""

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Chunk:
    """Part of a data file: some lines, some row groups, or (both None) all of it."""

    path: str
    source_id: int
    split: int
    num_bytes: int
    """About the bytes that have to be read; exact for lines."""
    lines: tuple[int, int] | None = None
    """First byte and first line."""
    row_groups: tuple[int, int] | None = None


@dataclass(frozen=True)
class FileFacts:
    """What one pass over a file finds: its digest, and where it can be cut."""

    size_bytes: int
    modified_ns: int
    sha256: str
    chunk_bytes: int
    cuts: list[list[int]]
    """[first byte, first line] of every piece of whole lines."""


def scan_file(
    path: Path, facts_folder: Path | None = None, chunk_bytes: int = CHUNK_BYTES
) -> FileFacts:
    """Digest and line cuts of a file. Kept in `facts_folder` and taken from there while size and time are the same."""
    with open_regular(path) as stream:
        status = path.stat()
        kept = (
            facts_folder
            and facts_folder
            / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
        )
        if kept:
            with suppress(OSError, ValueError, TypeError):
                facts = FileFacts(**json.loads(kept.read_text()))
                same = (facts.size_bytes, facts.modified_ns) == (status.st_size, status.st_mtime_ns)
                if same and facts.chunk_bytes == chunk_bytes:
                    return facts
        digest = hashlib.sha256()
        cuts = [[0, 1]]
        offset, line = 0, 1
        with damage_reported(path, [0]):
            while block := stream.read(min(chunk_bytes, _BLOCK_BYTES)):
                digest.update(block)
                if offset + len(block) - cuts[-1][0] >= chunk_bytes:
                    first = block.find(b"\n") + 1
                    if first:
                        cuts.append([offset + first, line + 1])
                line += block.count(b"\n")
                offset += len(block)
    if cuts[-1][0] >= offset and len(cuts) > 1:
        cuts.pop()
    facts = FileFacts(status.st_size, status.st_mtime_ns, digest.hexdigest(), chunk_bytes, cuts)
    if kept:
        write_json(kept, asdict(facts))
    return facts


def plan_chunks(
    files: Sequence[DataFile], source_id: int, facts: Sequence[FileFacts]
) -> Iterator[Chunk]:
    """The pieces of the files of one source, in order."""
    for file, fact in zip(files, facts, strict=True):
        path, split = str(file.path), split_number(file.split)
        suffix = data_suffix(file.path)
        if suffix in (".jsonl", ".ndjson") and not compression(file.path):
            ends = [*(start for start, _ in fact.cuts[1:]), fact.size_bytes]
            for (start, line), end in zip(fact.cuts, ends, strict=True):
                yield Chunk(path, source_id, split, end - start, lines=(start, line))
        elif suffix == ".parquet":
            yield from _row_group_chunks(file.path, source_id, split, fact.chunk_bytes)
        else:
            yield Chunk(path, source_id, split, fact.size_bytes)


def _row_group_chunks(path: Path, source_id: int, split: int, chunk_bytes: int) -> Iterator[Chunk]:
    with open_parquet(path) as file:
        sizes = [
            file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
        ]
    start = 0
    for group in range(len(sizes)):
        size = sum(sizes[start : group + 1])
        if size >= chunk_bytes or group == len(sizes) - 1:
            yield Chunk(str(path), source_id, split, size, row_groups=(start, group + 1))
            start = group + 1


def iter_chunk(chunk: Chunk, reject: Reject) -> Iterator[Record]:
    """The records of one piece, with their positions in the whole file."""
    path = Path(chunk.path)
    if chunk.lines is not None:
        start, line = chunk.lines
        with open_data(path) as stream:
            stream.seek(start)
            yield from read_jsonl(stream, path, reject, start_line=line, num_bytes=chunk.num_bytes)
    elif chunk.row_groups is not None:
        yield from read_parquet(path, reject, row_groups=range(*chunk.row_groups))
    else:
        yield from iter_records(path, reject)
