"""Data: reading and validating, tokenising into the cache, memory, packing - and the same with `datasets` if installed.

python benchmarks/data.py --json                     # 100 MB of generated JSON Lines
python benchmarks/data.py --size-mb 5000 --json      # larger than memory should matter
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ollatune.config.schema import DataConfig
from ollatune.data.cache import load_cached
from ollatune.data.order import SampleOrder
from ollatune.data.records import RecordReader
from ollatune.data.sources import iter_records
from ollatune.modeling.base import resolve_base
from ollatune.modeling.opened import renderer_parts

MAX_LENGTH = 2048
WORDS_PER_RECORD = 110  # the median; lengths are log-normal, as those of instruction data are


def generate(path: Path, size_bytes: int, seed: int = 0) -> int:
    """Write instruction records of about `size_bytes` in all; returns how many."""
    rng = np.random.default_rng(seed)
    syllables = [
        "ta",
        "ri",
        "mo",
        "len",
        "ver",
        "sha",
        "ing",
        "pro",
        "con",
        "er",
        "ma",
        "tion",
        "s",
    ]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)]
    ranks = rng.zipf(1.3, 1 << 20) % len(words)
    written = count = 0
    with path.open("w") as stream:
        while written < size_bytes:
            length = int(np.clip(rng.lognormal(np.log(WORDS_PER_RECORD), 0.8), 6, 3000))
            at = int(rng.integers(0, len(ranks) - length))
            text = [words[rank] for rank in ranks[at : at + length]]
            cut, end = length // 8, length // 2
            record = {
                "instruction": f"{count}: " + " ".join(text[:cut]),
                "context": " ".join(text[cut:end]),
                "response": " ".join(text[end:]) + ".",
            }
            written += stream.write(json.dumps(record) + "\n")
            count += 1
    return count


class PeakMemory:
    """Samples the resident memory of this process and its children together."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stopped.wait(0.1):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    # Pages of the mapped cache can be dropped at any time: they are the system's, not ours.
                    info = process.memory_info()
                    total += info.rss - getattr(info, "shared", 0)
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def rates(seconds: float, num_rows: int, num_bytes: int) -> dict[str, float]:
    return {
        "seconds": round(seconds, 2),
        "rows_per_second": round(num_rows / seconds),
        "mb_per_second": round(num_bytes / 1e6 / seconds, 1),
    }


def read_and_validate(path: Path) -> int:
    reader = RecordReader()
    return sum(1 for record in iter_records(path) if reader(record))


def measure_cache(path: Path, folder: Path, workers: int) -> dict[str, Any]:
    source = resolve_base("embedded:smollm2-135m")
    tokenizer, template = renderer_parts(source)

    def build() -> Any:
        return load_cached(
            DataConfig(), tokenizer, template, make_parts=partial(renderer_parts, source),
            cache_folder=folder, max_length=MAX_LENGTH, path=path, num_workers=workers,
        )  # fmt: skip

    with PeakMemory() as memory:
        seconds, splits = timed(build)
    again, _ = timed(build)
    num_tokens = sum(split.num_tokens for split in splits.report.splits.values())
    num_rows = sum(split.num_records for split in splits.report.splits.values())
    order = SampleOrder(len(splits.train), seed=0)
    picked = order.samples(0, 2000)
    access, _ = timed(lambda: [splits.train[int(i)] for i in picked])
    return {
        **rates(seconds, num_rows, path.stat().st_size),
        "tokens_per_second": round(num_tokens / seconds),
        "workers": workers,
        "peak_memory_mb": round(memory.peak_bytes / 1e6),
        "reopen_seconds": round(again, 2),
        "random_examples_per_second": round(len(picked) / access),
        **measure_batches(splits.train),
    }


