"""Two next-token distributions side by side, and how far apart is still the same model.

KL is KL(trained ‖ served) in nats per position. Where the server shows only its most probable tokens, all others are
one event: the value is then a lower bound of the true KL, close to it because the rest holds little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import UsageError

Logprobs = npt.NDArray[np.floating]

MIN_COMPARED_LOGPROB = -12.0
"""Less probable tokens are left out of the largest difference: they are noise, and never sampled."""

_MAX_REST_LOGPROB = -1e-12


@dataclass(frozen=True)
class Limits:
    """The largest difference that the number format explains.

    `max_tie_gap`: at a token where greedy answers part, by how much in logprob the trained model may prefer its own.
    """

    max_kl: float
    mean_kl: float
    min_argmax_agreement: float
    max_tie_gap: float


LIMITS_BY_FORMAT = {
    "f32": Limits(1e-5, 1e-6, 0.99, 0.01),
    "f16": Limits(1e-3, 1e-4, 0.97, 0.1),
    "bf16": Limits(2e-2, 4e-3, 0.95, 0.3),
    "q8_0": Limits(0.3, 0.02, 0.9, 1.0),
    "q6_k": Limits(0.7, 0.05, 0.88, 1.5),
    "q5": Limits(4.0, 0.3, 0.75, 3.0),
    "q4": Limits(4.0, 0.3, 0.75, 3.0),
    "lower": Limits(8.0, 0.8, 0.6, 5.0),
}
"""From coarse to fine in reverse; docs/evaluation.md has the measured values behind them."""

_FORMATS = tuple(LIMITS_BY_FORMAT)


def limits_for(written_types: Iterable[str], kept_types: Iterable[str] = ()) -> Limits:
    """The limits for a file whose tuned tensors are stored as `written_types`, the others, unchanged, as `kept_types`.

    A kept tensor has the very weights that were trained with, but llama.cpp rounds what is multiplied with any
    quantised tensor to 8 bits, so no file that has one is compared more strictly than Q8_0.
    """
    formats = [_format_of(name) for name in written_types]
    kept = [_format_of(name) for name in kept_types]
    formats += [min(name, "q8_0", key=_FORMATS.index) for name in kept]
    return LIMITS_BY_FORMAT[max(formats, key=_FORMATS.index, default="f32")]


def _format_of(type_name: str) -> str:
    name = type_name.lower()
    if name in LIMITS_BY_FORMAT:
        return name
    if name.startswith("q8"):
        return "q8_0"
    if name.startswith(("q5", "q4")):
        return name[:2]
    if name.startswith(("iq4", "mxfp4", "nvfp4")):
        return "q4"
    if name.startswith(("q2", "q3", "iq", "tq", "q1")):
        return "lower"
    raise UsageError(f"There are no limits for tensors of type {type_name!r}.")


@dataclass(frozen=True)
class Difference:
    """Trained against served over a number of positions; `mean_kl` and the others are over them all."""

    num_positions: int
    max_kl: float
    mean_kl: float
    argmax_agreement: float
    max_logprob_difference: float

    def within(self, limits: Limits) -> bool:
        """Whether the format explains it. Of few positions each may be the odd one, so one disagreement is let pass."""
        num_disagreeing = round((1 - self.argmax_agreement) * self.num_positions)
        allowed = max(1.0, (1 - limits.min_argmax_agreement) * self.num_positions)
        return (
            self.max_kl <= limits.max_kl
            and self.mean_kl <= limits.mean_kl
            and num_disagreeing <= allowed
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def difference(trained_NV: Logprobs, served_NV: Logprobs) -> Difference:
    """Compare whole distributions, logprobs [positions, vocabulary] each."""
    if trained_NV.shape != served_NV.shape:
        raise UsageError(
            f"Distributions of different shape: trained {trained_NV.shape}, served {served_NV.shape}."
        )
    kls = [kl_divergence(t, s) for t, s in zip(trained_NV, served_NV, strict=True)]
    same = [int(t.argmax()) == int(s.argmax()) for t, s in zip(trained_NV, served_NV, strict=True)]
    compared = trained_NV > MIN_COMPARED_LOGPROB
    gaps = np.abs(trained_NV[compared].astype(np.float64) - served_NV[compared])
    return summary(kls, same, [float(gaps.max(initial=0.0))])


def summary(
    kls: Sequence[float], is_same_argmax: Sequence[bool], gaps: Sequence[float]
) -> Difference:
    """One Difference from what was measured at each position."""
    if not kls:
        return Difference(0, float("nan"), float("nan"), float("nan"), float("nan"))
    return Difference(
        num_positions=len(kls),
        max_kl=max(kls),
        mean_kl=float(np.mean(kls)),
        argmax_agreement=float(np.mean(is_same_argmax)),
        max_logprob_difference=max(gaps),
    )


def kl_divergence(first_V: Logprobs, second_V: Logprobs) -> float:
    """KL(first ‖ second) in nats of two logprob vectors, in float64, each normalised first."""
    first, second = _normalised(first_V), _normalised(second_V)
    is_possible = np.isfinite(first)
    with np.errstate(invalid="ignore"):
        terms = np.exp(first[is_possible]) * (first[is_possible] - second[is_possible])
    return max(0.0, float(terms.sum()))


def top_kl_divergence(trained_V: Logprobs, served_top: Mapping[int, float]) -> float:
    """KL of the served top tokens by id, every other token being one event: a lower bound of `kl_divergence`."""
    trained = _normalised(trained_V)
    ids = np.fromiter(served_top, np.int64, len(served_top))
    served = np.fromiter(served_top.values(), np.float64, len(served_top))
    if len(ids) == len(trained):
        whole = np.empty_like(trained)
        whole[ids] = served
        return kl_divergence(trained, whole)
    rest_mask = np.ones(len(trained), dtype=bool)
    rest_mask[ids] = False
    trained_rest = np.log(np.exp(trained[rest_mask]).sum() or np.finfo(np.float64).tiny)
    served_rest = np.log(-np.expm1(min(_MAX_REST_LOGPROB, np.log(np.exp(served).sum()))))
    pairs = zip([*trained[ids], trained_rest], [*served, served_rest], strict=True)
    return max(0.0, float(sum(np.exp(t) * (t - s) for t, s in pairs)))


def top_gap(trained_V: Logprobs, served_top: Mapping[int, float]) -> float:
    """The largest |Δ logprob| among the served top tokens that are not improbable."""
    gaps = [
        abs(float(trained_V[token]) - logprob)
        for token, logprob in served_top.items()
        if max(logprob, float(trained_V[token])) > MIN_COMPARED_LOGPROB
    ]
    return max(gaps, default=0.0)


def _normalised(logprobs_V: Logprobs) -> npt.NDArray[np.float64]:
    exact = logprobs_V.astype(np.float64)
    top = exact.max()
    normalised: npt.NDArray[np.float64] = exact - (top + np.log(np.exp(exact - top).sum()))
    return normalised
