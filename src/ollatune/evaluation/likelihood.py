"""How probable the expected answers, or held-out texts, are to a model: loss and perplexity, record by record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.score import EvaluationItem
from ollatune.evaluation.served import LlamaCppServed
from ollatune.evaluation.statistics import Rows

MAX_TEXT_TOKENS = 512

LogprobsFunction = Callable[[Sequence[int], Sequence[int]], npt.NDArray[np.floating]]
"""`function(token_ids, positions)`: logprobs [len(positions), vocabulary] of the token after each of the positions."""


@dataclass(frozen=True)
class Target:
    """A record as tokens: what is given, BOS included, and what is to come."""

    given: tuple[int, ...]
    targets: tuple[int, ...]


def answer_targets(
    served: LlamaCppServed, items: Sequence[EvaluationItem], *, end_text: str = ""
) -> list[Target]:
    """Each prompt as it is served, and the expected answer with `end_text` (the trained end of turn) after it."""
    return [
        Target(
            tuple(served.tokenize(served.render(item.messages))),
            tuple(served.engine.tokenize(item.expected + end_text, add_special=False)),
        )
        for item in items
    ]


def text_targets(
    engine: LlamaCppEngine, texts: Sequence[str], *, max_tokens: int = MAX_TEXT_TOKENS
) -> list[Target]:
    """The first `max_tokens` tokens of each text, the first of them given. Texts of fewer than two are left out.

    Raises InputError where none is left.
    """
    ids = [engine.tokenize(text)[:max_tokens] for text in texts]
    targets = [Target(tuple(one[:1]), tuple(one[1:])) for one in ids if len(one) > 1]
    if not targets:
        raise InputError("No held-out text has two tokens.", hint="Give longer ones with --data.")
    return targets


def served_rows(engine: LlamaCppEngine, targets: Sequence[Target]) -> Rows:
    """float64[records, 2] of metrics.PERPLEXITY, as llama.cpp serves the model."""
    return _rows(targets, lambda one: engine.target_logprobs(one.given, one.targets))


def trained_rows(logprobs: LogprobsFunction, targets: Sequence[Target]) -> Rows:
    """float64[records, 2] of metrics.PERPLEXITY, as the trainer computes."""

    def of(one: Target) -> npt.NDArray[np.floating]:
        ids = [*one.given, *one.targets]
        rows_TV = logprobs(ids, range(len(one.given) - 1, len(ids) - 1))
        found: npt.NDArray[np.floating] = rows_TV[np.arange(len(one.targets)), list(one.targets)]
        return found

    return _rows(targets, of)


def _rows(
    targets: Sequence[Target], logprobs: Callable[[Target], npt.NDArray[np.floating]]
) -> Rows:
    return np.asarray(
        [[-float(logprobs(one).sum(dtype=np.float64)), len(one.targets)] for one in targets],
        dtype=np.float64,
    ).reshape(-1, 2)
