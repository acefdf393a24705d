"""Metrics of an answer against the expected one: exact, by JSON field, by overlap, by choice, by your own function.

A metric turns each record into a row of numbers that may be added up, and the sums into one value. Means and corpus
BLEU have the same form so, and resampling records is a matrix product (`statistics`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError, UsageError
from ollatune.base.text import did_you_mean, printable

_MAX_NGRAM = 4
_MAX_LOSS = 700.0  # its exponential is still a number
_WORD = re.compile(r"[^\W_]+")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_NOT_JSON = object()


@dataclass(frozen=True)
class Metric:
    """`measure(answer, expected)` gives one record's row; `combine(column sums, number of records)` the value."""

    name: str
    measure: Callable[[str, str], Sequence[float]]
    combine: Callable[[npt.NDArray[np.float64], int], float]

    def rows(self, answers: Sequence[str], expected: Sequence[str]) -> npt.NDArray[np.float64]:
        """float64[records, columns]."""
        pairs = zip(answers, expected, strict=True)
        return np.asarray([self.measure(a, e) for a, e in pairs], dtype=np.float64)

    def value(self, rows_RC: npt.NDArray[np.float64]) -> float:
        """The metric over all rows; NaN where there are none."""
        return self.combine(rows_RC.sum(axis=0), len(rows_RC)) if len(rows_RC) else math.nan


