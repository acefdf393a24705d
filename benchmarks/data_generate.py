"""Records like those of instruction data: English prose, log-normal lengths, rare names, some text beyond ASCII."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

_SYLLABLES = ("ta", "ri", "mo", "len", "ver", "sha", "ing", "pro", "con", "er", "ma", "tion", "s")
_NUM_NAMES = 200_000
_NAME_SHARE = 0.03
_NON_ASCII_SHARE = 0.1
_LONGEST = 3000


def _names(rng: np.random.Generator) -> list[str]:
    """Words that are met now and then: names made up of syllables, and numbers."""
    counts = rng.integers(1, 5, _NUM_NAMES)
    picks = rng.integers(0, len(_SYLLABLES), int(counts.sum()))
    names, at = [], 0
    for number, count in enumerate(counts):
        name = "".join(_SYLLABLES[i] for i in picks[at : at + count]).capitalize()
        names.append(str(number) if number % 4 == 0 else name)
        at += count
    return names


def generate(
    path: Path, size_bytes: int, *, words: int = 150, sigma: float = 0.8, seed: int = 0
) -> int:
    """Write instruction records of `size_bytes` in all, of `words` words at the median; returns how many.

    The prose is Python's own documentation, which every installation has, from random places on.
    """
    rng = np.random.default_rng(seed)
    names = _names(rng)
    prose = " ".join(topics[name] for name in sorted(topics)).split(" ")
    prose = [word for word in prose if word]
    written = count = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size_bytes:
            lengths = np.clip(rng.lognormal(np.log(words), sigma, 4096), 6, _LONGEST).astype(int)
            starts = rng.integers(0, len(prose) - _LONGEST, len(lengths))
            has_dash = rng.random(len(lengths)) < _NON_ASCII_SHARE
            for length, start, dash in zip(lengths, starts, has_dash, strict=True):
                text = prose[start : start + length]
                for place in rng.integers(0, length, int(length * _NAME_SHARE) + 1):
                    text[place] = names[int(rng.integers(0, _NUM_NAMES))]
                cut, end = length // 8, length // 2
                record = {
                    "instruction": f"{count}: " + " ".join(text[:cut]),
                    "context": " ".join(text[cut:end]) + (" – " if dash else ""),
                    "response": " ".join(text[end:]) + ".",
                }
                line = json.dumps(record, ensure_ascii=False) + "\n"
                written += len(line) + 2 * dash
                stream.write(line)
                count += 1
                if written >= size_bytes:
                    break
    return count
