"""How the cost of training grows: with the model, the sequence length, the data, and the number of processes.

    python benchmarks/growth.py [--json] [--only size length data ranks] [--points 135m 4096 ...] [--save]

Prints tables, or with --json one object: `size`, `length`, `data` and `ranks` are lists of rows, each measured in a
process of its own; `memory_exponent` and `time_exponent` are the slopes of log(memory beyond the loaded model) and of
log(seconds of a step) over log(length) between the two longest: 1 is linear growth. Models have the shapes of known
ones and made-up weights, packed as q4_K_M on disk and bf16 in memory. `--save` adds to the result file of the day.
"""

from __future__ import annotations

import argparse
import json
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

from benchmarks.growth_report import merge, save, tables  # noqa: E402
from benchmarks.peers.frozen import forget_peak, memory_mb  # noqa: E402
from benchmarks.process_memory import watch  # noqa: E402
from benchmarks.shaped_models import SHAPES, write_shaped_model  # noqa: E402

SIZES = ("135m", "360m", "1b")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
RECORDS = (1_000, 10_000, 100_000, 1_000_000)
RANKS = (1, 2, 4)
POINTS: dict[str, tuple[str | int, ...]] = {
    "size": SIZES,
    "length": LENGTHS,
    "data": RECORDS,
    "ranks": RANKS,
}
SIZE_TOKENS = 512
TARGET_SHARE = 0.4
TIMEOUT_SECONDS = 300
_SAMPLE_SECONDS = 0.2
_MODEL = "embedded:smollm2-135m"


def step_row(path: Path, num_tokens: int, steps: int = 3) -> dict[str, Any]:
    """LoRA steps on one sequence of made-up tokens; memory before and after."""
    import torch

    from ollatune.config.schema import Config
    from ollatune.gguf.reader import GGUFFile
    from ollatune.modeling.fast.forward import CausalStep, PackedRow
    from ollatune.modeling.fast.segments import Segment
    from ollatune.modeling.load import Mode, load_base_model
    from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
    from ollatune.training.environment import (
        DTYPES,
        choose_dtype,
        configure_allocator,
        configure_threads,
    )
    from ollatune.training.placement import computes_on_blocks

    configure_threads()
    configure_allocator()
    dtype, _ = choose_dtype("auto", torch.device("cpu"))
    file, device = GGUFFile.open(path), torch.device("cpu")
    mode: Mode = "packed" if computes_on_blocks(Config(), file, dtype, device) else "dense"
    model = load_base_model(file, mode=mode, dtype=DTYPES[dtype])
    inject_lora(model, LoRASettings(8, 16.0, 0.0), seed=0)
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()
    step = CausalStep(model)
    loading = memory_mb("VmHWM")
    loaded = memory_mb("VmRSS")
    forget_peak()
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
        "loading_mb": loading,
        "loaded_mb": loaded,
        "steps_mb": memory_mb("VmHWM"),
    }


def data_row(num_records: int, folder: Path, steps: int = 4) -> dict[str, Any]:
    """`ollatune bench` on `num_records` records: start-up without and with what the first one left in caches.

    Memory is that of all its processes; `step_process_mb` is what the training process itself reports.
    """
    started = time.perf_counter()
    write_records(folder / "data", num_records)
    megabytes = sum(file.stat().st_size for file in (folder / "data").iterdir()) / 1e6
    row: dict[str, Any] = {"records": num_records, "megabytes": round(megabytes, 1)}
    command = [
        sys.executable, "-m", "ollatune", "bench", "--json", "--data", str(folder / "data"),
        "--batch-size", "4", "--model", _MODEL, "--steps", str(steps), "--warmup", "2",
    ]  # fmt: skip
    cache = {"OLLATUNE_CACHE": str(empty_cache(folder / "cache"))}
    for state in ("cold", "warm"):
        started = time.perf_counter()
        output, peak_rss, peak_pss = _run(command, cache)
        seconds = time.perf_counter() - started
        found = json.loads(output.strip().splitlines()[-1])
        row[f"seconds_{state}"] = round(seconds, 1)
        row[f"tree_mb_{state}"] = round((peak_pss or peak_rss) / 2**20)
    row["prepare_seconds"] = round(row["seconds_cold"] - row["seconds_warm"], 1)
    cached = sum(f.stat().st_size for f in (folder / "cache" / "data").rglob("*") if f.is_file())
    return row | {
        "cache_mb": round(cached / 1e6, 1),
        "seconds_per_step": found["seconds_per_step"],
        "data_share": found["phases"]["data"],
        "step_process_mb": found["peak_mb"],
    }


