"""Peak memory and speed of LoRA steps on models of several sizes, the base packed as served or decoded.

    python benchmarks/memory.py --json

prints one JSON object; its `rows` have `shape`, `mode` (packed, bf16 or fp32), `peak_mb`, `file_mb` and
`tokens_per_second`. A packed base computes in the number type that training would choose here (`computes_in`). Every
row runs in a process of its own. A row that cannot fit the machine's memory says so in `note` and has no figures.
The table can be made in parts: `--save` keeps the rows that a file of the same day has of other shapes and modes, and
`--keep` the model files in `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder has a file named gguf.py

import psutil  # noqa: E402
import torch  # noqa: E402
from benchmarks.results import save, with_earlier  # noqa: E402
from benchmarks.shaped_models import SHAPES, write_shaped_model  # noqa: E402

from ollatune.base.memory import peak_resident_bytes  # noqa: E402

MODES = ("packed", "bf16", "fp32")
MEGABYTE = 1e6
RESERVED_BYTES = 2 << 30  # of the available memory, for everything besides the weights
PACKED_ALLOWANCE_BYTES = 3 << 30  # what packed training may take beyond the file
LORA_RANK = 8


def computation_type(mode: str) -> str:
    """bf16 or fp32."""
    from ollatune.training.environment import choose_dtype

    return choose_dtype("auto", torch.device("cpu"))[0] if mode == "packed" else mode


def run_row(
    shape_name: str, mode: str, path: Path, *, num_tokens: int, num_steps: int
) -> dict[str, Any]:
    """Load the file at `path`, take LoRA steps on made-up tokens, and say what it took."""
    from ollatune.gguf.reader import GGUFFile
    from ollatune.modeling.fast.forward import CausalStep, PackedRow
    from ollatune.modeling.fast.segments import Segment
    from ollatune.modeling.load import load_base_model
    from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
    from ollatune.training.environment import DTYPES

    dtype = computation_type(mode)
    vocabulary = SHAPES[shape_name].vocabulary
    with GGUFFile.open(path) as file:
        started = time.perf_counter()
        kind = "packed" if mode == "packed" else "dense"
        model = load_base_model(file, mode=kind, dtype=DTYPES[dtype])
        load_seconds = time.perf_counter() - started
        inject_lora(model, LoRASettings(rank=LORA_RANK, alpha=2.0 * LORA_RANK, dropout=0.0), seed=0)
        parameters = [parameter for _, parameter in trainable_parameters(model)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        model.train()
        step = CausalStep(model, recompute=True)
        ids = torch.randint(
            vocabulary, (num_tokens + 1,), generator=torch.Generator().manual_seed(0)
        )
        positions = torch.arange(num_tokens)
        row = PackedRow(
            ids[:-1], positions, [Segment(0, num_tokens)], positions, ids[1:], num_tokens
        )
        losses, seconds = [], []
        for _ in range(num_steps):
            started = time.perf_counter()
            loss = step.loss_sum(row) / num_tokens
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - started)
    return {
        "computes_in": dtype,
        "peak_mb": round(peak_resident_bytes() / MEGABYTE),
        "tokens_per_second": round(num_tokens / min(seconds), 1),
        "load_seconds": round(load_seconds, 1),
        "losses": [round(value, 4) for value in losses],
    }


def row_in_process(
    shape_name: str, mode: str, path: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`run_row` in a fresh process, or a note on why there are no figures."""
    shape = SHAPES[shape_name]
    file_bytes = path.stat().st_size
    row: dict[str, Any] = {
        "shape": shape_name, "mode": mode, "peak_mb": None,
        "file_mb": round(file_bytes / MEGABYTE), "tokens_per_second": None,
    }  # fmt: skip
    weights = (
        file_bytes if mode == "packed" else shape.num_parameters * (2 if mode == "bf16" else 4)
    )
    available = psutil.virtual_memory().available - RESERVED_BYTES
    if weights > available:
        row["note"] = (
            f"does not fit: the weights take {weights / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        )
        return row
    command = [
        sys.executable, __file__, "--row", shape_name, mode, str(path),
        "--tokens", str(arguments.tokens), "--steps", str(arguments.steps),
    ]  # fmt: skip
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        row["note"] = f"ended with status {finished.returncode}"
        return row
    row |= json.loads(finished.stdout.splitlines()[-1])
    if mode == "packed":
        limit = file_bytes + PACKED_ALLOWANCE_BYTES
        row["is_within_file_plus_3_gib"] = row["peak_mb"] * MEGABYTE <= limit
    return row


def result_of(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What is printed and saved."""
    return {"rows": rows, "tokens_per_step": arguments.tokens, "cpus": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps a row (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the model files are written meanwhile")
    parser.add_argument("--keep", action="store_true", help="keep, and find again, these files")
    parser.add_argument("--save", action="store_true", help="write a dated file to results/")
    parser.add_argument("--row", nargs=3, metavar=("SHAPE", "MODE", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        shape, mode, path = arguments.row
        result = run_row(
            shape, mode, Path(path), num_tokens=arguments.tokens, num_steps=arguments.steps
        )
        print(json.dumps(result))
        return
    rows = []
    for shape_name in arguments.shapes:
        with ExitStack() as stack:
            folder = arguments.folder
            if not arguments.keep:
                temporary = tempfile.TemporaryDirectory(prefix="ollatune-bench-", dir=folder)
                folder = Path(stack.enter_context(temporary))
            path = Path(folder or tempfile.gettempdir()) / f"{shape_name}.gguf"
            if not path.exists():
                write_shaped_model(path, SHAPES[shape_name])
            for mode in arguments.modes:
                row = row_in_process(shape_name, mode, path, arguments)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr)
                if arguments.save:
                    places = [(shape, mode) for shape in SHAPES for mode in MODES]
                    together = with_earlier("memory", rows, ("shape", "mode"), places)
                    save("memory", result_of(together, arguments))
    if arguments.json:
        print(json.dumps(result_of(rows, arguments)))
        return
    for row in rows:
        print(
            f"{row['shape']:>5} {row['mode']:>7}  file {row['file_mb']} MB  peak {row['peak_mb']} MB  "
            f"{row['tokens_per_second']} tokens/s  {row.get('note', '')}"
        )


if __name__ == "__main__":
    main()
