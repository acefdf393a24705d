"""The frozen inputs of the speed benchmark: batches, base model and initial adapter, the same for every system."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (24, 100, 300, 512)
TARGET_SHARE = 0.4
SHARED_TOKENS = 400
NUM_QUESTIONS = 8
QUESTION_TOKENS = 32
NUM_BATCHES = 64
IGNORED = -100

CASES = ("mixed", "shared", "quarter")
"""`quarter`: the mixed lengths over four, for many steps in little time."""

Example = tuple[np.ndarray, np.ndarray]


def batches(
    count: int, text_ids: np.ndarray, *, shared: bool = False, scale: float = 1.0
) -> Iterator[list[Example]]:
    """`count` batches of (token ids [T], is_target [T]) cut out of `text_ids`. `scale` multiplies the lengths."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield _questions(generator, text_ids) if shared else _mixed(generator, text_ids, scale)


def _cut(generator: np.random.Generator, text_ids: np.ndarray, length: int) -> np.ndarray:
    start = int(generator.integers(0, max(1, len(text_ids) - length)))
    piece = text_ids[start : start + length]
    return np.resize(piece, length).astype(np.int64)


def _mixed(generator: np.random.Generator, text_ids: np.ndarray, scale: float) -> list[Example]:
    """Examples of 24 to 512 tokens, the last 40 % of each a target."""
    examples = []
    for base in LENGTHS:
        length = int(base * scale)
        is_target = np.zeros(length, dtype=bool)
        is_target[-int(TARGET_SHARE * length) :] = True
        examples.append((_cut(generator, text_ids, length), is_target))
    return examples


def _questions(generator: np.random.Generator, text_ids: np.ndarray) -> list[Example]:
    """The specification's `context`: one text of 400 tokens, eight questions about it."""
    context = _cut(generator, text_ids, SHARED_TOKENS)
    examples = []
    for _ in range(NUM_QUESTIONS):
        tokens = np.concatenate([context, _cut(generator, text_ids, QUESTION_TOKENS)])
        is_target = np.zeros(len(tokens), dtype=bool)
        is_target[-QUESTION_TOKENS // 2 :] = True
        examples.append((tokens, is_target))
    return examples


def read_frozen(folder: Path, case: str, count: int) -> list[list[Example]]:
    """The first `count` batches of a case as arrays, from the start again where they are too few."""
    found = json.loads((folder / f"{case}.json").read_text())["batches"]
    return [
        [
            (np.array(e["input_ids"]), np.array(e["labels"]) != IGNORED)
            for e in found[index % len(found)]
        ]
        for index in range(count)
    ]


def freeze(folder: Path, gguf_path: Path, text_files: list[Path]) -> None:
    """Write a JSON file for each of CASES, `base/` (Hugging Face, fp32) and `adapter/` (PEFT) below `folder`."""
    from benchmarks.peers.frozen import ALPHA, RANK

    from ollatune.gguf.reader import GGUFFile
    from ollatune.gguf.tokenizer import GGUFTokenizer
    from ollatune.modeling.load import load_base_model
    from ollatune.modeling.lora import LoRASettings, adapter_state, inject_lora
    from ollatune.modeling.peft_format import save_adapter

    with GGUFFile.open(gguf_path) as gguf:
        tokenizer = GGUFTokenizer.from_metadata(gguf.metadata)
        text = "\n".join(path.read_text() for path in text_files)
        ids = np.array(tokenizer.encode(text, add_bos=False))
        model = load_base_model(gguf)
    (folder / "base").mkdir(parents=True, exist_ok=True)
    tokenizer.save_hf(folder / "base")
    model.save_pretrained(folder / "base")
    settings = LoRASettings(RANK, float(ALPHA), 0.0)
    inject_lora(model, settings, seed=1)
    save_adapter(folder / "adapter", adapter_state(model), settings, base_name="base")
    for case in CASES:
        scale = 0.25 if case == "quarter" else 1.0
        cut = batches(NUM_BATCHES, ids, shared=case == "shared", scale=scale)
        (folder / f"{case}.json").write_text(json.dumps({"batches": _plain(cut)}))


def _plain(cut: Iterator[list[Example]]) -> list[list[dict[str, Any]]]:
    return [
        [
            {"input_ids": ids.tolist(), "labels": np.where(is_target, ids, IGNORED).tolist()}
            for ids, is_target in batch
        ]
        for batch in itertools.islice(cut, NUM_BATCHES)
    ]


def tokens_per_batch(folder: Path, case: str, per: int | None = None) -> float:
    """Tokens of the first batch of a case, over `per` (None: over its examples, so tokens per record)."""
    batch = read_frozen(folder, case, 1)[0]
    return sum(len(ids) for ids, _ in batch) / (len(batch) if per is None else per)
