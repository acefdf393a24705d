"""What `--dry-run` says that a run will take beside what the run takes: peak memory and seconds a step.

    python benchmarks/estimates.py --json

trains the embedded SmolLM2-135M for a few steps in every case, each in a process of its own, on made-up records of one
length, so that every micro-batch is the heaviest one. One JSON object with `rows`: `case`, `estimated_mb` and
`measured_mb` (the peak of the process), their ratio, the same for seconds a step (median of all but the first), and the
phase that the estimate takes for the heaviest. `--save` keeps the rows that a file of the same day has of other cases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder has a file named gguf.py

from benchmarks.results import add_output_options, save, with_earlier

MEBIBYTE = 1 << 20
STEPS = 5
NUM_RECORDS = 24
WORDS = ("river", "stone", "amber", "copper", "violet", "meadow", "harbor", "candle", "timber")
PACKED = "model.quantization=as-served"
DENSE = "model.quantization=none"
FULL = ("advanced.lora_enabled=false", DENSE)
RECOMPUTE = "training.activation_checkpointing=true"
PLAIN = "training.fast_path=false"
CASES: dict[str, tuple[str, ...]] = {
    "adapter fp32": ("model.dtype=fp32", DENSE),
    "adapter fp32 recomputed": ("model.dtype=fp32", DENSE, RECOMPUTE),
    "adapter fp32 plain path": ("model.dtype=fp32", DENSE, PLAIN),
    "adapter bf16": ("model.dtype=bf16", DENSE),
    "adapter bf16 recomputed": ("model.dtype=bf16", DENSE, RECOMPUTE),
    "adapter bf16 plain path": ("model.dtype=bf16", DENSE, PLAIN),
    "adapter bf16 packed": ("model.dtype=bf16", PACKED),
    "adapter bf16 packed recomputed": ("model.dtype=bf16", PACKED, RECOMPUTE),
    "adapter fp32 packed": ("model.dtype=fp32", PACKED),
    "adapter bf16 nf4": ("model.dtype=bf16", "model.quantization=nf4"),
    "all weights fp32": ("model.dtype=fp32", *FULL),
    "all weights fp32 recomputed": ("model.dtype=fp32", *FULL, RECOMPUTE),
    "all weights bf16": ("model.dtype=bf16", *FULL),
    "all weights fp32 sgd": ("model.dtype=fp32", *FULL, "training.optimizer=sgd"),
}


def write_records(folder: Path, words: int) -> None:
    """Records of about three quarters context and one quarter answer, all of about the same length."""
    folder.mkdir(parents=True)

    def text(start: int, count: int) -> str:
        return " ".join(WORDS[(start + 5 * place) % len(WORDS)] for place in range(count))

    for name, count in (("train", NUM_RECORDS), ("validation", 4)):
        records = [
            {"instruction": text(n, 3 * words // 4), "context": "", "response": text(n, words // 4)}
            for n in range(count)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def command(case: str, data: Path, output: Path, batch_size: int) -> list[str]:
    """The command line of the run."""
    settings = (
        f"output.logs={output / 'logs'}", "validation.samples=0", f"validation.batch_size={batch_size}",
        "training.warmup_steps=1", "advanced.share_prefixes=false", *CASES[case],
    )  # fmt: skip
    assignments = [part for setting in settings for part in ("--set", setting)]
    return [
        sys.executable, "-m", "ollatune", "train", "--model", "embedded:smollm2-135m",
        "--data", str(data), "--output", str(output), "--max-steps", str(STEPS),
        "--batch-size", str(batch_size), "--gradient-accumulation-steps", "1", "--json", *assignments,
    ]  # fmt: skip


def measure(case: str, *, words: int, batch_size: int) -> dict[str, Any]:
    """Ask for the estimate, run, compare."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(prefix="ollatune-bench-") as folder:
        data, output = Path(folder, "data"), Path(folder, "out")
        write_records(data, words)
        line = command(case, data, output, batch_size)

        def result(*more: str) -> dict[str, Any]:
            done = subprocess.run(
                [*line, *more], stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            return dict(json.loads(done.stdout))

        plan = result("--dry-run")
        finished = result()
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if entry["type"] == "step"]
    seconds = statistics.median(step["seconds"] for step in steps[1:])
    estimated = plan["memory"]["total_bytes"] / MEBIBYTE
    measured = finished["peak_memory_mb"]
    estimated_seconds = plan["seconds"]["step"] / plan["steps"]
    return {
        "case": case,
        "tokens_per_step": steps[-1]["num_tokens"],
        "estimated_mb": round(estimated),
        "measured_mb": measured,
        "memory_ratio": round(estimated / measured, 3),
        "heaviest_phase": plan["memory"]["heaviest_phase"],
        "estimated_seconds": round(estimated_seconds, 3),
        "measured_seconds": round(seconds, 3),
        "time_ratio": round(estimated_seconds / seconds, 3),
        "parts_mb": {k: round(v / MEBIBYTE) for k, v in plan["memory"]["parts"].items() if v},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--words", type=int, default=200, help="words a record (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="records a step (%(default)s)")
    add_output_options(parser)
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases:
        row = measure(case, words=arguments.words, batch_size=arguments.batch_size)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if arguments.save:
            places = [(name,) for name in CASES]
            save("estimates", {"rows": with_earlier("estimates", rows, ("case",), places)})
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"{row['case']:32} {row['estimated_mb']:>6} of {row['measured_mb']:>6.0f} MiB "
            f"({row['memory_ratio']:.2f})  {row['estimated_seconds']:>7.2f} of "
            f"{row['measured_seconds']:>7.2f} s ({row['time_ratio']:.2f})"
        )


if __name__ == "__main__":
    main()
