"""How sure a measured value is, and whether one model is better than another on the same records. All seeded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ollatune.evaluation.metrics import Metric

NUM_RESAMPLES = 4000
SEED = 0
CONFIDENCE = 0.95
_NORMAL_QUANTILE = 1.959963984540054
"""Of CONFIDENCE, two-sided."""

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def estimate(metric: Metric, rows_RC: Rows, *, seed: int = SEED) -> Estimate:
    """The metric over the records with the percentile interval of the bootstrap (Efron 1979).

    Where every record is 0 or every record is 1 the bootstrap has no spread at all; the interval is Wilson's then.
    """
    value = metric.value(rows_RC)
    num_records = len(rows_RC)
    if num_records == 0:
        return Estimate(value, math.nan, math.nan)
    if rows_RC.shape[1] == 1 and (not rows_RC.any() or bool((rows_RC == 1.0).all())):
        return Estimate(value, *wilson_interval(int(rows_RC.sum()), num_records))
    rng = np.random.default_rng(seed)
    uniform = np.full(num_records, 1.0 / num_records)
    counts_BR = rng.multinomial(num_records, uniform, size=NUM_RESAMPLES)
    values = [metric.combine(sums, num_records) for sums in counts_BR @ rows_RC]
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927)."""
    z_squared = _NORMAL_QUANTILE**2
    share = num_successes / num_trials
    centre = share + z_squared / (2 * num_trials)
    spread = _NORMAL_QUANTILE * math.sqrt(
        share * (1 - share) / num_trials + z_squared / (4 * num_trials**2)
    )
    scale = 1 + z_squared / num_trials
    low = 0.0 if num_successes == 0 else (centre - spread) / scale
    high = 1.0 if num_successes == num_trials else (centre + spread) / scale
    return max(0.0, low), min(1.0, high)


def paired_permutation_p(
    metric: Metric, first_RC: Rows, second_RC: Rows, *, seed: int = SEED
) -> float:
    """Two-sided p of "both models are equally good": how often swapping records by chance differs as much.

    Approximate randomisation (Noreen 1989) with the +1 that keeps it valid; works for any metric, BLEU too.
    """
    num_records = len(first_RC)
    if num_records == 0:
        return 1.0
    observed = abs(metric.value(first_RC) - metric.value(second_RC))
    swapped_BR = np.random.default_rng(seed).random((NUM_RESAMPLES, num_records)) < 0.5
    moved_BC = swapped_BR @ (second_RC - first_RC)
    first_sums_BC = first_RC.sum(axis=0) + moved_BC
    second_sums_BC = second_RC.sum(axis=0) - moved_BC
    tolerance = 1e-12  # sums of floats in another order are not bit-equal
    pairs = zip(first_sums_BC, second_sums_BC, strict=True)
    gaps = [abs(metric.combine(a, num_records) - metric.combine(b, num_records)) for a, b in pairs]
    num_hits = sum(1 for gap in gaps if gap >= observed - tolerance)
    return (num_hits + 1) / (NUM_RESAMPLES + 1)


def sign_test_p(num_wins: int, num_losses: int) -> float:
    """Exact two-sided sign test; on right/wrong records this is McNemar's exact test."""
    num_trials = num_wins + num_losses
    if num_trials == 0:
        return 1.0
    few = min(num_wins, num_losses)
    tail = sum(math.comb(num_trials, k) for k in range(few + 1)) / (1 << num_trials)
    return min(1.0, 2 * tail)


def mcnemar_p(first_R: npt.NDArray[np.bool_], second_R: npt.NDArray[np.bool_]) -> float:
    """McNemar's exact two-sided p for two models that are right (True) or wrong on the same records."""
    wins = int((second_R & ~first_R).sum())
    losses = int((first_R & ~second_R).sum())
    return sign_test_p(wins, losses)


def perplexity(logprobs_T: npt.NDArray[np.floating]) -> float:
    """exp of the mean negative log-probability of the tokens that came. NaN for no tokens."""
    return math.exp(-float(np.mean(logprobs_T, dtype=np.float64))) if len(logprobs_T) else math.nan


def token_accuracy(
    logits_TV: npt.NDArray[np.floating], target_ids_T: npt.NDArray[np.int64]
) -> float:
    """The share of positions where the most probable token is the target. NaN for no positions."""
    if len(target_ids_T) == 0:
        return math.nan
    return float((logits_TV.argmax(axis=-1) == target_ids_T).mean())
