"""What `training.torch_compile` costs and gives: the fused step, Transformers' layers, and these compiled, in turn.

    python benchmarks/compiled.py --json

runs `ollatune bench` on the embedded SmolLM2-135M and the sample data, every case in a process of its own, in several
rounds. One JSON object with `rows`: `trains` (adapter or all weights), `layers` (fused, plain or compiled),
`tokens_per_second` (best of the rounds), `peak_mb`, and `start_seconds`: what the process took besides the measured
steps, smallest of the rounds. `first_start_seconds` is the first round's, when torch's cache has nothing compiled yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)  # the folder has a file named gguf.py

from benchmarks.results import add_output_options, publish, with_earlier  # noqa: E402

WARMUP, STEPS = 1, 5
TRAINS = {
    "adapter": (),
    "all weights": ("advanced.lora_enabled=false",),
}
LAYERS = {
    "fused": (),
    "plain": ("training.fast_path=false",),
    "compiled": ("training.torch_compile=true",),
}
CASES = [
    (trains, layers)
    for trains in TRAINS
    for layers in LAYERS
    if (trains, layers) != ("all weights", "fused")  # all weights have no fused step
]


def measure(trains: str, layers: str, dtype: str, cache: str) -> dict[str, Any]:
    """One `ollatune bench`, with the compiler's cache in the folder `cache`."""
    settings = (
        "model.quantization=none", f"model.dtype={dtype}",
        "training.gradient_accumulation_steps=1", *TRAINS[trains], *LAYERS[layers],
    )  # fmt: skip
    command = [
        sys.executable, "-m", "ollatune", "bench", "--json", "--model", "embedded:smollm2-135m",
        "--data", str(REPOSITORY / "data" / "processed"), "--batch-size", "8",
        "--warmup", str(WARMUP), "--steps", str(STEPS),
        *(part for setting in settings for part in ("--set", setting)),
    ]  # fmt: skip
    source = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": source}
    started = time.perf_counter()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=REPOSITORY
    )
    seconds = time.perf_counter() - started
    found = json.loads(done.stdout)
    row = {
        "trains": trains, "layers": layers, "dtype": dtype,
        "tokens_per_second": found["tokens_per_second"], "peak_mb": found["peak_mb"],
        "start_seconds": round(seconds - STEPS * found["seconds_per_step"], 1),
        "loss": found["loss"],
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of the rounds of one case."""
    best = max(rounds, key=lambda row: row["tokens_per_second"])
    starts = [row["start_seconds"] for row in rounds]
    return best | {"start_seconds": min(starts), "first_start_seconds": starts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of every case (%(default)s)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--trains", nargs="+", choices=TRAINS, default=list(TRAINS))
    add_output_options(parser)
    arguments = parser.parse_args()
    cases = [case for case in CASES if case[0] in arguments.trains]
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="ollatune-bench-") as cache:
        for _ in range(arguments.rounds):
            for trains, layers in cases:
                row = measure(trains, layers, arguments.dtype, cache)
                rounds[trains, layers].append(row)
    rows = [summary(rows) for rows in rounds.values()]
    if arguments.save:
        rows = with_earlier("compiled", rows, ("trains", "layers"), CASES)
    publish("compiled", {"rounds": arguments.rounds, "rows": rows}, arguments)


if __name__ == "__main__":
    main()
