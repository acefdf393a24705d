"""Filling rows of a fixed token budget with whole examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def first_fit_decreasing(
    lengths: npt.NDArray[np.integer], num_bins: int, budget: int
) -> list[list[int]] | None:
    """Places of the items in `num_bins` bins of `budget` each, longest first, or None if they do not fit so.

    An item longer than the budget takes an empty bin for itself.
    """
    room = np.full(num_bins, budget, np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        fitting = np.flatnonzero((room >= length) | ((room == budget) & (length > budget)))
        if not len(fitting):
            return None
        chosen = int(fitting[0])
        bins[chosen].append(int(item))
        room[chosen] -= length
    return bins


def fill_rows(
    take: Callable[[int], Indices],
    remaining: int,
    lengths: npt.NDArray[np.integer],
    *,
    num_rows: int,
    budget: int,
) -> list[Indices]:
    """The next samples of a stream, as many as fit into `num_rows` rows of `budget` tokens, row by row.

    `take(n)` gives the next n example indices (n ≤ `remaining`), `lengths` the tokens of every example. What is taken
    is always a beginning of the stream, so the position after it is the only state there is.
    """
    mean = max(1.0, float(lengths.mean()))
    ids = take(min(remaining, int(1.5 * num_rows * budget / mean) + 8))
    while len(ids) < remaining and lengths[ids].sum() <= num_rows * budget:
        ids = take(min(remaining, 2 * len(ids)))
    total = np.cumsum(lengths[ids])
    count = max(1, int(np.searchsorted(total, num_rows * budget, side="right")))
    while (rows := first_fit_decreasing(lengths[ids[:count]], num_rows, budget)) is None:
        count -= 1
    return [ids[np.sort(np.asarray(row, np.int64))] for row in rows if row]
