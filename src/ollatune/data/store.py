"""Tokenised examples as flat arrays, in memory or mapped from disk, and views of them that training reads from.

A token is stored as 32 bits: the id, and in the highest bit whether it is a target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TARGET_BIT = np.uint32(1 << 31)
ID_MASK = np.uint32((1 << 31) - 1)

TokenIds = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Example:
    """Token ids [T] and, per token, whether the model learns to predict it from those before it."""

    token_ids: TokenIds
    is_target: Mask

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.is_target.shape

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Target tokens that have a token before them to be predicted from."""
        return int(np.count_nonzero(self.is_target[1:]))


def pack_tokens(token_ids: npt.ArrayLike, is_target: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """The stored form of an example."""
    packed = np.asarray(token_ids, dtype=np.uint32)
    return np.where(np.asarray(is_target, dtype=bool), packed | TARGET_BIT, packed).astype(
        np.uint32
    )


def unpack_tokens(packed: npt.NDArray[np.uint32]) -> Example:
    """The example behind its stored form."""
    return Example((packed & ID_MASK).astype(np.int32), packed >= TARGET_BIT)


@dataclass(frozen=True)
class StoredArrays:
    """What is known of n samples. Tokens may be a file of them, which is mapped when they are asked for."""

    tokens: npt.NDArray[np.uint32] | Path
    offsets: npt.NDArray[np.int64]  # [n + 1]
    num_targets: npt.NDArray[np.int64]  # [n] target tokens, a document's first token included
    digests: npt.NDArray[np.uint64]  # [n] equal for exact duplicates
    prompt_digests: npt.NDArray[np.uint64]  # [n]
    source_ids: npt.NDArray[np.int64]  # [n]
    scores: npt.NDArray[np.float64]  # [n]
    splits: npt.NDArray[np.int64]  # [n] what the file's name says, see `split.py`
    ordinals: npt.NDArray[
        np.int64
    ]  # [n] number of the record in its shard; its examples follow one another


_COLUMN_TYPES: dict[str, npt.DTypeLike] = {
    "num_targets": np.int32,
    "digests": np.uint64,
    "prompt_digests": np.uint64,
    "source_ids": np.int32,
    "scores": np.float64,
    "splits": np.int8,
    "ordinals": np.int32,
}
"""As narrow as they can be: there is one value of each per example in memory, however large the data."""

_MAX_OPEN_MAPS = 128  # each holds a file descriptor, of which a process has 256 (macOS) or 1024


class TokenStore:
    """n tokenised samples in one or more shards, by index."""

    def __init__(self, shards: Iterable[StoredArrays]) -> None:
        self._tokens: list[npt.NDArray[np.uint32] | Path] = []
        counts: list[int] = []
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _COLUMN_TYPES}
        lengths, starts = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for shard in shards:
            self._tokens.append(shard.tokens)
            counts.append(len(shard.offsets) - 1)
            lengths.append(np.diff(shard.offsets).astype(np.int32))
            starts.append(np.diff(shard.ordinals, prepend=-1) != 0)
            for name, dtype in _COLUMN_TYPES.items():
                column = getattr(shard, name)
                if name == "scores" and not column.any():
                    column = np.broadcast_to(np.zeros(1), column.shape)
                parts[name].append(column.astype(dtype, copy=False))
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

        def column_of(name: str) -> Any:
            found = parts.pop(name)
            if name == "scores" and not any(part.any() for part in found):
                return np.broadcast_to(np.zeros(1), int(self._starts[-1]))
            return np.concatenate(found) if found else np.zeros(0, _COLUMN_TYPES[name])

        self.num_targets: npt.NDArray[np.int32] = column_of("num_targets")
        self.digests: npt.NDArray[np.uint64] = column_of("digests")
        self.prompt_digests: npt.NDArray[np.uint64] = column_of("prompt_digests")
        self.source_ids: npt.NDArray[np.int32] = column_of("source_ids")
        self.scores: npt.NDArray[np.float64] = column_of("scores")
        self.splits: npt.NDArray[np.int8] = column_of("splits")
        self._ordinals: npt.NDArray[np.int32] = column_of("ordinals")
        self.is_record_start: npt.NDArray[np.bool_] = np.concatenate(starts)
        self.lengths: npt.NDArray[np.int32] = np.concatenate(lengths)
        self._offsets = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=self._offsets[1:])
        self._map = functools.lru_cache(maxsize=_MAX_OPEN_MAPS)(_map_tokens)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def place(self, index: int) -> tuple[int, int]:
        """(shard, ordinal of the record in it) of one example."""
        return self._shard_of(index), int(self._ordinals[index])

    def packed(self, index: int) -> npt.NDArray[np.uint32]:
        """Stored tokens [T] of one sample."""
        shard = self._shard_of(index)
        tokens = self._tokens[shard]
        if isinstance(tokens, Path):
            tokens = self._map(tokens)
        before = self._offsets[self._starts[shard]]
        return tokens[self._offsets[index] - before : self._offsets[index + 1] - before]

    def __getitem__(self, index: int) -> Example:
        return unpack_tokens(self.packed(index))


