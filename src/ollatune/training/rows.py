"""From the data's micro-batches to the rows the model computes on."""

from __future__ import annotations

import torch

from ollatune.data.batching import IGNORED, Batch
from ollatune.modeling.fast.forward import PackedRow


def row_of(batch: Batch) -> PackedRow:
    """A packed batch without the last token of each example: nothing is predicted from it."""
    assert batch.cu_seqlens_N is not None, "rows are made of packed batches"
    borders = batch.cu_seqlens_N.to(torch.int64)
    lengths = (borders[1:] - borders[:-1] - 1).tolist()
    keep_T = torch.ones(batch.input_ids_BT.shape[1], dtype=torch.bool)
    keep_T[borders[1:] - 1] = False
    targets_T = batch.target_ids_BT[0, keep_T]
    positions_N = (targets_T != IGNORED).nonzero()[:, 0]
    return PackedRow(
        batch.input_ids_BT[0, keep_T],
        batch.position_ids_BT[0, keep_T],
        [length for length in lengths if length > 0],
        positions_N,
        targets_T[positions_N],
    )
