"""How much of an update survives being stored: measured, not assumed.

recovery = ⟨Q(W + Δ) − W, Δ⟩ / ‖Δ‖², where W are the base's weights as served (decoded from its bytes), Δ the update
and Q(…) what the stored bytes decode to. 1 is the whole update, 0 none of it, above 1 more than was trained. A base
that lies on a coarse grid swallows most of a small update that is rounded back onto the same grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs import dequantize
from ollatune.gguf.types import GGMLType

SMALLEST_ACCEPTED_RECOVERY = 0.9
LARGEST_ACCEPTED_RECOVERY = 1.1
"""Rounding from one grid onto another can also overshoot; what is served is then not what was trained either."""

_CHUNK_WEIGHTS = 1 << 22


def measure_recovery(
    base: Tensor, tuned: Tensor, stored_u8: Tensor, stored_type: GGMLType
) -> float | None:
    """Recovery of `tuned − base` in `stored_u8`, the encoded `tuned`; None where nothing was changed.

    `base` and `tuned` are float32 [..., columns], `stored_u8` uint8 [..., row bytes]. Works in chunks of rows.
    """
    columns = base.shape[-1]
    base_RC, tuned_RC = base.reshape(-1, columns), tuned.reshape(-1, columns)
    stored_RB = stored_u8.reshape(base_RC.shape[0], -1)
    rows_per_chunk = max(1, _CHUNK_WEIGHTS // columns)
    kept = torch.zeros((), dtype=torch.float64, device=base.device)
    whole = torch.zeros_like(kept)
    for start in range(0, base_RC.shape[0], rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        delta = (tuned_RC[rows] - base_RC[rows]).double()
        stored_change = dequantize(stored_RB[rows], stored_type).sub_(base_RC[rows]).double()
        kept += (stored_change * delta).sum()
        whole += delta.square().sum()
    return float(kept / whole) if whole > 0 else None


def is_accepted(recovery: float) -> bool:
    """Whether the stored update is the trained one, near enough."""
    return SMALLEST_ACCEPTED_RECOVERY <= recovery <= LARGEST_ACCEPTED_RECOVERY
