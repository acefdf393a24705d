"""Collecting rendered samples into the arrays of a store."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ollatune.data.conversation import Sample
from ollatune.data.render import Rendered
from ollatune.data.report import RenderCounts
from ollatune.data.store import StoredArrays, pack_tokens

_COLUMN_TYPES = {
    "lengths": "q",
    "num_targets": "q",
    "digests": "Q",
    "prompt_digests": "Q",
    "source_ids": "q",
    "scores": "d",
    "splits": "b",
    "ordinals": "q",
}
"""Type codes of `array.array`: these columns of a large file would be gigabytes as Python numbers."""

WriteTokens = Callable[[npt.NDArray[np.uint32]], object]


class StoreBuilder:
    """Appends samples; token arrays are kept, or handed to `write_tokens` as they come."""

    def __init__(self, write_tokens: WriteTokens | None = None) -> None:
        self._tokens: list[npt.NDArray[np.uint32]] = []
        self._write = write_tokens or self._tokens.append
        self._columns: dict[str, array[Any]] = {
            name: array(code) for name, code in _COLUMN_TYPES.items()
        }
        self.counts = RenderCounts()

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def add(
        self,
        sample: Sample,
        rendered: Sequence[Rendered],
        *,
        source_id: int,
        split: int,
        ordinal: int,
    ) -> None:
        """Append the examples of one sample; `ordinal` is its number among the good records read."""
        digest, prompt_digest = sample.digest(), sample.prompt_digest()
        counts = self.counts
        for item in rendered:
            example = item.example
            self._write(pack_tokens(example.token_ids, example.is_target))
            row = (
                len(example),
                int(np.count_nonzero(example.is_target)),
                digest,
                prompt_digest,
                source_id,
                sample.score,
                split,
                ordinal,
            )
            for column, value in zip(self._columns.values(), row, strict=True):
                column.append(value)
            counts.num_truncated += item.is_truncated
            counts.num_answers_cut += item.is_answer_cut
            counts.num_tokens_cut += item.num_tokens_before - len(example)
            counts.longest_before = max(counts.longest_before, item.num_tokens_before)
            counts.num_ends += item.num_ends
            counts.num_early_ends += item.num_early_ends
            counts.num_hidden_system += item.hidden.system
            counts.num_hidden_turns += item.hidden.turns
            counts.num_hidden_thinking += item.hidden.thinking

    def columns(self) -> dict[str, npt.NDArray[np.generic]]:
        """All columns but the tokens."""
        return {name: np.array(column) for name, column in self._columns.items()}

    def arrays(self) -> StoredArrays:
        """Everything, where the tokens were kept."""
        tokens = np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.uint32)
        return stored_arrays(tokens, self.columns())


def stored_arrays(
    tokens: npt.NDArray[np.uint32] | Path, columns: dict[str, npt.NDArray[np.generic]]
) -> StoredArrays:
    """Arrays of a store from tokens and the columns of a builder."""
    offsets = np.concatenate([[0], np.cumsum(columns["lengths"], dtype=np.int64)]).astype(np.int64)
    return StoredArrays(
        tokens=tokens,
        offsets=offsets,
        num_targets=columns["num_targets"].astype(np.int64),
        digests=columns["digests"].astype(np.uint64),
        prompt_digests=columns["prompt_digests"].astype(np.uint64),
        source_ids=columns["source_ids"].astype(np.int64),
        scores=columns["scores"].astype(np.float64),
        splits=columns["splits"].astype(np.int64),
        ordinals=columns["ordinals"].astype(np.int64),
    )
