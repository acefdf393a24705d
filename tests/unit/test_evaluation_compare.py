"""Differences of distributions by hand, the bound that top tokens give, and which limits belong to a file."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base.errors import UsageError
from ollatune.evaluation.compare import (
    LIMITS_BY_FORMAT,
    Difference,
    difference,
    kl_divergence,
    limits_for,
    top_gap,
    top_kl_divergence,
)


def random_logprobs(seed: int, *shape: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=3.0, size=shape)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_kl_equals_scipy() -> None:
    first, second = np.log([0.5, 0.3, 0.2]), np.log([0.4, 0.4, 0.2])
    assert kl_divergence(first, second) == pytest.approx(0.025267153921570557)
    assert kl_divergence(first, first) == 0.0
    assert kl_divergence(first + 5, second - 3) == pytest.approx(0.025267153921570557)


def test_an_impossible_token_is_infinitely_far() -> None:
    first, second = np.array([np.log(0.5), np.log(0.5)]), np.array([0.0, -np.inf])
    assert kl_divergence(first, second) == np.inf
    assert kl_divergence(second, first) == pytest.approx(np.log(2))


def test_difference_sums_up_every_position() -> None:
    trained = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]))
    served = np.log(np.array([[0.4, 0.4, 0.2], [0.5, 0.4, 0.1]]))
    found = difference(trained, served)
    kls = [kl_divergence(t, s) for t, s in zip(trained, served, strict=True)]
    assert found.num_positions == 2
    assert found.max_kl == max(kls)
    assert found.mean_kl == pytest.approx(sum(kls) / 2)
    assert found.argmax_agreement == 0.5  # in the second position the served argmax is another
    assert found.max_logprob_difference == pytest.approx(np.log(5))


def test_improbable_tokens_do_not_count_as_a_gap() -> None:
    trained, served = np.array([[0.0, -20.0]]), np.array([[0.0, -40.0]])
    assert difference(trained, served).max_logprob_difference == 0.0
    assert top_gap(trained[0], {0: -0.25, 1: -40.0}) == 0.25


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_the_top_tokens_bound_the_divergence_from_below(seed: int, num_top: int) -> None:
    trained, served = random_logprobs(seed, 2, 30)
    ids = np.argsort(served)[::-1][:num_top]
    bound = top_kl_divergence(trained, {int(i): float(served[i]) for i in ids})
    whole = kl_divergence(trained, served)
    assert bound <= whole + 1e-9
    if num_top >= 29:
        assert bound == pytest.approx(whole, abs=1e-6)


def test_another_shape_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"\(1, 3\), served \(1, 4\)"):
        difference(np.zeros((1, 3)), np.zeros((1, 4)))


def test_limits_follow_the_coarsest_tensor() -> None:
    assert limits_for(["F32"]) is LIMITS_BY_FORMAT["f32"]
    assert limits_for(["F32", "F16"]) is LIMITS_BY_FORMAT["f16"]
    assert limits_for(["Q6_K", "F32"]) is LIMITS_BY_FORMAT["q6_k"]
    assert limits_for(["Q4_K"]) is LIMITS_BY_FORMAT["q4"]
    assert limits_for(["IQ3_S"]) is LIMITS_BY_FORMAT["lower"]
    # what stays as it was has the trained weights; only the 8-bit activations differ
    assert limits_for(["F16"], ["Q4_K", "F32"]) is LIMITS_BY_FORMAT["q8_0"]
    assert limits_for(["F16"], ["F32"]) is LIMITS_BY_FORMAT["f16"]
    assert limits_for(["Q5_0"], ["Q8_0"]) is LIMITS_BY_FORMAT["q5"]
    with pytest.raises(UsageError, match="Z9"):
        limits_for(["Z9"])


def test_coarser_formats_never_have_tighter_limits() -> None:
    limits = list(LIMITS_BY_FORMAT.values())
    for fine, coarse in itertools.pairwise(limits):
        assert fine.max_kl <= coarse.max_kl
        assert fine.mean_kl <= coarse.mean_kl
        assert fine.min_argmax_agreement >= coarse.min_argmax_agreement
        assert fine.max_tie_gap <= coarse.max_tie_gap


def test_one_disagreement_among_few_positions_is_let_pass() -> None:
    limits = LIMITS_BY_FORMAT["f16"]
    assert Difference(10, 1e-5, 1e-6, 0.9, 0.01).within(limits)
    assert not Difference(10, 1e-5, 1e-6, 0.8, 0.01).within(limits)
    assert not Difference(10, 1.0, 1e-6, 1.0, 0.01).within(limits)
    assert not Difference(10, 1e-5, 1e-2, 1.0, 0.01).within(limits)
