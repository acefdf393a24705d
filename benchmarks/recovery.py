"""What is left of a trained adapter when the tuned tensors are stored in each type: size, recovery, served answers.

    python benchmarks/recovery.py --json

trains one adapter on SmolLM2-135M (Q4_1, as Ollatune embeds it) with the demo's records, exports it in each type, and
asks llama.cpp the held-out questions. One JSON object with `rows`: `tensor_type`, `stored_as` (tensors by type: rows of
576 weights take llama.cpp's fall-backs), `size_mb`, `recovery` (smallest, median, whole), `exact_match`,
`held_out_loss`. Types that lose the update are written all the same, which `create-modelfile` would refuse.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder has a file named gguf.py

from benchmarks.results import add_output_options, publish  # noqa: E402
from benchmarks.smollm2 import (  # noqa: E402
    CONTEXT,
    FOLDER,
    PARALLEL,
    ask,
    end_of_turn,
    export_and_ask,
    remembered,
    train_once,
)

TYPES = ("base", "q4_K", "q5_K", "q6_K", "q8_0", "f16")
BASE = "embedded:smollm2-135m"
MEGABYTE = 1e6


def row_of(tensor_type: str, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Export in `tensor_type`, ask, and say what came of it."""
    report, answers = export_and_ask(checkpoint, folder / tensor_type, tensor_type=tensor_type)
    tuned = [tensor for tensor in report["tensors"] if tensor["recovery"] is not None]
    recoveries = [tensor["recovery"] for tensor in tuned]
    return {
        "tensor_type": tensor_type,
        "stored_as": dict(Counter(tensor["type_after"] for tensor in tuned)),
        "size_mb": round(report["size_bytes"] / MEGABYTE, 1),
        "recovery_smallest": round(min(recoveries), 4),
        "recovery_median": round(statistics.median(recoveries), 4),
        "recovery_largest": round(max(recoveries), 4),
        "num_tensors_outside_0.9_to_1.1": sum(not 0.9 <= r <= 1.1 for r in recoveries),
        **answers,
    }


def base_row(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The base itself, asked in the same way: an update of which nothing survives."""
    from ollatune.commands.verify import held_out_samples, load_run, read_modelfile
    from ollatune.evaluation.engine import LlamaCppEngine
    from ollatune.evaluation.served import LlamaCppServed

    _, config, base = load_run(checkpoint)
    samples = held_out_samples(config, None)
    stops = read_modelfile(folder / TYPES[0]).parameters.get("stop", [])
    with LlamaCppEngine(base.source.path, context=CONTEXT, parallel=PARALLEL) as engine:
        served = LlamaCppServed(engine, base.template, stops=stops)
        answers = ask(served, samples, end_of_turn(base))
    size = base.source.path.stat().st_size
    return {
        "tensor_type": "untrained",
        "size_mb": round(size / MEGABYTE, 1),
        **answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_options(parser)
    arguments = parser.parse_args()
    checkpoint = train_once(BASE, "none")
    folder = FOLDER / "recovery" / checkpoint.parent.name
    measures = {kind: partial(row_of, kind, checkpoint, folder) for kind in TYPES}
    measures["untrained"] = partial(base_row, checkpoint, folder)
    rows = [remembered(folder / f"{kind}.json", measure) for kind, measure in measures.items()]
    result = {"base": BASE, "rows": rows}
    publish("recovery", result, arguments)


if __name__ == "__main__":
    main()
