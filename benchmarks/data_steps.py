"""The measured steps of data.py, each run in a process of its own: prints one JSON object."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ollatune.config.schema import DataConfig
from ollatune.data.dataset import load_dataset
from ollatune.data.order import SampleOrder
from ollatune.data.records import RecordReader
from ollatune.data.sources import iter_records
from ollatune.modeling.base import resolve_base
from ollatune.modeling.opened import renderer_parts

BASE = "embedded:smollm2-135m"
MAX_LENGTH = 2048
BATCH_SIZE = 8
MAX_STEPS = 4000


def rates(seconds: float, num_rows: int, path: Path) -> dict[str, float]:
    num_bytes = path.stat().st_size
    return {
        "seconds": round(seconds, 2),
        "rows": num_rows,
        "rows_per_second": round(num_rows / seconds),
        "mb_per_second": round(num_bytes / 1e6 / seconds, 1),
    }


def read(path: Path) -> dict[str, Any]:
    """Read and validate every record."""
    reader = RecordReader()
    started = time.perf_counter()
    num_rows = sum(1 for record in iter_records(path) if reader(record))
    return rates(time.perf_counter() - started, num_rows, path)


def cache(path: Path, cache: Path, workers: int) -> dict[str, Any]:
    """What a training run does with its data: the cache, then examples in training order."""
    # Not above: worker processes import this file again, and this brings torch.
    from ollatune.data.loader import BatchLoader, LoaderSettings

    source = resolve_base(BASE)
    started = time.perf_counter()
    splits = load_dataset(
        DataConfig(), *renderer_parts(source), make_parts=partial(renderer_parts, source),
        max_length=MAX_LENGTH, path=path, cache_folder=cache, num_workers=workers,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    statistics = splits.report.splits.values()
    num_tokens = sum(split.num_tokens for split in statistics)
    train = splits.train
    order = SampleOrder(len(train), seed=0)
    picked = order.samples(len(train) // 2, 4000)
    started = time.perf_counter()
    for index in picked:
        _ = train[int(index)].num_targets
    access = time.perf_counter() - started
    settings = LoaderSettings(batch_size=1, accumulation_steps=8, token_budget=2 * MAX_LENGTH)
    filled, num_steps = 0, 0
    for step in BatchLoader(train, order, settings).steps(num_epochs=1):
        if step.is_epoch_end or num_steps == MAX_STEPS:
            break
        filled += step.num_tokens
        num_steps += 1
    return {
        **rates(seconds, sum(split.num_records for split in statistics), path),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds),
        "random_examples_per_second": round(len(picked) / access),
        "padding_of_random_batches": padding_share(train, 0),
        "padding_of_length_groups": padding_share(train, BATCH_SIZE),
        "packing_efficiency": round(filled / max(1, num_steps * 8 * 2 * MAX_LENGTH), 4),
    }


def padding_share(examples: Any, group_size: int) -> float:
    """Share of positions that would be padding in batches of eight."""
    order = SampleOrder(len(examples), seed=0, lengths=examples.lengths, group_size=group_size)
    count = min(len(examples) // BATCH_SIZE, MAX_STEPS) * BATCH_SIZE
    lengths = examples.lengths[order.samples(0, count)].reshape(-1, BATCH_SIZE)
    positions = int(lengths.max(axis=1).sum()) * BATCH_SIZE
    return round(1 - int(lengths.sum()) / positions, 4)


def datasets(path: Path, cache: Path, workers: int) -> dict[str, Any]:
    """The same ids and masks through `datasets.map`, in batches; nothing where it is not installed."""
    try:
        import datasets as library
    except ImportError:
        return {}
    from transformers import AutoTokenizer

    library.disable_progress_bars()
    tokenizer, template = renderer_parts(resolve_base(BASE))
    cache.mkdir()
    tokenizer.save_hf(cache / "tokenizer", template.text)
    started = time.perf_counter()
    loaded = library.load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
    read_seconds = time.perf_counter() - started
    mapped = loaded.map(
        _Tokenise(AutoTokenizer.from_pretrained(cache / "tokenizer")), batched=True,
        num_proc=workers, remove_columns=loaded.column_names,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    num_tokens = sum(len(ids) for batch in mapped.iter(1000) for ids in batch["input_ids"])
    return {
        **rates(seconds, len(mapped), path),
        "read_seconds": round(read_seconds, 2),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds),
        "version": library.__version__,
    }


class _Tokenise:
    """What a user of `datasets` would write: the chat template, prompt and answer tokenised, a mask."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, Any]:
        conversations = [
            [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
            for instruction, context in zip(batch["instruction"], batch["context"], strict=True)
        ]
        prompts = self.tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
        answers = [f"{response}<|im_end|>\n" for response in batch["response"]]
        encoded = [
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)[
                "input_ids"
            ]
            for texts in (prompts, answers)
        ]
        pairs = list(zip(*encoded, strict=True))
        return {
            "input_ids": [(prompt + answer)[-MAX_LENGTH:] for prompt, answer in pairs],
            "mask": [
                ([False] * len(prompt) + [True] * len(answer))[-MAX_LENGTH:]
                for prompt, answer in pairs
            ],
        }


def main() -> None:
    step, arguments = sys.argv[1], json.loads(sys.argv[2])
    known = {
        name: Path(value) if isinstance(value, str) else value for name, value in arguments.items()
    }
    print(json.dumps({"read": read, "cache": cache, "datasets": datasets}[step](**known)))


if __name__ == "__main__":
    main()
