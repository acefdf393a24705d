"""Rows as trees of segments: examples that begin alike share the tokens they begin with.

A row is T tokens in segments. A segment continues its parent: it attends to the parent's tokens, the parent's parent's
and so on, and to itself causally. Without sharing every segment is a root. The number of computed tokens falls, the
loss and every gradient stay what they are (each shared token's gradient is the sum over the examples that use it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_SHARED_TOKENS = 12
"""Shorter common beginnings are not worth a segment of their own."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """`length` tokens of a row from `start` on; `ancestors` are (start, length) of the tokens before, in order."""

    start: int
    length: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def depth(self) -> int:
        """Position of the segment's first token in its example."""
        return sum(length for _, length in self.ancestors)

    @property
    def key_ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of everything the segment's last token attends to."""
        return (*self.ancestors, (self.start, self.length))


@dataclass(frozen=True)
class Tree:
    """Examples laid out in one row.

    Attributes:
        segments: in row order.
        token_ids, position_ids: [T] of the row.
        places: for each example, the row index of each of its tokens.
    """

    segments: list[Segment]
    token_ids: Tokens
    position_ids: Tokens
    places: list[Tokens]


class SegmentTable:
    """The segments of a row as arrays, for compiled code; made once per row.

    Segments of one tree stand together, the largest tree first, so that work shared out in order is even.
    """

    def __init__(self, segments: list[Segment]) -> None:
        trees: dict[int, list[Segment]] = {}
        for segment in segments:
            root = segment.ancestors[0][0] if segment.ancestors else segment.start
            trees.setdefault(root, []).append(segment)
        ordered = sorted(trees.values(), key=lambda tree: -sum(s.length for s in tree))
        flat = [segment for tree in ordered for segment in tree]
        self.segments = segments
        self.num_units = len(ordered)
        ranges = [r for segment in flat for r in segment.ancestors]
        position = np.empty(sum(s.length for s in flat), np.int32)
        for segment in flat:
            end = segment.start + segment.length
            position[segment.start : end] = np.arange(segment.length) + segment.depth
        self._arrays = [
            np.cumsum([0, *(len(tree) for tree in ordered)], dtype=np.int32),
            np.array([s.start for s in flat], np.int32),
            np.array([s.length for s in flat], np.int32),
            np.cumsum([0, *(len(s.ancestors) for s in flat)], dtype=np.int32),
            np.array([start for start, _ in ranges], np.int32),
            np.array([length for _, length in ranges], np.int32),
            position,
        ]
        self.pointers = [array.ctypes.data for array in self._arrays]
        """Addresses of unit_at, start, length, range_at, range_start, range_length and position (all int32)."""


def lay_out(examples: Sequence[Tokens], *, share: bool) -> Tree:
    """Put examples (token ids, each at least one) into one row, common beginnings once if `share`."""
    if share and len(examples) > 1:
        return _shared(examples)
    lengths = [len(example) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Tree(
        [Segment(int(s), n) for s, n in zip(starts[:-1], lengths, strict=True)],
        np.concatenate(examples),
        np.concatenate([np.arange(n) for n in lengths]),
        [np.arange(s, s + n) for s, n in zip(starts[:-1], lengths, strict=True)],
    )


def _shared(examples: Sequence[Tokens]) -> Tree:
    segments: list[Segment] = []
    ids: list[Tokens] = []
    positions: list[Tokens] = []
    places: list[list[Tokens]] = [[] for _ in examples]
    size = 0

    def emit(
        members: list[int], begin: int, end: int, ancestors: tuple[tuple[int, int], ...]
    ) -> None:
        """Lay out tokens [begin, end) of `members`, which agree on them, as one segment."""
        nonlocal size
        length = end - begin
        segments.append(Segment(size, length, ancestors))
        ids.append(examples[members[0]][begin:end])
        positions.append(np.arange(begin, end))
        for member in members:
            places[member].append(np.arange(size, size + length))
        size += length

    def place(members: list[int], begin: int, ancestors: tuple[tuple[int, int], ...]) -> None:
        for group, end in _groups(examples, members, begin):
            if end == begin:
                continue  # the example ends where its prefix does
            start = size
            emit(group, begin, end, ancestors)
            if len(group) > 1:
                place(group, end, (*ancestors, (start, end - begin)))

    place(list(range(len(examples))), 0, ())
    return Tree(
        segments,
        np.concatenate(ids),
        np.concatenate(positions),
        [np.concatenate(parts) for parts in places],
    )


def _groups(
    examples: Sequence[Tokens], members: list[int], begin: int
) -> list[tuple[list[int], int]]:
    """Members that go on alike from `begin`, with where they part; one alone goes to its end.

    Sorted by their tokens, examples with a long common beginning stand side by side.
    """
    order = sorted(members, key=lambda m: examples[m][begin:].tolist())
    groups: list[tuple[list[int], int]] = []
    current, common = [order[0]], len(examples[order[0]])
    for member in order[1:]:
        agreed = begin + _common_length(
            examples[current[-1]][begin:common], examples[member][begin:]
        )
        if agreed - begin >= MIN_SHARED_TOKENS:
            current.append(member)
            common = agreed
        else:
            groups.append((current, common))
            current, common = [member], len(examples[member])
    groups.append((current, common))
    return groups


def _common_length(first: Tokens, second: Tokens) -> int:
    size = min(len(first), len(second))
    differing = np.flatnonzero(first[:size] != second[:size])
    return int(differing[0]) if len(differing) else size
