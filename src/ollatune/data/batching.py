"""Micro-batches: examples put end to end in one row, or padded to a rectangle. T tokens, B examples, N segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ollatune.data.store import Example

IGNORED = -100
"""Target id of positions that do not count in the loss (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Targets are already aligned: position t is to predict `target_ids[t]`.

    Packed: `input_ids_BT` is [1, T], `position_ids_BT` restarts at every example, `cu_seqlens_N` holds the N+1
    borders, and nothing is padded; attention must not cross a border. Padded: one example per row, `cu_seqlens_N`
    is None, `attention_mask_BT` says what is real.
    """

    input_ids_BT: torch.Tensor  # int64
    target_ids_BT: torch.Tensor  # int64, IGNORED where nothing is learned
    position_ids_BT: torch.Tensor  # int64
    attention_mask_BT: torch.Tensor | None  # bool, padded form only
    cu_seqlens_N: torch.Tensor | None  # int32, packed form only
    max_seqlen: int
    num_target_tokens: int
    num_tokens: int
    """Real tokens, padding not counted."""
    sample_ids: tuple[int, ...] = ()
    position_after: int = 0
    """Samples of the training stream consumed once the step this batch belongs to is done."""

    @property
    def num_examples(self) -> int:
        return len(self.sample_ids)


def _aligned_targets(example: Example) -> np.ndarray:
    """[T]: at t the id of token t+1 if that is a target; the last position predicts nothing."""
    targets = np.full(len(example), IGNORED, np.int64)
    targets[:-1] = np.where(example.is_target[1:], example.token_ids[1:], IGNORED)
    return targets


def packed_batch(
    examples: Sequence[Example], *, sample_ids: Sequence[int] = (), position_after: int = 0
) -> Batch:
    """All examples in one row, without padding."""
    lengths = [len(example) for example in examples]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    targets = np.concatenate([_aligned_targets(example) for example in examples])
    return Batch(
        input_ids_BT=torch.from_numpy(
            np.concatenate([e.token_ids for e in examples]).astype(np.int64)
        )[None],
        target_ids_BT=torch.from_numpy(targets)[None],
        position_ids_BT=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        attention_mask_BT=None,
        cu_seqlens_N=torch.from_numpy(borders),
        max_seqlen=max(lengths),
        num_target_tokens=int((targets != IGNORED).sum()),
        num_tokens=int(borders[-1]),
        sample_ids=tuple(int(i) for i in sample_ids),
        position_after=position_after,
    )


def padded_batch(
    examples: Sequence[Example],
    *,
    pad_id: int = 0,
    pad_left: bool = False,
    multiple_of: int = 1,
    sample_ids: Sequence[int] = (),
    position_after: int = 0,
) -> Batch:
    """One example per row, filled up with `pad_id` to the longest. What is padding is known by length, never by id."""
    width = -(-max(len(example) for example in examples) // multiple_of) * multiple_of
    shape = (len(examples), width)
    ids = np.full(shape, pad_id, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    is_real = np.zeros(shape, np.bool_)
    for row, example in enumerate(examples):
        place = slice(width - len(example), width) if pad_left else slice(0, len(example))
        ids[row, place] = example.token_ids
        targets[row, place] = _aligned_targets(example)
        positions[row, place] = np.arange(len(example))
        is_real[row, place] = True
    return Batch(
        input_ids_BT=torch.from_numpy(ids),
        target_ids_BT=torch.from_numpy(targets),
        position_ids_BT=torch.from_numpy(positions),
        attention_mask_BT=torch.from_numpy(is_real),
        cu_seqlens_N=None,
        max_seqlen=width,
        num_target_tokens=int((targets != IGNORED).sum()),
        num_tokens=int(is_real.sum()),
        sample_ids=tuple(int(i) for i in sample_ids),
        position_after=position_after,
    )
