"""Metrics and statistics against values by hand and from sacrebleu, rouge-score and SciPy (noted where used)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollatune.base.errors import InputError, UsageError
from ollatune.evaluation.metrics import (
    METRICS,
    choice_accuracy,
    default_metrics,
    exact_match,
    field_accuracy,
    find_metric,
    rouge_l,
)
from ollatune.evaluation.statistics import (
    estimate,
    mcnemar_p,
    paired_permutation_p,
    perplexity,
    sign_test_p,
    token_accuracy,
    wilson_interval,
)

ANSWERS = [
    "the cat is on the mat today",
    "a dog runs in the big park near us",
    "order 12 was sent, then lost.",
]
EXPECTED = [
    "the cat sat on the mat today",
    "the dog runs in the big park",
    "order 12 was sent and then lost.",
]


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0),
        ('{"a": 1} and more', '{"a": 1}', 0),
        ("[1, 2]", "[2, 1]", 0),
        ("not JSON", '{"a": 1}', 0),
        ("  Paris \n", "Paris", 1),
        ("one  two", "one\ntwo", 1),
        ("paris", "Paris", 0),
        ("1.0", "1", 0),  # a bare number is text: 1.0 is not what was asked for
        ("Zoe\u0308", "Zo\u00eb", 1),
        ("[" * 100_000, "[]", 0),
    ],
)
def test_exact_match(answer: str, expected: str, value: float) -> None:
    assert exact_match(answer, expected) == value


def test_field_accuracy_is_the_share_of_expected_fields() -> None:
    expected = json.dumps({"name": "Ada", "order": "7", "product": "lamp", "issue": "late"})
    answer = json.dumps({"name": "Ada", "order": 7, "product": "lamp", "other": 1})
    assert field_accuracy(answer, expected) == 0.5
    assert field_accuracy(expected, expected) == 1.0
    assert field_accuracy("[]", expected) == field_accuracy("no", expected) == 0.0
    with pytest.raises(InputError, match=r"needs a JSON object .* 'plain'"):
        field_accuracy("{}", "plain")


def test_rouge_l_equals_rouge_score() -> None:
    values = [rouge_l(a, e) for a, e in zip(ANSWERS, EXPECTED, strict=True)]
    assert values == pytest.approx([6 / 7, 0.75, 0.923076923076923])
    assert rouge_l("", "a") == rouge_l("a", "") == 0.0


def test_bleu_equals_sacrebleu() -> None:
    bleu = METRICS["bleu"]
    assert bleu.value(bleu.rows(ANSWERS, EXPECTED)) == pytest.approx(0.5445966461527925)
    assert bleu.value(bleu.rows(["a b c"], ["a b c"])) == 0.0  # no 4-gram at all
    assert bleu.value(bleu.rows([""], ["a"])) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("B", "B", 1),
        ("(b).", "B", 1),
        ("Answer: B\nbecause", "B", 1),
        ("B: it is blue", "B", 1),
        ("Because", "B", 0),
        ("not delivered, sorry", "Not delivered", 1),
        ("delivered", "not delivered", 0),
        ("", "B", 0),
    ],
)
def test_choice_accuracy(answer: str, expected: str, value: float) -> None:
    assert choice_accuracy(answer, expected) == value


@given(st.text(max_size=60), st.text(max_size=60))
def test_every_metric_of_any_text_is_a_share_and_one_for_itself(left: str, right: str) -> None:
    for name in ("exact_match", "rouge_l", "bleu", "choice_accuracy"):
        metric = METRICS[name]
        assert 0 <= metric.value(metric.rows([left], [right])) <= 1
    assert exact_match(left, left) == 1


def test_metrics_are_found_by_name_and_chosen_by_the_answers() -> None:
    assert find_metric("bleu") is METRICS["bleu"]
    with pytest.raises(UsageError, match="Did you mean `exact_match`"):
        find_metric("exactmatch")
    assert [m.name for m in default_metrics(['{"a": 1}'] * 2)] == ["exact_match", "field_accuracy"]
    assert [m.name for m in default_metrics(['{"a": 1}', "x"])] == ["exact_match", "rouge_l"]
    assert [m.name for m in default_metrics([])] == ["exact_match", "rouge_l"]


def test_a_function_of_the_users_is_a_metric(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def same_length(answer, expected):\n    return len(answer) == len(expected)\n"
        "def text(answer, expected):\n    return 'good'\n"
        "def broken(answer, expected):\n    return 1 / 0\n"
    )
    metric = find_metric(f"{file}:same_length")
    assert metric.name == "same_length"
    assert metric.value(metric.rows(["ab", "a"], ["xy", "xy"])) == 0.5
    for name, message in (("text", "returned 'good'"), ("broken", "ZeroDivisionError")):
        with pytest.raises(InputError, match=message):
            find_metric(f"{file}:{name}").rows(["a"], ["b"])
    with pytest.raises(UsageError, match=r"no function `same_lenght`. Did you mean `same_length`"):
        find_metric(f"{file}:same_lenght")
    with pytest.raises(UsageError, match="no Python file"):
        find_metric(f"{tmp_path}/absent.py:f")
    file.write_text("raise RuntimeError('no')")
    with pytest.raises(UsageError, match="RuntimeError: no"):
        find_metric(f"{file}:same_length")


def test_intervals_hold_the_value_and_repeat() -> None:
    metric = METRICS["exact_match"]
    rows = np.array([[1.0]] * 46 + [[0.0]] * 14)
    found = estimate(metric, rows)
    assert found == estimate(metric, rows)
    assert found.value == pytest.approx(46 / 60)
    # of 60 records the bootstrap is near Wilson's interval, which SciPy gives as 0.6456 to 0.8556
    assert (found.low, found.high) == pytest.approx((0.65, 0.867), abs=0.02)
    assert wilson_interval(46, 60) == pytest.approx((0.6456372962239804, 0.8556043826335716))


def test_no_spread_at_all_is_still_no_certainty() -> None:
    none_right = estimate(METRICS["exact_match"], np.zeros((60, 1)))
    assert (none_right.low, none_right.high) == pytest.approx((0.0, 0.06017185214208986))  # SciPy
    all_right = estimate(METRICS["exact_match"], np.ones((60, 1)))
    assert (all_right.low, all_right.high) == pytest.approx((1 - 0.06017185214208986, 1.0))


def test_bleu_is_resampled_as_a_whole() -> None:
    bleu = METRICS["bleu"]
    found = estimate(bleu, bleu.rows(ANSWERS, EXPECTED))
    assert found.low < found.value < found.high


def test_exact_tests_equal_scipy() -> None:
    assert sign_test_p(3, 12) == sign_test_p(12, 3) == pytest.approx(0.03515625)
    assert sign_test_p(7, 3) == pytest.approx(0.34375)
    assert sign_test_p(5, 5) == sign_test_p(0, 0) == 1.0
    first = np.array([True, True, False, False, False])
    second = np.array([True, False, True, True, True])
    assert mcnemar_p(first, second) == sign_test_p(3, 1)


def test_permutation_p_is_small_for_a_difference_and_not_for_none() -> None:
    metric = METRICS["exact_match"]
    wrong, right = np.zeros((12, 1)), np.ones((12, 1))
    # by hand: 2 of the 2^12 swaps reach the observed difference
    assert paired_permutation_p(metric, wrong, right) == pytest.approx(2 / 2**12, abs=1e-3)
    assert paired_permutation_p(metric, wrong, wrong) == 1.0
    mixed = np.array([[1.0], [0.0]] * 6)
    assert paired_permutation_p(metric, mixed, mixed[::-1]) == 1.0


def test_perplexity_and_token_accuracy() -> None:
    assert perplexity(np.log(np.array([0.5, 0.125]))) == pytest.approx(4.0)
    assert np.isnan(perplexity(np.array([])))
    logits = np.array([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    assert token_accuracy(logits, np.array([1, 1, 1])) == pytest.approx(2 / 3)