def normalise(text: str) -> str:
    """NFC, outer blanks off, every run of blanks one blank: what a reader would call the same text."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(answer: str, expected: str) -> float:
    """1 where the answer is the expected one: as JSON values where that is a JSON object or list, else as text."""
    wanted = _json(expected)
    if isinstance(wanted, dict | list):
        given = _json(answer)
        return float(given is not _NOT_JSON and _canonical(given) == _canonical(wanted))
    return float(normalise(answer) == normalise(expected))


def field_accuracy(answer: str, expected: str) -> float:
    """The share of the expected object's fields that the answer has with the same value; 0 where it is no object.

    Raises InputError where the expected answer is no JSON object with fields.
    """
    wanted, given = _json(expected), _json(answer)
    if not isinstance(wanted, dict) or not wanted:
        raise InputError(
            f"field_accuracy needs a JSON object as the expected answer, found {printable(expected, limit=80)!r}.",
            hint="Use exact_match or rouge_l for answers in plain text.",
        )
    if not isinstance(given, dict):
        return 0.0
    same = [key in given and _canonical(given[key]) == _canonical(wanted[key]) for key in wanted]
    return sum(same) / len(same)


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L F1 (Lin 2004): longest common subsequence of lower-case words, no stemming."""
    given, wanted = (_WORD.findall(text.lower()) for text in (answer, expected))
    common = _longest_common_subsequence(given, wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def choice_accuracy(answer: str, expected: str) -> float:
    """1 where the answer names the expected choice: its first line begins with it, case and marks aside.

    "B", "(b)", "B: because …" and "Answer: B" all choose "B"; "Because" does not.
    """
    first_line = answer.strip().splitlines()[0] if answer.strip() else ""
    given = [word.casefold() for word in _WORD.findall(first_line)]
    wanted = [word.casefold() for word in _WORD.findall(expected)]
    if given[:1] in (["answer"], ["label"]) and wanted[:1] != given[:1]:
        given = given[1:]
    return float(bool(wanted) and given[: len(wanted)] == wanted)


def bleu_counts(answer: str, expected: str) -> list[float]:
    """One record's part of corpus BLEU: matches of 1- to 4-grams, their numbers in the answer, and both lengths."""
    given, wanted = (_WORD_OR_MARK.findall(text) for text in (answer, expected))
    matches, totals = [], []
    for size in range(1, _MAX_NGRAM + 1):
        given_counts, wanted_counts = _ngrams(given, size), _ngrams(wanted, size)
        matches.append(float((given_counts & wanted_counts).total()))
        totals.append(float(given_counts.total()))
    return [*matches, *totals, float(len(given)), float(len(wanted))]


def bleu_of_counts(sums: npt.NDArray[np.float64], _num_records: int = 0) -> float:
    """Corpus BLEU (Papineni 2002) as a share of 1, unsmoothed: 0 where no 4-gram matches."""
    matches, totals = sums[:_MAX_NGRAM], sums[_MAX_NGRAM : 2 * _MAX_NGRAM]
    given_length, wanted_length = sums[-2:]
    if not matches.all():
        return 0.0
    precision = float(np.exp(np.log(matches / totals).mean()))
    return precision * math.exp(min(0.0, 1.0 - wanted_length / given_length))


def mean_metric(name: str, measure: Callable[[str, str], float]) -> Metric:
    """A metric that is the mean of a number per record."""
    return Metric(name, lambda a, e: (measure(a, e),), lambda sums, count: float(sums[0]) / count)


METRICS = {
    "exact_match": mean_metric("exact_match", exact_match),
    "field_accuracy": mean_metric("field_accuracy", field_accuracy),
    "rouge_l": mean_metric("rouge_l", rouge_l),
    "bleu": Metric("bleu", bleu_counts, bleu_of_counts),
    "choice_accuracy": mean_metric("choice_accuracy", choice_accuracy),
}
"""The metrics known by name."""


def _no_answers(answer: str, expected: str) -> Sequence[float]:
    raise UsageError("Perplexity is measured on tokens, not on answers.")


PERPLEXITY = Metric(
    "perplexity", _no_answers, lambda sums, _: math.exp(min(_MAX_LOSS, sums[0] / max(1.0, sums[1])))
)
"""Its rows are a record's sum of negative logprobs in nats, and its number of target tokens."""


def find_metric(name: str) -> Metric:
    """A metric by its name, or `path/to/file.py:function` for your own. Raises UsageError."""
    if ":" in name:
        return load_user_metric(name)
    if name not in METRICS:
        raise UsageError(
            f"There is no metric `{name}`.{did_you_mean(name, METRICS)}",
            hint=f"Metrics: {', '.join(METRICS)}, or path/to/file.py:function.",
        )
    return METRICS[name]


def default_metrics(expected: Sequence[str]) -> list[Metric]:
    """What suits the expected answers: exact match, and fields where all are JSON objects, else ROUGE-L."""
    objects = [isinstance(value := _json(text), dict) and bool(value) for text in expected]
    second = "field_accuracy" if objects and all(objects) else "rouge_l"
    return [METRICS["exact_match"], METRICS[second]]


def load_user_metric(reference: str) -> Metric:
    """`path/to/file.py:function`, called as `function(answer, expected)`, as a metric that is the mean of its numbers.

    The file is run. Raises UsageError where there is no such function, InputError where it fails or gives no number.
    """
    file_name, _, function_name = reference.rpartition(":")
    path = Path(file_name)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(
            f"There is no Python file {file_name or reference}.",
            hint="A metric of your own is given as path/to/file.py:function.",
        )
    spec = importlib.util.spec_from_file_location(f"ollatune_metric_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"{path} has no function `{function_name}`.{did_you_mean(function_name, functions)}"
        )
    return mean_metric(function_name, _checked(function, reference))


def _checked(function: Callable[[str, str], Any], reference: str) -> Callable[[str, str], float]:
    def measure(answer: str, expected: str) -> float:
        given = (
            f"answer {printable(answer, limit=80)!r}, expected {printable(expected, limit=80)!r}"
        )
        try:
            value = function(answer, expected)
        except Exception as error:  # whatever the user's function does
            raise InputError(
                f"{reference} failed with {type(error).__name__}: {error} ({given})."
            ) from error
        if not isinstance(value, bool | int | float | np.number) or not math.isfinite(value):
            raise InputError(f"{reference} returned {value!r}, expected a finite number ({given}).")
        return float(value)

    return measure


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _canonical(value: Any) -> str:
    """Equal for equal JSON values: key order does not count, 1 and 1.0 are one number, true is not 1."""
    return json.dumps(_integral(value), sort_keys=True, ensure_ascii=False)


def _integral(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def _ngrams(tokens: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for index, other in enumerate(right, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