def measure_batches(examples: Any) -> dict[str, float]:
    """Share of positions that are padding, and how full rows of a fixed token budget get."""
    # Not above: worker processes import this file again, and this brings torch.
    from ollatune.data.loader import BatchLoader, LoaderSettings

    def padding(group_size: int) -> float:
        order = SampleOrder(len(examples), seed=0, lengths=examples.lengths, group_size=group_size)
        settings = LoaderSettings(batch_size=8, is_packed=False)
        ids = [
            step.sample_ids for step in BatchLoader(examples, order, settings).steps(num_epochs=1)
        ]
        real = sum(int(examples.lengths[i].sum()) for i in ids)
        padded = sum(len(i) * int(examples.lengths[i].max()) for i in ids)
        return 1 - real / padded

    order = SampleOrder(len(examples), seed=0)
    budget = LoaderSettings(batch_size=1, accumulation_steps=8, token_budget=2 * MAX_LENGTH)
    steps = list(BatchLoader(examples, order, budget).steps(num_epochs=1))[:-1]
    filled = sum(step.num_tokens for step in steps)
    found = {
        "padding_random_batches_of_8": round(padding(0), 4),
        "padding_length_groups_of_8": round(padding(8), 4),
    }
    if steps:
        found["packing_efficiency"] = round(filled / (len(steps) * 8 * 2 * MAX_LENGTH), 4)
    return found


def measure_datasets(path: Path, workers: int) -> dict[str, Any] | None:
    """The same rendering and tokenising through `datasets.map`; None where it is not installed."""
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=path.parent) as cache, PeakMemory() as memory:
        read, loaded = timed(
            lambda: datasets.load_dataset(
                "json", data_files=str(path), cache_dir=cache, split="train"
            )
        )
        source = resolve_base("embedded:smollm2-135m")
        seconds, _ = timed(
            lambda: loaded.map(
                _DatasetsRow(source), num_proc=workers, remove_columns=loaded.column_names
            )
        )
    return {
        **rates(read + seconds, len(loaded), path.stat().st_size),
        "read": rates(read, len(loaded), path.stat().st_size),
        "peak_memory_mb": round(memory.peak_bytes / 1e6),
        "version": datasets.__version__,
    }


class _DatasetsRow:
    """What a user of `datasets` would write: template, tokenizer, mask."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.parts: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "parts": None}

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        from ollatune.templates.messages import Message

        if self.parts is None:
            self.parts = renderer_parts(self.source)
        tokenizer, template = self.parts
        question = "\n\n".join(part for part in (row["instruction"], row["context"]) if part)
        messages = [Message("user", question), Message("assistant", row["response"])]
        segments = template.render_training(messages)
        ids: list[int] = []
        mask: list[bool] = []
        for segment, found in zip(
            segments, tokenizer.encode_segments([s.text for s in segments]), strict=True
        ):
            ids += found
            mask += [segment.is_target] * len(found)
        return {"input_ids": ids[:MAX_LENGTH], "mask": mask[:MAX_LENGTH]}


def measure(size_mb: int, workers: int, folder: Path) -> Iterator[tuple[str, Any]]:
    path = folder / "data.jsonl"
    num_rows = generate(path, size_mb * 1_000_000)
    num_bytes = path.stat().st_size
    yield "data", {"rows": num_rows, "mb": round(num_bytes / 1e6)}
    seconds, count = timed(lambda: read_and_validate(path))
    assert count == num_rows
    yield "read_and_validate", rates(seconds, num_rows, num_bytes)
    ours = measure_cache(path, folder / "cache", workers)
    yield "tokenise_and_cache", ours
    theirs = measure_datasets(path, workers)
    yield "datasets", theirs
    if theirs:
        yield "speed_against_datasets", round(theirs["seconds"] / ours["seconds"], 2)
    order = SampleOrder(10_000_000, seed=0)
    yield (
        "resume_at_99_percent_of_10m_seconds",
        round(timed(lambda: order.samples(9_900_000, 64))[0], 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=int, default=100)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--folder", type=Path, help="where the generated data goes; removed at the end"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    try:
        for name, value in measure(arguments.size_mb, arguments.workers, folder):
            result[name] = value
            print(f"{name}: {value}", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
