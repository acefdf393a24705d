"""From the data's micro-batches to the rows the model computes on."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from ollatune.data.batching import IGNORED, Batch
from ollatune.modeling.fast.forward import PackedRow
from ollatune.modeling.fast.segments import lay_out


def row_of(batch: Batch, *, share: bool = False) -> PackedRow:
    """A packed batch without what nothing is predicted from: tokens after an example's last target's predecessor.

    `share` computes common beginnings of its examples once.
    """
    assert batch.cu_seqlens_N is not None, "rows are made of packed batches"
    borders = batch.cu_seqlens_N.tolist()
    ids, targets = batch.input_ids_BT[0].numpy(), batch.target_ids_BT[0].numpy()
    kept, predicted = [], []
    for start, end in itertools.pairwise(borders):
        places = np.flatnonzero(targets[start:end] != IGNORED)
        if len(places):
            kept.append(ids[start : start + places[-1] + 1])
            predicted.append((places, targets[start + places]))
    if not kept:  # a placeholder, computed for the sake of other processes
        kept, predicted = [ids[:1]], [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    tree = lay_out(kept, share=share)
    positions_N = np.concatenate(
        [place[where] for place, (where, _) in zip(tree.places, predicted, strict=True)]
    )
    return PackedRow(
        torch.from_numpy(tree.token_ids),
        torch.from_numpy(tree.position_ids),
        tree.segments,
        torch.from_numpy(positions_N),
        torch.from_numpy(np.concatenate([wanted for _, wanted in predicted])),
        sum(len(example) for example in kept),
    )
