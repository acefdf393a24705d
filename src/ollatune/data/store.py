"""Tokenised examples as flat arrays, in memory or mapped from disk, and views of them that training reads from.

A token is stored as 32 bits: the id, and in the highest bit whether it is a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """What is known of n samples. Token arrays may be memory maps; the per-sample columns are read eagerly."""

    tokens: npt.NDArray[np.uint32]
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


class TokenStore:
    """n tokenised samples in one or more shards, by index."""

    def __init__(self, shards: Sequence[StoredArrays]) -> None:
        self._shards = list(shards)
        counts = [len(shard.offsets) - 1 for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

        def column(name: str, dtype: npt.DTypeLike) -> Any:
            parts = [getattr(shard, name) for shard in shards]
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        self.num_targets: npt.NDArray[np.int64] = column("num_targets", np.int64)
        self.digests: npt.NDArray[np.uint64] = column("digests", np.uint64)
        self.prompt_digests: npt.NDArray[np.uint64] = column("prompt_digests", np.uint64)
        self.source_ids: npt.NDArray[np.int64] = column("source_ids", np.int64)
        self.scores: npt.NDArray[np.float64] = column("scores", np.float64)
        self.splits: npt.NDArray[np.int64] = column("splits", np.int64)
        self.is_record_start: npt.NDArray[np.bool_] = np.concatenate(
            [np.diff(shard.ordinals, prepend=-1) != 0 for shard in shards]
            or [np.zeros(0, np.bool_)]
        )
        lengths = [np.diff(shard.offsets) for shard in shards]
        self.lengths: npt.NDArray[np.int64] = (
            np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """(shard, ordinal of the record in it) of one example."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(self._shards[shard].ordinals[index - int(self._starts[shard])])

    def packed(self, index: int) -> npt.NDArray[np.uint32]:
        """Stored tokens [T] of one sample."""
        shard_number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._shards[shard_number]
        row = index - int(self._starts[shard_number])
        return shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]

    def __getitem__(self, index: int) -> Example:
        return unpack_tokens(self.packed(index))


class ExampleSource(Protocol):
    """What batches are made of: examples by index, with the facts that ordering needs known beforehand."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...
    @property
    def num_targets(self) -> npt.NDArray[np.int64]: ...
    @property
    def source_ids(self) -> npt.NDArray[np.int64]: ...
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
        self.scores = store.scores[self.rows]

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
