"""`ollatune demo`: the whole journey on real weights - train, export, serve, prove, score - in a few minutes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from ollatune.base.errors import InputError
from ollatune.base.files import write_json
from ollatune.base.log import get_logger
from ollatune.commands.create_modelfile import ExportOptions, run_create_modelfile
from ollatune.commands.evaluate import score_served
from ollatune.commands.train import TrainOptions, run_train
from ollatune.commands.verify import (
    REPORT_NAME,
    check,
    held_out_samples,
    load_run,
    read_export,
    serve_export,
)
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.score import compare_scores
from ollatune.evaluation.served import LlamaCppServed
from ollatune.training.environment import peak_memory_bytes

DEMO_CONFIG = Path("configs/demo.yaml")
DEMO_FOLDER = Path("runs/demo")
MODEL_NAME = "support-json"
_PARALLEL = 4
_CONTEXT = 512
_VERIFY_PROMPTS = 4
_ANSWER_TOKENS = 48


def run_demo(config: Path = DEMO_CONFIG, folder: Path = DEMO_FOLDER) -> dict[str, Any]:
    """Run the demo; returns its numbers. Raises what training, export and verification raise."""
    started = time.perf_counter()
    if not config.is_file():
        raise InputError(
            f"There is no {config}.", hint="Run the demo from a checkout of the repository."
        )
    say = get_logger("demo").info
    if folder.exists():
        shutil.rmtree(folder)  # only what an earlier demo wrote: the folder is the demo's own
    say("1/4  Training on data/processed/ …")
    trained = run_train(
        TrainOptions(
            config, flags={"output.folder": str(folder), "output.logs": str(folder / "logs")}
        )
    )
    say("2/4  Exporting …")
    checkpoint_path, export_folder = Path(trained["best_model"]), folder / "ollama"
    exported = run_create_modelfile(ExportOptions(checkpoint_path, export_folder))
    checkpoint, run_config, base = load_run(checkpoint_path)
    samples = held_out_samples(run_config, None)
    say("3/4  Serving the export with llama.cpp, and comparing it with the trainer …")
    engine, served = serve_export(export_folder, base, parallel=_PARALLEL, context=_CONTEXT)
    with engine:
        proof = check(
            checkpoint, run_config, base, served, read_export(export_folder), samples,
            num_prompts=_VERIFY_PROMPTS,
        )  # fmt: skip
        say("%s", proof.table())
        say(
            "4/4  Answering %d held-out questions with the base and with the tuned model …",
            len(samples),
        )
        tuned = score_served(served, samples, max_tokens=_ANSWER_TOKENS)
    with LlamaCppEngine(base.source.path, context=_CONTEXT, parallel=_PARALLEL) as base_engine:
        base_served = LlamaCppServed(
            base_engine, served.template, stops=served.stops, system=served.system
        )
        before = score_served(base_served, samples, max_tokens=_ANSWER_TOKENS)
    comparison = compare_scores(before, tuned)
    total_seconds = time.perf_counter() - started
    scores = comparison.values()
    result = {
        "base_exact_match": scores["base.exact_match"],
        "tuned_exact_match": scores["exact_match"],
        "base_field_accuracy": scores["base.field_accuracy"],
        "tuned_field_accuracy": scores["field_accuracy"],
        "num_test_records": len(samples),
        "served_by": engine.description,
        "verified": proof.passed,
        "kl_max": proof.difference.max_kl,
        "kl_mean": proof.difference.mean_kl,
        "train_seconds": trained["train_seconds"],
        "total_seconds": round(total_seconds, 2),
        "tokens_per_second": trained["tokens_per_second"],
        "peak_memory_mb": round(peak_memory_bytes(torch.device("cpu")) / 2**20, 1),
        "smallest_recovery": exported["smallest_recovery"],
        "gguf": exported["gguf"],
        "modelfile": exported["modelfile"],
    }
    write_json(
        export_folder / REPORT_NAME,
        proof.to_dict() | {"scores": comparison.to_dict(), "demo": result},
    )
    print(_shown(comparison, result))
    proof.require()
    return result


def _shown(comparison: Any, result: dict[str, Any]) -> str:
    return (
        f"\n{comparison.table()}\n\n{comparison.samples(3)}\n\n"
        f"Served by {result['served_by']}; largest KL to the trainer {result['kl_max']:.4f}; "
        f"{result['total_seconds']:.0f} s in all.\n\n"
        "Next, with Ollama running:\n"
        f"  ollama create {MODEL_NAME} -f {result['modelfile']}\n"
        f'  ollama run {MODEL_NAME} "Extract name, order, product and issue from this e-mail as JSON."\n'
        "  ollatune train --model llama3.2:1b --data YOUR_DATA --output models/trained/\n"
    )
