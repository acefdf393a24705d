"""One adapter trained on SmolLM2-135M with the demo's records, and what is asked of it as llama.cpp serves it.

Shared by `recovery.py` and `base_precision.py`. Training is done once for each base and setting, and so is each row of
a table: both are found again under `runs/benchmarks/`, which may be removed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ollatune.commands.create_modelfile import ExportOptions, run_create_modelfile
from ollatune.commands.evaluate import score_served
from ollatune.commands.train import TrainOptions, run_train
from ollatune.commands.verify import held_out_samples, load_run, serve_export
from ollatune.data.conversation import Sample
from ollatune.evaluation.score import EvaluationItem, evaluation_items
from ollatune.evaluation.served import LlamaCppServed
from ollatune.modeling.opened import OpenBase

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "configs" / "demo.yaml"
DATA = REPOSITORY / "data" / "processed"
FOLDER = REPOSITORY / "runs" / "benchmarks"
ANSWER_TOKENS = 48
LOSS_RECORDS = 20  # of the held-out ones: every token of an answer is a request
CONTEXT = 512
PARALLEL = 4


def train_once(base: str, quantization: str, **settings: Any) -> Path:
    """`best_model.pt` of a run of the demo's task on `base`; trained now unless the folder has it already."""
    assignments = [
        f"model.quantization={quantization}",
        *(f"{key.replace('__', '.')}={value}" for key, value in settings.items()),
    ]
    named = json.dumps([base, CONFIG.read_text(encoding="utf-8"), assignments])
    folder = FOLDER / f"run-{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    best = folder / "best_model.pt"
    if not best.is_file():
        flags = {
            "model.base_model": base,
            "output.folder": str(folder),
            "output.logs": str(folder / "logs"),
            "data.sources": [{"path": str(DATA)}],
        }
        run_train(
            TrainOptions(CONFIG, tuple(assignments), flags, overwrite=True, show_progress=False)
        )
    return best


def remembered(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives, from `path` where an earlier, perhaps interrupted, benchmark has written it."""
    if not path.is_file():
        row = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")
    row = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(row), file=sys.stderr, flush=True)
    return dict(row)


def ask(served: LlamaCppServed, samples: Sequence[Sample], end_text: str) -> dict[str, Any]:
    """Exact match of the greedy answers to all questions; loss in nats a token of the first LOSS_RECORDS answers.

    The loss is that of the expected answers, the end of the turn included.
    """
    report = score_served(served, samples, ["exact_match"], max_tokens=ANSWER_TOKENS)
    found = report.estimates["exact_match"]
    items = evaluation_items(samples[:LOSS_RECORDS])
    loss = answer_loss(served, items, end_text)
    return {
        "exact_match": round(found.value, 4),
        "exact_match_interval": [round(found.low, 4), round(found.high, 4)],
        "num_records": len(report.items),
        "held_out_loss": round(loss, 4),
        "num_loss_records": len(items),
    }


def answer_loss(served: LlamaCppServed, items: Sequence[EvaluationItem], end_text: str) -> float:
    """Nats per token of the expected answers, each with `end_text` after it."""
    logprobs = []
    for item in items:
        target = served.engine.tokenize(item.expected + end_text, add_special=False)
        logprobs.append(served.engine.target_logprobs(served.render(item.messages), target))
    return -float(np.concatenate(logprobs).mean(dtype=np.float64))


def export_and_ask(
    checkpoint: Path,
    folder: Path,
    *,
    tensor_type: str = "q8_0",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export with tuned tensors in `tensor_type`, whatever survives, and ask; export.json's content and the answers."""
    flags = {"export.tensor_type": tensor_type, "export.accept_recovery": True}
    run_create_modelfile(ExportOptions(checkpoint, folder, flags=flags))
    report = json.loads((folder / "export.json").read_bytes())
    _, config, base = load_run(checkpoint)
    samples = held_out_samples(config, None)
    engine, served = serve_export(folder, base, parallel=PARALLEL, context=CONTEXT)
    with engine:
        return report, ask(served, samples, end_of_turn(base))


def end_of_turn(base: OpenBase) -> str:
    """The text of the token that ends an answer: this model's EOS."""
    assert base.tokenizer.eos_id is not None
    return base.tokenizer.token_text(base.tokenizer.eos_id)
