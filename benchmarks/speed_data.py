"""The batches of the speed benchmark: examples of 24 to 512 tokens, 40 % targets; or one context with questions."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import numpy as np

LENGTHS = (24, 100, 300, 512)
TARGET_SHARE = 0.4
VOCABULARY = 49152
SHARED_TOKENS = 400
NUM_QUESTIONS = 8
QUESTION_TOKENS = 32

Example = tuple[np.ndarray, np.ndarray]


def batches(count: int, *, shared: bool = False, scale: float = 1.0) -> Iterator[list[Example]]:
    """`count` batches of (token ids [T], is_target [T]); the same for every system. `scale` multiplies the lengths."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield _questions(generator) if shared else _mixed(generator, scale)


def _mixed(generator: np.random.Generator, scale: float) -> list[Example]:
    examples = []
    for base in LENGTHS:
        length = int(base * scale)
        is_target = np.zeros(length, dtype=bool)
        is_target[-int(TARGET_SHARE * length) :] = True
        examples.append((generator.integers(0, VOCABULARY, length), is_target))
    return examples


def _questions(generator: np.random.Generator) -> list[Example]:
    """The specification's `context`: one text of 400 tokens, eight questions about it."""
    context = generator.integers(0, VOCABULARY, SHARED_TOKENS)
    examples = []
    for _ in range(NUM_QUESTIONS):
        tokens = np.concatenate([context, generator.integers(0, VOCABULARY, QUESTION_TOKENS)])
        is_target = np.zeros(len(tokens), dtype=bool)
        is_target[-QUESTION_TOKENS // 2 :] = True
        examples.append((tokens, is_target))
    return examples


def summary(seconds: list[float], losses: list[float], tokens: int) -> dict[str, float]:
    """What every system reports: median and best speed over its steps, peak memory, the last loss."""
    ordered = sorted(seconds)
    return {
        "tokens_per_second": round(tokens / ordered[len(ordered) // 2], 2),
        "best_tokens_per_second": round(tokens / ordered[0], 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "loss": losses[-1],
    }
