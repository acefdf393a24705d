"""What training cost elsewhere: perplexity on general text before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.statistics import perplexity

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")
"""Plain prose on everyday matters, written for this project."""

MAX_TOKENS = 384
NOTABLE_RATIO = 1.1
"""From here on a report says that general knowledge was lost."""

TargetLogprobs = Callable[[Sequence[int], Sequence[int]], npt.NDArray[np.floating]]
"""`function(prompt_ids, target_ids)`: the logprob of each target, [len(target_ids)]."""


@dataclass(frozen=True)
class Forgetting:
    """Perplexity on the same general text, of the base and of the tuned model."""

    base_perplexity: float
    tuned_perplexity: float

    @property
    def ratio(self) -> float:
        """Above 1: worse than before."""
        return self.tuned_perplexity / self.base_perplexity

    def __str__(self) -> str:
        is_lost = self.ratio >= NOTABLE_RATIO
        before, after = f"{self.base_perplexity:.2f} before", f"{self.tuned_perplexity:.2f} after"
        verdict = "general knowledge was lost" if is_lost else "nothing notable was forgotten"
        return f"general text: perplexity {before}, {after}: {verdict}"


def text_perplexity(
    engine: LlamaCppEngine, text: str | None = None, *, max_tokens: int = MAX_TOKENS
) -> float:
    """Perplexity of the first `max_tokens` tokens of a text, by default of GENERAL_TEXT, the first token given.

    Raises InputError for a text of fewer than two tokens.
    """
    ids = engine.tokenize(GENERAL_TEXT.read_text(encoding="utf-8") if text is None else text)
    return token_perplexity(engine.target_logprobs, ids[:max_tokens])


def token_perplexity(target_logprobs: TargetLogprobs, token_ids: Sequence[int]) -> float:
    """Perplexity of all tokens but the first. Raises InputError where there is no second."""
    if len(token_ids) < 2:
        raise InputError(
            f"A text of {len(token_ids)} tokens has no perplexity.", hint="Give a longer one."
        )
    return perplexity(target_logprobs(token_ids[:1], token_ids[1:]))
