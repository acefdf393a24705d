"""Which rows train, which validate and which test; exact duplicates always stay together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ollatune.data.order import make_key, mix
from ollatune.data.sources import SPLITS, Split

UNNAMED = -1
"""Split number of a row whose file says nothing; otherwise the index in SPLITS."""

Rows = npt.NDArray[np.int64]


def split_number(split: Split | None) -> int:
    """0, 1, 2 for train, validation, test; UNNAMED for None."""
    return UNNAMED if split is None else SPLITS.index(split)


def split_rows(
    named: npt.NDArray[np.integer],
    digests: npt.NDArray[np.uint64],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[Split, Rows]:
    """Row indices of each split, ascending.

    Rows of files that are named after a split stay there. Where no file is named so, the given fraction of the
    training rows is taken, in an order that depends on each row's content and the seed alone.
    """
    found: dict[Split, Rows] = {
        "train": np.flatnonzero((named == UNNAMED) | (named == 0)),
        "validation": np.flatnonzero(named == 1),
        "test": np.flatnonzero(named == 2),
    }
    num_rows = len(found["train"])
    fractions: tuple[tuple[Split, float], ...] = (
        ("test", test_fraction),
        ("validation", validation_fraction),
    )
    for split, fraction in fractions:
        if fraction > 0 and not len(found[split]):
            taken, rest = _carve(found["train"], digests, round(num_rows * fraction), seed)
            found[split], found["train"] = taken, rest
    return found


def _carve(
    rows: Rows, digests: npt.NDArray[np.uint64], wanted: int, seed: int
) -> tuple[Rows, Rows]:
    """About `wanted` rows (at least one, never all), whole groups of duplicates at a time, and the others."""
    unique, group_of, sizes = np.unique(digests[rows], return_inverse=True, return_counts=True)
    if len(unique) < 2:
        return rows[:0], rows
    order = np.argsort(mix(unique ^ make_key(seed, 4)), kind="stable")
    num_groups = int(np.searchsorted(np.cumsum(sizes[order]), max(1, wanted), side="left")) + 1
    chosen = np.zeros(len(unique), np.bool_)
    chosen[order[: min(num_groups, len(unique) - 1)]] = True
    is_taken = chosen[group_of]
    return rows[is_taken], rows[~is_taken]


def first_of_each(digests: npt.NDArray[np.uint64]) -> Rows:
    """Rows that are the first with their content, ascending."""
    return np.sort(np.unique(digests, return_index=True)[1]).astype(np.int64)


@dataclass(frozen=True)
class Leakage:
    """Rows of one split whose content, or whose question, is also in the training split."""

    split: Split
    num_rows: int
    num_same_record: int
    num_same_prompt: int


def find_leakage(
    splits: dict[Split, Rows],
    digests: npt.NDArray[np.uint64],
    prompt_digests: npt.NDArray[np.uint64],
) -> list[Leakage]:
    """What validation and test share with the training rows."""
    train = splits["train"]
    return [
        Leakage(
            split,
            len(rows),
            int(np.isin(digests[rows], digests[train]).sum()),
            int(np.isin(prompt_digests[rows], prompt_digests[train]).sum()),
        )
        for split, rows in splits.items()
        if split != "train" and len(rows)
    ]