def empty_cache(folder: Path) -> Path:
    """A user cache without prepared data, with the weights and compiled kernels of the real one."""
    from ollatune.base.folders import user_cache_folder
    from ollatune.modeling.embedded import fetch_embedded

    fetch_embedded(_MODEL.removeprefix("embedded:"))
    folder.mkdir(parents=True)
    for kept in ("models", "native"):
        if (user_cache_folder() / kept).is_dir():
            (folder / kept).symlink_to(user_cache_folder().resolve() / kept)
    return folder


def ranks_row(num_ranks: int, folder: Path, steps: int = 8) -> dict[str, Any]:
    """`ollatune train` in `num_ranks` processes that share the cores; the optimiser batch is the same."""
    write_records(folder / "data", 200)
    output = folder / "run"
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    command = [
        *launcher, str(HERE.parent / "src" / "models" / "train.py"),
        "--model", _MODEL, "--data", str(folder / "data"), "--output", str(output),
        "--max-steps", str(steps), "--batch-size", str(8 // num_ranks),
        "--gradient-accumulation-steps", "1", "--set", f"output.logs={folder / 'logs'}",
        "--set", "validation.samples=0", *(["--distributed"] if num_ranks > 1 else []),
    ]  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    _, peak_rss, peak_pss = _run(command, {"OMP_NUM_THREADS": threads})
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["type"] == "step"][2:]
    return {
        "ranks": num_ranks,
        "threads_each": int(threads),
        "tokens_per_second": round(
            sum(line["num_tokens"] for line in done) / sum(line["seconds"] for line in done), 1
        ),
        "tree_mb": round((peak_pss or peak_rss) / 2**20),
        "loss": done[-1]["loss"],
    }


def _run(command: list[str], more: dict[str, str]) -> tuple[str, int, int]:
    """Its standard output, and the highest RSS and PSS of its processes in bytes.

    Raises RuntimeError with the end of what it said where it fails.
    """
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | more
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        peak_rss, peak_pss = watch(process, _SAMPLE_SECONDS, TIMEOUT_SECONDS)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace").strip()[-800:])
        output.seek(0)
        return output.read().decode(), peak_rss, peak_pss


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


def shaped_row(shape: str, num_tokens: int, folder: Path) -> dict[str, Any]:
    """`step_row` in a process of its own."""
    path = folder / f"{shape}.gguf"
    if not path.is_file():
        write_shaped_model(path, SHAPES[shape])
    command = [sys.executable, str(HERE / "growth.py"), "--step", str(path), str(num_tokens)]
    found: dict[str, Any] = json.loads(_run(command, {})[0].strip().splitlines()[-1])
    return {"shape": shape, "parameters": SHAPES[shape].num_parameters} | found


def measure(kind: str, point: str | int, folder: Path) -> dict[str, Any]:
    """The row of one point, said aloud."""
    if kind in ("size", "length"):
        shape, tokens = (str(point), SIZE_TOKENS) if kind == "size" else ("135m", int(point))
        row = shaped_row(shape, tokens, folder)
    else:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{kind}-") as place:
            row = (data_row if kind == "data" else ranks_row)(int(point), Path(place))
    print(f"{kind}: {row}", file=sys.stderr, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", nargs="+", choices=tuple(POINTS), default=list(POINTS))
    parser.add_argument("--points", nargs="+", default=[], help="these alone, as 135m, 4096, 1000")
    parser.add_argument("--save", action="store_true", help="add to today's benchmarks/results/")
    parser.add_argument("--step", nargs=2, metavar=("GGUF", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step_row(Path(options.step[0]), int(options.step[1]))))
        return 0
    from benchmarks.speed import machine

    wanted = {
        kind: [p for p in POINTS[kind] if not options.points or str(p) in options.points]
        for kind in options.only
    }
    if not any(wanted.values()):
        parser.error(f"--points: none of {POINTS}")
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        found = {
            kind: [measure(kind, point, Path(folder)) for point in points]
            for kind, points in wanted.items()
        }
    result = merge(None, {"date": date.today().isoformat(), "machine": machine(), **found})
    if options.save:
        path, result = save(result, HERE / "results")
        print(f"Saved {path}", file=sys.stderr)
    print(json.dumps(result) if options.json else tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
