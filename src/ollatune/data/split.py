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
    """About `wanted` rows (at least one, never all), whole groups of duplicates at a time, and the others.

    Groups that are larger than what is still wanted are passed over, or the many copies of one record could be all of
    it; where no group is small enough, the smallest is taken.
    """
    hashed = mix(
        digests[rows] ^ make_key(seed, 4)
    )  # equal where the digests are, in no order otherwise
    groups, counts = np.unique(hashed, return_counts=True)
    if len(groups) < 2:
        return rows[:0], rows
    left = max(1, wanted)
    taken: list[int] = []
    for group, count in enumerate(counts.tolist()):
        if count <= left and len(taken) < len(groups) - 1:
            taken.append(group)
            left -= count
        if not left:
            break
    is_taken = np.isin(hashed, groups[taken or [int(counts.argmin())]])
    return rows[is_taken], rows[~is_taken]


def num_distinct(digests: npt.NDArray[np.uint64]) -> int:
    """How many different values there are."""
    ordered = np.sort(digests)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(1, len(ordered))


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
    found = [(split, rows) for split, rows in splits.items() if split != "train" and len(rows)]
    if not found:
        return []
    counts = [
        _num_shared(known, [known[rows] for _, rows in found], splits["train"])
        for known in (digests, prompt_digests)
    ]
    return [
        Leakage(split, len(rows), same_record, same_prompt)
        for (split, rows), same_record, same_prompt in zip(found, *counts, strict=True)
    ]


def _num_shared(
    digests: npt.NDArray[np.uint64], others: list[npt.NDArray[np.uint64]], train: Rows
) -> list[int]:
    """For each of `others`, how many of its values the training rows have too."""
    ordered = np.sort(digests[train])
    counts = []
    for values in others:
        places = np.minimum(np.searchsorted(ordered, values), max(0, len(ordered) - 1))
        counts.append(int(np.count_nonzero(ordered[places] == values)) if len(ordered) else 0)
    return counts
