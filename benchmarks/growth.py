"""How the cost of training grows: with the model, the sequence length, the data, and the number of processes.

    python benchmarks/growth.py --json [--only size length data ranks] [--save]

Prints one JSON object: `size`, `length`, `data` and `ranks` are lists of rows, each measured in a process of its own;
`memory_exponent` is the slope of log(memory beyond the weights) over log(length): 1 is linear growth.
Models have the shapes of well-known ones and made-up weights, packed as q4_K_M on disk and bf16 in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: the folder has a file named gguf.py
    sys.path[0] = str(HERE.parent)

from benchmarks.peers.frozen import peak_mb  # noqa: E402
from benchmarks.shaped_models import SHAPES, write_shaped_model  # noqa: E402

SIZES = ("135m", "360m", "1b")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
RECORDS = (1_000, 10_000, 100_000, 1_000_000)
RANKS = (1, 2)
KINDS = ("size", "length", "data", "ranks")
SIZE_TOKENS = 512
TARGET_SHARE = 0.4
TIMEOUT_SECONDS = 580


def step_row(path: Path, num_tokens: int, steps: int = 3) -> dict[str, Any]:
    """LoRA steps on one sequence of made-up tokens; memory before and after."""
    import torch

    from ollatune.gguf.reader import GGUFFile
    from ollatune.modeling.fast.forward import CausalStep, PackedRow
    from ollatune.modeling.fast.segments import Segment
    from ollatune.modeling.load import load_base_model
    from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
    from ollatune.training.environment import DTYPES, choose_dtype, configure_threads

    configure_threads()
    dtype, _ = choose_dtype("auto", torch.device("cpu"))
    with GGUFFile.open(path) as file:
        model = load_base_model(file, dtype=DTYPES[dtype])
    inject_lora(model, LoRASettings(8, 16.0, 0.0), seed=0)
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()
    step = CausalStep(model)
    loaded = _resident_mb()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (num_tokens + 1,), generator=generator)
    positions = torch.arange(num_tokens)
    wanted = positions[-max(1, int(TARGET_SHARE * num_tokens)) :]
    row = PackedRow(
        ids[:-1], positions, [Segment(0, num_tokens)], wanted, ids[1:][wanted], num_tokens
    )
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        (step.loss_sum(row) / row.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {
        "dtype": dtype,
        "tokens": num_tokens,
        "seconds_per_step": round(min(seconds), 4),
        "tokens_per_second": round(num_tokens / min(seconds), 1),
        "peak_mb": peak_mb(),
        "loaded_mb": loaded,
    }


def _resident_mb() -> int:
    import psutil

    return round(psutil.Process().memory_info().rss / 2**20)


def data_row(num_records: int, folder: Path, steps: int = 8) -> dict[str, Any]:
    """`ollatune bench` on `num_records` records: start-up without and with what the first one left in caches."""
    write_records(folder, num_records)
    command = [
        sys.executable, "-m", "ollatune", "bench", "--json", "--data", str(folder), "--batch-size", "4",
        "--model", "embedded:smollm2-135m", "--steps", str(steps), "--warmup", "2",
    ]  # fmt: skip
    row: dict[str, Any] = {"records": num_records}
    for state in ("cold", "warm"):
        started = time.perf_counter()
        found = _last_object(command)
        seconds = time.perf_counter() - started
        row[f"total_seconds_{state}"] = round(seconds, 2)
        row[f"start_up_seconds_{state}"] = round(
            seconds - found["seconds_per_step"] * (steps + 2), 2
        )
    return row | {
        key: found[key] for key in ("seconds_per_step", "tokens_per_second", "peak_mb", "phases")
    }


def ranks_row(num_ranks: int, folder: Path, steps: int = 10) -> dict[str, Any]:
    """`ollatune train` in `num_ranks` processes that share the cores; the optimiser batch is the same."""
    write_records(folder / "data", 200)
    output = folder / "run"
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    command = [
        *launcher, str(HERE.parent / "src" / "models" / "train.py"),
        "--model", "embedded:smollm2-135m", "--data", str(folder / "data"), "--output", str(output),
        "--max-steps", str(steps), "--batch-size", str(8 // num_ranks),
        "--gradient-accumulation-steps", "1", "--set", f"output.logs={folder / 'logs'}",
        "--set", "validation.samples=0", *(["--distributed"] if num_ranks > 1 else []),
    ]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    _run(command, {"OMP_NUM_THREADS": threads})
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["type"] == "step"][2:]
    return {
        "ranks": num_ranks,
        "threads_each": int(threads),
        "tokens_per_second": round(
            sum(line["num_tokens"] for line in done) / sum(line["seconds"] for line in done), 1
        ),
        "peak_mb": json.loads((output / "run.json").read_text())["peak_memory_mb"],
        "loss": done[-1]["loss"],
    }


def _last_object(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run(command, {}).strip().splitlines()[-1])
    return found


def _run(command: list[str], more: dict[str, str]) -> str:
    """Its standard output. Raises RuntimeError with the end of what it said where it fails."""
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        env=os.environ | {"PYTHONPATH": path} | more,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-800:])
    return done.stdout


def write_records(folder: Path, count: int) -> Path:
    """`count` short instruction records in one JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(count):
            record = {
                "instruction": f"Add {i} and {i + 3}.",
                "response": f"The sum is {2 * i + 3}.",
            }
            file.write(json.dumps(record) + "\n")
    return folder


def memory_exponent(rows: list[dict[str, Any]]) -> float | None:
    """Slope of log(memory beyond the loaded model) over log(tokens) between the two longest; 1 is linear."""
    if len(rows) < 2:
        return None
    first, last = rows[-2:]
    grown = (last["peak_mb"] - last["loaded_mb"]) / max(1, first["peak_mb"] - first["loaded_mb"])
    return round(math.log(grown) / math.log(last["tokens"] / first["tokens"]), 3)


def shaped_row(shape: str, num_tokens: int, folder: Path) -> dict[str, Any]:
    """`step_row` in a process of its own."""
    path = folder / f"{shape}.gguf"
    if not path.is_file():
        write_shaped_model(path, SHAPES[shape])
    command = [sys.executable, str(HERE / "growth.py"), "--step", str(path), str(num_tokens)]
    return {"shape": shape, "parameters": SHAPES[shape].num_parameters} | _last_object(command)


def measure(kind: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of one kind, each said aloud as it comes."""
    jobs = {
        "size": [(shaped_row, (shape, SIZE_TOKENS)) for shape in SIZES],
        "length": [(shaped_row, ("135m", length)) for length in LENGTHS],
        "data": [(data_row, (count,)) for count in RECORDS],
        "ranks": [(ranks_row, (count,)) for count in RANKS],
    }
    rows = []
    for index, (function, arguments) in enumerate(jobs[kind]):
        place = folder if function is shaped_row else folder / f"{kind}-{index}"
        rows.append(function(*arguments, place))
        print(f"{kind}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/")
    parser.add_argument("--step", nargs=2, metavar=("GGUF", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step_row(Path(options.step[0]), int(options.step[1]))))
        return 0
    from benchmarks.speed import machine

    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        found = {kind: measure(kind, Path(folder)) for kind in options.only}
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "memory_exponent": memory_exponent(found.get("length", [])),
        **found,
    }
    if options.save:
        from benchmarks.speed_report import result_path

        path = result_path(result, HERE / "results", "growth")
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
