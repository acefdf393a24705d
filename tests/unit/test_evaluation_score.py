"""Scores of answers, base against tuned, the gate on them, and perplexities."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ollatune.base.errors import InputError, UsageError, VerificationError
from ollatune.data.conversation import ChatMessage, Conversation, Document
from ollatune.evaluation.forgetting import GENERAL_TEXT, Forgetting, token_perplexity
from ollatune.evaluation.gate import Requirement, require
from ollatune.evaluation.metrics import METRICS
from ollatune.evaluation.score import (
    EvaluationItem,
    ScoreComparison,
    ScoreReport,
    compare_scores,
    evaluation_items,
    score,
    with_likelihood,
)
from ollatune.evaluation.served import ServedAnswer
from ollatune.templates import Message


class Answering:
    """A served model that says what it is told to."""

    def __init__(self, description: str, answers: Sequence[str]) -> None:
        self.description = description
        self.answers = answers
        self.asked: list[Any] = []

    def render(self, messages: Sequence[Message]) -> None:
        return None

    def tokenize(self, prompt: str) -> None:
        return None

    def answer(self, messages: Sequence[Message], **options: Any) -> ServedAnswer:
        raise AssertionError("scoring asks for many answers at a time")

    def answer_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int
    ) -> list[ServedAnswer]:
        self.asked = [list(messages) for messages in conversations]
        return [ServedAnswer(text, "stop") for text in self.answers]


ITEMS = [
    EvaluationItem((Message("user", f"q{i}"),), json.dumps({"name": f"n{i}", "order": str(i)}))
    for i in range(10)
]
TUNED = [*(item.expected for item in ITEMS[:8]), '{"name": "n8", "order": "x"}', "nothing"]
BASE = ["no idea"] * 9 + [ITEMS[9].expected]


def comparison(**options: Any) -> ScoreComparison:
    base = score(Answering("the base", BASE), ITEMS, **options)
    return compare_scores(base, score(Answering("the tuned", TUNED), ITEMS, **options))


def test_scores_are_the_means_of_the_records() -> None:
    served = Answering("the tuned", TUNED)
    report = score(served, ITEMS)
    assert served.asked == [list(item.messages) for item in ITEMS]
    assert report.estimates["exact_match"].value == 0.8
    assert report.estimates["field_accuracy"].value == pytest.approx(0.85)
    assert report.values()["exact_match.low"] < 0.8 < report.values()["exact_match.high"]


def test_the_report_is_json_with_every_answer() -> None:
    content = json.loads(json.dumps(comparison().to_dict(), allow_nan=False))
    assert content["base"]["metrics"]["exact_match"]["value"] == pytest.approx(0.1)
    assert content["tuned"]["answers"][8] == {
        "question": "q8",
        "expected": ITEMS[8].expected,
        "answer": TUNED[8],
        "finish_reason": "stop",
        "exact_match": 0.0,
        "field_accuracy": 0.5,
    }


def test_the_comparison_tells_gain_and_significance() -> None:
    found = comparison()
    assert found.values()["gain.exact_match"] == pytest.approx(0.7)
    assert found.values()["base.exact_match"] == pytest.approx(0.1)
    # McNemar: 8 records gained, 1 lost: p = 2 * (1 + 9) / 2^9
    assert found.p_values["exact_match"] == pytest.approx(20 / 512, abs=0.01)
    table = found.table().splitlines()
    assert table[0].split() == ["metric", "base", "tuned", "p"]
    assert table[1].startswith("exact_match     0.100 [")
    assert "10 records" in table[-1]
    same = score(Answering("the base", BASE), ITEMS)
    assert "(not significant)" in compare_scores(same, same).table()


def test_samples_stand_side_by_side_and_show_failures() -> None:
    text = comparison().samples(4)
    assert text.count("question") == 4
    assert "expected  " + ITEMS[8].expected in text
    assert "tuned     nothing" in text
    assert "base      no idea" in text


def test_other_records_or_metrics_are_not_compared() -> None:
    base = score(Answering("the base", BASE), ITEMS)
    fewer = score(Answering("the tuned", TUNED[:5]), ITEMS[:5])
    other = score(Answering("the tuned", TUNED), ITEMS, [METRICS["rouge_l"]])
    for report in (fewer, other):
        with pytest.raises(UsageError, match="cannot be compared: 10 records"):
            compare_scores(base, report)
    with pytest.raises(UsageError, match="no records"):
        score(Answering("the base", []), [])


def test_items_are_the_conversation_before_its_last_answer() -> None:
    turns = [
        ("system", "be kind"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    sample = Conversation(tuple(ChatMessage(role, text) for role, text in turns))
    (item,) = evaluation_items([sample])
    assert item.expected == "d"
    assert item.messages == tuple(Message(role, text) for role, text in turns[:-1])
    with pytest.raises(InputError, match="Test record 2 is plain text"):
        evaluation_items([sample, Document("text")])


@pytest.mark.parametrize(
    ("text", "requirement"),
    [
        ("exact_match>=0.7", Requirement("exact_match", ">=", 0.7)),
        (" exact_match >= 70 % ", Requirement("exact_match", ">=", 0.7)),
        ("perplexity<12", Requirement("perplexity", "<", 12.0)),
        ("exact_match.low > .5", Requirement("exact_match.low", ">", 0.5)),
        ("kl_max<=1e-3", Requirement("kl_max", "<=", 1e-3)),
        ("gain.rouge_l>-0.01", Requirement("gain.rouge_l", ">", -0.01)),
    ],
)
def test_requirements_are_read(text: str, requirement: Requirement) -> None:
    assert Requirement.parse(text) == requirement
    assert Requirement.parse(str(requirement)) == requirement


@pytest.mark.parametrize(
    "text", ["", "exact_match", "exact_match>=", "0.7<=exact_match", "a=>1", "a>1 and b>1"]
)
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Requirement.parse(text)


def test_the_gate_names_everything_that_is_missing() -> None:
    values = comparison().values()
    require(["exact_match>=0.8", "base.exact_match<0.2", "gain.exact_match>0"], values)
    with pytest.raises(VerificationError, match=r"exact_match>=0.9 required, exact_match is 0.8; "):
        require(["exact_match>=0.9", "field_accuracy>0.5", "field_accuracy>0.85"], values)
    with pytest.raises(UsageError, match=r"not measured. Did you mean `exact_match`"):
        require(["exactmatch>=0.9"], values)
    with pytest.raises(VerificationError):
        require(["perplexity<5"], {"perplexity": math.nan})


def test_perplexity_is_compared_record_by_record() -> None:
    rows = np.array([[2.0, 2], [6.0, 2], [0.0, 4]])  # nats and tokens of three records
    base = with_likelihood(score(Answering("the base", BASE), ITEMS), rows * [2.0, 1])
    tuned = with_likelihood(score(Answering("the tuned", TUNED), ITEMS), rows)
    found = compare_scores(base, tuned)
    values = found.values()
    assert values["perplexity"] == pytest.approx(math.e)  # 8 nats over 8 tokens
    assert values["base.perplexity"] == pytest.approx(math.e**2)
    assert (values["loss"], values["base.loss"]) == (pytest.approx(1.0), pytest.approx(2.0))
    assert values["perplexity.low"] < math.e < values["perplexity.high"]
    assert 0.2 < found.p_values["perplexity"] <= 1.0  # three records prove nothing
    assert "perplexity" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_that_only_reads_has_its_perplexity() -> None:
    def report(nats: float) -> ScoreReport:
        return with_likelihood(ScoreReport("m", (), (), (), {}), np.array([[nats, 10.0]] * 20))

    found = compare_scores(report(30.0), report(10.0))
    assert found.values()["gain.perplexity"] == pytest.approx(math.e - math.e**3)
    assert "20 records" in found.table()
    assert found.samples() == ""
    assert json.loads(json.dumps(found.to_dict()))["tuned"]["records"] == 20


def test_forgetting_is_said_where_it_is_notable() -> None:
    assert "nothing notable" in str(Forgetting(20.0, 20.5))
    assert "was lost" in str(Forgetting(20.0, 30.0))
    assert Forgetting(20.0, 30.0).ratio == 1.5


def test_perplexity_leaves_the_first_token_out() -> None:
    def target_logprobs(prompt_ids: Sequence[int], target_ids: Sequence[int]) -> np.ndarray:
        assert (prompt_ids, target_ids) == ([5], [6, 7])
        return np.log(np.array([0.5, 0.125]))

    assert token_perplexity(target_logprobs, [5, 6, 7]) == pytest.approx(4.0)
    with pytest.raises(InputError, match="1 tokens"):
        token_perplexity(target_logprobs, [5])
    assert len(GENERAL_TEXT.read_text(encoding="utf-8").split()) > 300