def _map_tokens(path: Path) -> npt.NDArray[np.uint32]:
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint32)  # nothing can be mapped
    return np.memmap(path, np.uint32, mode="r")


Counts = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class ExampleSource(Protocol):
    """What batches are made of: examples by index, with the facts that ordering needs known beforehand."""

    @property
    def lengths(self) -> Counts: ...
    @property
    def num_targets(self) -> Counts: ...
    @property
    def source_ids(self) -> Counts: ...
    @property
    def scores(self) -> npt.NDArray[np.float64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class ExampleSet:
    """The examples of one split: some rows of a store."""

    def __init__(self, store: TokenStore, rows: npt.NDArray[np.int64] | None = None) -> None:
        self.store = store
        self.rows = np.arange(len(store)) if rows is None else rows
        self.lengths = store.lengths[self.rows]
        self.num_targets = store.num_targets[self.rows]
        self.source_ids = store.source_ids[self.rows]

    @cached_property
    def scores(self) -> npt.NDArray[np.float64]:
        """[n] what a curriculum by score sorts by."""
        return self.store.scores[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.store[int(self.rows[index])]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class WindowSet:
    """Fixed windows over documents joined end to end, for continued pre-training.

    Neighbouring windows share `overlap` tokens; in the later one these are context, so no token is learned twice.
    Only the last window may be shorter. Documents of different sources are never joined.
    """

    def __init__(
        self, store: TokenStore, rows: npt.NDArray[np.int64], *, window: int, overlap: int = 0
    ) -> None:
        assert 0 <= overlap < window
        self._store = store
        self._window = window
        self._overlap = overlap
        starts, lengths, sources, streams = [], [], [], []
        self._rows: list[npt.NDArray[np.int64]] = []
        self._ends: list[npt.NDArray[np.int64]] = []
        for source in np.unique(store.source_ids[rows]):
            members = rows[store.source_ids[rows] == source]
            ends = np.cumsum(store.lengths[members])
            total = int(ends[-1])
            stride = window - overlap
            first = np.arange(0, max(1, total - overlap), stride, dtype=np.int64)
            starts.append(first)
            lengths.append(np.minimum(window, total - first))
            sources.append(np.full(len(first), source, np.int64))
            streams.append(np.full(len(first), len(self._rows), np.int64))
            self._rows.append(members)
            self._ends.append(ends)
        empty = np.zeros(0, np.int64)
        self._starts = np.concatenate(starts) if starts else empty
        self._streams = np.concatenate(streams) if streams else empty
        self.lengths = np.concatenate(lengths) if lengths else empty
        self.source_ids = np.concatenate(sources) if sources else empty
        self.num_targets = self._count_targets()
        useful = self.num_targets > 0
        for name in ("_starts", "_streams", "lengths", "source_ids", "num_targets"):
            setattr(self, name, getattr(self, name)[useful])
        self.scores = np.zeros(len(self.lengths), np.float64)

    def _count_targets(self) -> npt.NDArray[np.int64]:
        """Targets of every window; only documents with more than a first token unlearned have to be read."""
        counts = np.zeros(len(self._starts), np.int64)
        for stream, (rows, ends) in enumerate(zip(self._rows, self._ends, strict=True)):
            untrained = self._store.lengths[rows] - self._store.num_targets[rows]
            windows = np.flatnonzero(self._streams == stream)
            if (untrained > 1).any():
                counts[windows] = [self[int(window)].num_targets for window in windows]
                continue
            first = self._starts[windows]
            begin = first + np.where(first > 0, max(1, self._overlap), 1)
            end = first + self.lengths[windows]
            document_starts = ends - self._store.lengths[rows]
            before = np.concatenate([[0], np.cumsum(untrained)])
            inside = (
                before[np.searchsorted(document_starts, end)]
                - before[np.searchsorted(document_starts, begin)]
            )
            counts[windows] = np.maximum(end - begin, 0) - inside
        return counts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        stream = int(self._streams[index])
        start = int(self._starts[index])
        end = start + int(self.lengths[index])
        ends, rows = self._ends[stream], self._rows[stream]
        first = int(np.searchsorted(ends, start, side="right"))
        pieces = []
        at = start
        for number in range(first, len(rows)):
            if at >= end:
                break
            row_start = int(ends[number - 1]) if number else 0
            packed = self._store.packed(int(rows[number]))
            pieces.append(packed[at - row_start : end - row_start])
            at = int(ends[number])
        example = unpack_tokens(np.concatenate(pieces))
        if start and self._overlap:
            example.is_target[: self._overlap] = False
        return example
