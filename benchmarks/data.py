"""Data: reading and validating, tokenising into the memory-mapped cache, memory - and `datasets.map` beside it.

    python benchmarks/data.py --json                                 # 0.1 GB of generated JSON Lines
    python benchmarks/data.py --gigabytes 5 --workers 1 --json       # larger than memory should matter
    python benchmarks/data.py --only reading --json                  # seconds; for a quiet machine

Generates the data in a temporary folder (`--folder` says where; about 2.5 times the size is needed) and removes it.
Every step runs in a process of its own; this one only watches. Memory is that of the step's whole tree of processes,
sampled once a second: `peak_rss_mb` adds up their resident pages, shared ones several times; `peak_pss_mb`
counts a page that k of them share as 1/k in each (Linux, `smaps_rollup`). `datasets.map` is measured where `datasets`
can be imported, with the same tokenizer (the base's, exported for `transformers`) and the same number of processes,
alternating with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from data_generate import generate
from process_memory import watch

STEPS = Path(__file__).resolve().with_name("data_steps.py")
SAMPLE_SECONDS = 1.0  # adding up a process's pages stops it for some milliseconds
READ_MB = 100


def run_step(step: str, **arguments: Any) -> dict[str, Any]:
    """Run one step of data_steps.py and watch the memory of its processes."""
    command = [sys.executable, str(STEPS), step, json.dumps(arguments, default=str)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output)
        peak_rss, peak_pss = watch(process, SAMPLE_SECONDS)
        if process.returncode:
            raise SystemExit(f"the step {step} ended with exit code {process.returncode}")
        output.seek(0)
        result: dict[str, Any] = json.loads(output.read().decode().splitlines()[-1])
    memory = {"peak_rss_mb": round(peak_rss / 1e6)}
    if peak_pss:
        memory["peak_pss_mb"] = round(peak_pss / 1e6)
    return {**result, **memory} if result else result


def report(name: str, value: Any) -> None:
    print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)


def measure_reading(folder: Path, rounds: int) -> dict[str, Any]:
    """Rows of about 250 bytes and of about 1 kB; the median of `rounds` readings each."""
    found = {}
    for name, words in (("rows_of_250_bytes", 32), ("rows_of_1_kb", 150)):
        path = folder / f"{name}.jsonl"
        generate(path, READ_MB * 1_000_000, words=words, sigma=0.05)
        results = [run_step("read", path=path) for _ in range(rounds)]
        found[name] = sorted(results, key=lambda r: r["mb_per_second"])[len(results) // 2]
        path.unlink()
        report(name, found[name])
    return found


def measure_cache(folder: Path, gigabytes: float, workers: int) -> dict[str, Any]:
    path = folder / "data.jsonl"
    rows = generate(path, int(gigabytes * 1e9))
    report("data", {"rows": rows, "mb": round(path.stat().st_size / 1e6)})
    result = run_step("cache", path=path, cache=folder / "cache", workers=workers)
    result["cache_mb"] = round(
        sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e6
    )
    report("tokenise_and_cache", result)
    result["reopened"] = run_step("cache", path=path, cache=folder / "cache", workers=workers)
    shutil.rmtree(folder / "cache")
    path.unlink()
    return result


def compare(folder: Path, gigabytes: float, workers: int, rounds: int) -> dict[str, Any] | None:
    """Ours and `datasets.map`, alternating; None where `datasets` cannot be imported."""
    path = folder / "compared.jsonl"
    generate(path, int(gigabytes * 1e9), seed=1)
    ours, theirs = [], []
    for number in range(rounds):
        caches = [folder / f"{name}-{number}" for name in ("ours", "theirs")]
        ours.append(run_step("cache", path=path, cache=caches[0], workers=workers))
        theirs.append(run_step("datasets", path=path, cache=caches[1], workers=workers))
        for cache in caches:
            shutil.rmtree(cache, ignore_errors=True)
        if not theirs[-1]:
            return None
        report("compared", {"ours": ours[-1], "datasets": theirs[-1]})
    seconds = [[result["seconds"] for result in results] for results in (ours, theirs)]
    return {
        "mb": round(path.stat().st_size / 1e6),
        "ours": ours,
        "datasets": theirs,
        "times_as_fast": round(median(seconds[1]) / median(seconds[0]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.1, help="size of the generated data")
    parser.add_argument("--compare-gigabytes", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="of reading and of comparing")
    parser.add_argument("--only", choices=("reading", "cache", "compare"))
    parser.add_argument("--folder", type=Path, help="where the data goes while this runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    needed = 2.5e9 * max(options.gigabytes, options.compare_gigabytes)
    folder = Path(tempfile.mkdtemp(prefix="ollatune-data-", dir=options.folder))
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "workers": options.workers,
    }
    try:
        if (free := shutil.disk_usage(folder).free) < needed:
            raise SystemExit(f"{folder}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed")
        if options.only in (None, "reading"):
            result["reading"] = measure_reading(folder, options.rounds)
        if options.only in (None, "cache"):
            result["cache"] = measure_cache(folder, options.gigabytes, options.workers)
        if options.only in (None, "compare"):
            result["compare"] = compare(
                folder, options.compare_gigabytes, options.workers, options.rounds
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
