"""Answers of a served model on held-out records, scored; the base beside the tuned model on the same records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.text import printable
from ollatune.data.conversation import Conversation, Sample
from ollatune.evaluation.metrics import PERPLEXITY, Metric, default_metrics
from ollatune.evaluation.served import ServedAnswer, ServedModel
from ollatune.evaluation.statistics import Estimate, Rows, estimate, paired_permutation_p
from ollatune.templates import Message

MAX_ANSWER_TOKENS = 256
SIGNIFICANCE_LEVEL = 0.05
_SAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class EvaluationItem:
    """A question, as the conversation up to the answer, and the expected answer."""

    messages: tuple[Message, ...]
    expected: str


def evaluation_items(samples: Iterable[Sample]) -> list[EvaluationItem]:
    """One item per conversation: its last answer is the expected one. Raises InputError for plain text."""
    items = []
    for number, sample in enumerate(samples, start=1):
        if not isinstance(sample, Conversation):
            raise InputError(
                f"Test record {number} is plain text: it has no question to answer.",
                hint="Score answers on instruction or chat records; for text, measure its perplexity.",
            )
        turns = sample.messages
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        messages = tuple(
            Message(
                turn.role,
                turn.content,
                turn.thinking,
                turn.tool_calls,
                turn.tool_name,
                turn.tool_call_id,
            )
            for turn in turns[:last]
        )
        items.append(EvaluationItem(messages, turns[last].content))
    return items


@dataclass(frozen=True)
class ScoreReport:
    """One model's answers and what they are worth. `likelihood` has the rows of `metrics.PERPLEXITY`, `extra` what
    was measured otherwise."""

    model: str
    items: tuple[EvaluationItem, ...]
    answers: tuple[ServedAnswer, ...]
    metrics: tuple[Metric, ...]
    rows: Mapping[str, Rows] = field(repr=False)
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    likelihood: Rows | None = field(default=None, repr=False)
    seconds: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        """Questions asked; of a model that only reads, texts read."""
        return len(self.items) if self.items or self.likelihood is None else len(self.likelihood)

    def values(self) -> dict[str, float]:
        """Every number by name, for a gate: `exact_match`, `exact_match.low`, `exact_match.high`, …"""
        values = dict(self.extra)
        for name, found in self.estimates.items():
            values |= {name: found.value, f"{name}.low": found.low, f"{name}.high": found.high}
        return values

    def to_dict(self, *, with_answers: bool = True) -> dict[str, Any]:
        """As JSON: metrics with intervals, and each answer with its per-record values."""
        content: dict[str, Any] = {
            "model": self.model,
            "records": self.num_records,
            "seconds": round(self.seconds, 3),
            "metrics": {name: _finite(asdict(found)) for name, found in self.estimates.items()},
            **_finite(self.extra),
        }
        if with_answers:
            content["answers"] = [
                {
                    "question": item.messages[-1].content,
                    "expected": item.expected,
                    "answer": answer.text,
                    "finish_reason": answer.finish_reason,
                    **{m.name: m.value(self.rows[m.name][i : i + 1]) for m in self.metrics},
                }
                for i, (item, answer) in enumerate(zip(self.items, self.answers, strict=True))
            ]
        return content


def score(
    served: ServedModel,
    items: Sequence[EvaluationItem],
    metrics: Sequence[Metric] | None = None,
    *,
    max_tokens: int = MAX_ANSWER_TOKENS,
    extra: Mapping[str, float] | None = None,
) -> ScoreReport:
    """Ask every question greedily and measure the answers; metrics default to what suits the expected answers.

    Raises UsageError for no records, InputError where a metric does not suit them, and what the server raises.
    """
    if not items:
        raise UsageError("Nothing to score: the test data has no records.")
    expected = [item.expected for item in items]
    chosen = tuple(metrics if metrics is not None else default_metrics(expected))
    started = time.monotonic()
    answers = served.answer_many([item.messages for item in items], max_tokens=max_tokens)
    seconds = time.monotonic() - started
    texts = [answer.text for answer in answers]
    rows = {metric.name: metric.rows(texts, expected) for metric in chosen}
    return ScoreReport(
        model=served.description,
        items=tuple(items),
        answers=tuple(answers),
        metrics=chosen,
        rows=rows,
        estimates={metric.name: estimate(metric, rows[metric.name]) for metric in chosen},
        seconds=seconds,
        extra=dict(extra or {}),
    )


def with_likelihood(report: ScoreReport, rows_RC: Rows) -> ScoreReport:
    """`report` with perplexity and loss from the rows of `metrics.PERPLEXITY` of some of its records."""
    found = estimate(PERPLEXITY, rows_RC)
    return replace(
        report, likelihood=rows_RC,
        estimates={**report.estimates, PERPLEXITY.name: found},
        extra={**report.extra, "loss": math.log(found.value)},
    )  # fmt: skip


@dataclass(frozen=True)
class ScoreComparison:
    """Base against tuned on the same records; `p_values` by metric, of "both are equally good"."""

    base: ScoreReport
    tuned: ScoreReport
    p_values: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """The tuned model's numbers by name, the base's with `base.` before, differences with `gain.`."""
        tuned, base = self.tuned.values(), self.base.values()
        gains = {
            f"gain.{name}": tuned[name] - base[name]
            for name in tuned
            if name in base and "." not in name
        }
        return tuned | {f"base.{name}": value for name, value in base.items()} | gains

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "base": self.base.to_dict(),
            "tuned": self.tuned.to_dict(),
            "p_values": dict(self.p_values),
        }

    def table(self) -> str:
        """A metric a line: base and tuned with 95 % intervals, and p."""
        rows = [("metric", "base", "tuned", "p")]
        for name, tuned in self.tuned.estimates.items():
            p_value = self.p_values[name]
            mark = "" if p_value < SIGNIFICANCE_LEVEL else " (not significant)"
            rows.append(
                (name, _shown(self.base.estimates[name]), _shown(tuned), f"{p_value:.2g}{mark}")
            )
        for name, value in self.tuned.extra.items():
            if name in self.base.extra:
                rows.append((name, f"{self.base.extra[name]:.3f}", f"{value:.3f}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(
            [*lines, f"{self.tuned.num_records} records, 95 % intervals; {self.tuned.model}"]
        )

    def samples(self, num_samples: int = 4) -> str:
        """Questions with the expected, the base's and the tuned model's answer; half of them wrong where some are."""
        if not self.tuned.metrics:
            return ""
        first = self.tuned.metrics[0]
        is_right = [first.value(row[None]) >= 1 for row in self.tuned.rows[first.name]]
        wrong = [i for i, right in enumerate(is_right) if not right][: num_samples // 2]
        right = [i for i, right in enumerate(is_right) if right][: num_samples - len(wrong)]
        blocks = []
        for index in sorted(wrong + right):
            item = self.tuned.items[index]
            parts = (
                ("question", item.messages[-1].content), ("expected", item.expected),
                ("base", self.base.answers[index].text), ("tuned", self.tuned.answers[index].text),
            )  # fmt: skip
            blocks.append("\n".join(_labelled(label, text) for label, text in parts))
        return "\n\n".join(blocks)


def compare_scores(base: ScoreReport, tuned: ScoreReport) -> ScoreComparison:
    """Put two reports side by side. Raises UsageError unless records and metrics are the same."""
    if base.items != tuned.items or base.estimates.keys() != tuned.estimates.keys():
        raise UsageError(
            f"These reports cannot be compared: {len(base.items)} records with {', '.join(base.estimates)} against "
            f"{len(tuned.items)} records with {', '.join(tuned.estimates)}.",
            hint="Score both models on the same records with the same metrics.",
        )
    p_values = {
        metric.name: paired_permutation_p(metric, base.rows[metric.name], tuned.rows[metric.name])
        for metric in tuned.metrics
    }
    if base.likelihood is not None and tuned.likelihood is not None:
        p_values[PERPLEXITY.name] = paired_permutation_p(
            PERPLEXITY, base.likelihood, tuned.likelihood
        )
    return ScoreComparison(base, tuned, p_values)


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _labelled(label: str, text: str) -> str:
    indent = "\n" + " " * 10
    return f"{label:<9} " + printable(text, limit=_SAMPLE_CHARACTERS).replace("\n", indent)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: it becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
