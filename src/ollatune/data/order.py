"""The order of samples: a pure function of (seed, epoch, index), the same on any number of processes.

Nothing is stored and nothing is shuffled in memory: position `p` of the training stream is computed directly, so a
run resumes anywhere in constant time, and the state of the data is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_SMALL = 1 << 12
_ROUNDS = 6


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit integers that looks random."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return result


def make_key(*parts: int) -> np.uint64:
    """One 64-bit key out of several integers, order mattering."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        with np.errstate(over="ignore"):
            key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    result: np.uint64 = key[0]
    return result


def permute(indices: Indices, size: int, key: np.uint64) -> Indices:
    """Where a pseudo-random permutation of `range(size)` sends `indices`; each is computed on its own.

    A Feistel network over the next power of four, walked until it lands below `size`; for small sizes, where such
    a network mixes poorly, the ranks of hashed numbers.
    """
    if size <= _SMALL:
        with np.errstate(over="ignore"):
            hashed = mix(mix(np.arange(size, dtype=np.uint64) + key) ^ key)
        return np.argsort(hashed, kind="stable").astype(np.int64)[indices]
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [make_key(int(key), number) for number in range(_ROUNDS)]
    values = indices.astype(np.uint64)
    pending = np.ones(values.shape, dtype=bool)
    while pending.any():
        current = values[pending]
        left, right = current >> half_bits, current & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        values[pending] = (left << half_bits) | right
        pending = values >= np.uint64(size)
    return values.astype(np.int64)


class SampleOrder:
    """Which example stands at each position of the training stream.

    `source_ids[i]` is the source of example `i`, `repeats[s]` how often each of source s's examples comes in an
    epoch: 1 exactly once, 2 twice, 0.5 in every second epoch. `difficulty` sorts the first `num_sorted_epochs`
    epochs from easy to hard. `group_size` > 0 sorts the stream by length within windows and deals it out in groups
    of that size.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        seed: int,
        shuffle: bool = True,
        source_ids: npt.NDArray[np.integer] | None = None,
        repeats: Sequence[float] = (1.0,),
        difficulty: npt.NDArray[np.floating] | None = None,
        num_sorted_epochs: int = 1,
        lengths: npt.NDArray[np.integer] | None = None,
        group_size: int = 0,
    ) -> None:
        self._seed = seed
        self._shuffle = shuffle
        sources = np.zeros(num_examples, np.int64) if source_ids is None else source_ids
        self._members = [np.flatnonzero(sources == s) for s in range(len(repeats))]
        counts = [
            max(1, round(len(members) * repeat)) if len(members) else 0
            for members, repeat in zip(self._members, repeats, strict=True)
        ]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._counts = counts
        self._difficulty = difficulty
        self._num_sorted_epochs = num_sorted_epochs if difficulty is not None else 0
        self._sorted: tuple[int, Indices] | None = None
        self._lengths = lengths
        self._group_size = group_size if lengths is not None else 0
        self._window = group_size * _GROUPS_IN_WINDOW

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch."""
        return int(self._starts[-1])

    def samples(self, start: int, count: int) -> Indices:
        """Example indices at positions `start` to `start + count`; may run over the ends of epochs."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.epoch_size)
            here = min(count, self.epoch_size - offset)
            pieces.append(self.of_epoch(epoch, offset, here))
            start, count = start + here, count - here
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def of_epoch(self, epoch: int, offset: int, count: int) -> Indices:
        """Example indices at `offset` to `offset + count` of one epoch."""
        if epoch < self._num_sorted_epochs:
            return self._by_difficulty(epoch)[offset : offset + count]
        if not self._group_size:
            return self._plain(epoch, np.arange(offset, offset + count))
        first = offset // self._window
        last = (offset + count - 1) // self._window
        grouped = np.concatenate([self._grouped_window(epoch, w) for w in range(first, last + 1)])
        return grouped[offset - first * self._window :][:count]

    def _plain(self, epoch: int, positions: Indices) -> Indices:
        size = self.epoch_size
        slots = (
            permute(positions, size, make_key(self._seed, epoch, 1)) if self._shuffle else positions
        )
        result = np.empty(len(slots), np.int64)
        which = np.searchsorted(self._starts, slots, side="right") - 1
        for source, members in enumerate(self._members):
            chosen = which == source
            if not chosen.any():
                continue
            # A source's own stream runs on over the epochs, so a fraction of it shows other examples next time.
            place = epoch * self._counts[source] + (slots[chosen] - self._starts[source])
            rounds, inside = np.divmod(place, len(members))
            found = np.empty(len(inside), np.int64)
            for number in np.unique(rounds):
                at = rounds == number
                found[at] = (
                    permute(inside[at], len(members), make_key(self._seed, int(number), 2, source))
                    if self._shuffle
                    else inside[at]
                )
            result[chosen] = members[found]
        return result

    def _by_difficulty(self, epoch: int) -> Indices:
        if self._sorted is None or self._sorted[0] != epoch:
            assert self._difficulty is not None
            chosen = self._plain(epoch, np.arange(self.epoch_size))
            by = np.argsort(self._difficulty[chosen], kind="stable")
            self._sorted = (epoch, chosen[by])
        return self._sorted[1]

    def _grouped_window(self, epoch: int, number: int) -> Indices:
        """One window of the stream, its samples sorted by length into groups, the groups shuffled."""
        assert self._lengths is not None
        start = number * self._window
        chosen = self._plain(epoch, np.arange(start, min(start + self._window, self.epoch_size)))
        chosen = chosen[np.argsort(self._lengths[chosen], kind="stable")]
        num_groups = -(-len(chosen) // self._group_size)
        # The one group that may be short stays last, or every group after it would straddle two batches.
        num_full = len(chosen) // self._group_size
        order = permute(np.arange(num_full), num_full, make_key(self._seed, epoch, 3, number))
        groups = [*order, *range(num_full, num_groups)]
        return np.concatenate([chosen[g * self._group_size :][: self._group_size] for g in groups])


_GROUPS_IN_WINDOW = 50


def source_repeats(
    sizes: Sequence[int], weights: Sequence[float], temperature: float = 1.0
) -> list[float]:
    """How often each source's examples come in an epoch.

    At temperature 1 that is the source's weight. Otherwise the sources' shares become proportional to
    weight × size^(1/temperature) (Arivazhagan et al. 2019), the epoch keeping its size: above 1 small sources gain.
    """
    if temperature == 1.0:
        return [float(weight) for weight in weights]
    total = sum(size * weight for size, weight in zip(sizes, weights, strict=True))
    shares = [
        weight * size ** (1.0 / temperature) if size else 0.0
        for size, weight in zip(sizes, weights, strict=True)
    ]
    norm = sum(shares)
    return [
        total * share / norm / size if size else 0.0
        for share, size in zip(shares, sizes, strict=True)
    ]
