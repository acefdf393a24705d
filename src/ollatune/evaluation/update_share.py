"""How much of what was trained is served, measured along the way from the base to the trained model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ollatune.evaluation.align import by_id
from ollatune.evaluation.observe import Observation, TrainedModel


@dataclass(frozen=True)
class UpdateShare:
    """Where the served model lies, seen from the base towards the trained one, over the served top tokens' logprobs.

    `share`: how much of the way it went; `alignment`: the cosine between its change and the trained one; `size`: the
    length of its change over that of the trained one.
    """

    share: float
    alignment: float
    size: float


def update_share(trained: TrainedModel, observations: Iterable[Observation]) -> UpdateShare | None:
    """Measure it at every compared position; None where training changed nothing there, or nothing was compared."""
    assert trained.base_logprobs is not None
    along, trained_square, served_square = 0.0, 0.0, 0.0
    for seen in observations:
        if not seen.kls:
            continue
        tuned_PV = trained.logprobs(seen.trained_ids, seen.positions)
        base_PV = trained.base_logprobs(seen.trained_ids, seen.positions)
        for tuned_V, base_V, token in zip(tuned_PV, base_PV, seen.served_tokens, strict=True):
            top = by_id(trained.tokenizer, tuned_V, token)
            ids = list(top)
            change = _centred(tuned_V[ids] - base_V[ids])
            served_change = _centred(np.fromiter(top.values(), np.float64) - base_V[ids])
            along += float(change @ served_change)
            trained_square += float(change @ change)
            served_square += float(served_change @ served_change)
    if trained_square == 0.0:
        return None
    alignment = along / (trained_square * served_square) ** 0.5 if served_square else 0.0
    return UpdateShare(along / trained_square, alignment, (served_square / trained_square) ** 0.5)


def _centred(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Without the mean: logits are known up to a constant only."""
    exact = values.astype(np.float64)
    return exact - (exact.mean() if len(exact) else 0.0)
