"""An adapter trained on the weights that are served beside one trained on more precise weights and served on those.

    python benchmarks/base_precision.py --json

There is no float16 release of SmolLM2-135M in a package index, so one is made: the Q4_1 weights, decoded and stored as
F16, stand for the precise base. It is quantised to the served types as a release would be. Then an adapter is trained
packed on the served file, another of the same settings on the precise one, and llama.cpp serves both on the served
file: `rows` with the loss of the held-out answers in nats a token and the exact match of greedy ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder has a file named gguf.py

import torch  # noqa: E402
from benchmarks.results import add_output_options, publish  # noqa: E402
from benchmarks.smollm2 import (  # noqa: E402
    CONTEXT,
    FOLDER,
    PARALLEL,
    ask,
    end_of_turn,
    remembered,
    train_once,
)

from ollatune.commands.create_modelfile import ExportOptions, run_create_modelfile  # noqa: E402
from ollatune.commands.verify import held_out_samples, load_run, read_modelfile  # noqa: E402
from ollatune.evaluation.engine import LlamaCppEngine  # noqa: E402
from ollatune.evaluation.served import LlamaCppServed  # noqa: E402
from ollatune.export.apply import apply_export  # noqa: E402
from ollatune.export.metadata_edits import SetKey, edited_records  # noqa: E402
from ollatune.export.plan import plan_export  # noqa: E402
from ollatune.gguf.codecs import quantize  # noqa: E402
from ollatune.gguf.decode import decode_tensor  # noqa: E402
from ollatune.gguf.reader import GGUFFile  # noqa: E402
from ollatune.gguf.types import GGMLType, ValueType  # noqa: E402
from ollatune.gguf.writer import TensorToWrite, write_gguf  # noqa: E402
from ollatune.modeling.embedded import fetch_embedded  # noqa: E402

SERVED_TYPES = ("all_q4_0", "q4_K_M")
MOSTLY_F16 = 1  # LLAMA_FTYPE_MOSTLY_F16


def _as_f16(file: GGUFFile, name: str) -> Iterator[bytes]:
    yield quantize(decode_tensor(file, name), GGMLType.F16).numpy().tobytes()


def precise_base(path: Path) -> Path:
    """SmolLM2-135M with every quantised tensor stored as F16."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with GGUFFile.open(fetch_embedded("smollm2-135m")) as file:
        tensors = []
        for name, info in file.tensors.items():
            if info.type.is_quantized:
                produce = partial(_as_f16, file, name)
                tensors.append(TensorToWrite(name, info.shape, GGMLType.F16, produce))
            else:
                stored = partial(lambda file, name: [file.tensor_data(name)], file, name)
                tensors.append(TensorToWrite(name, info.shape, info.type, stored))
        edit = SetKey("general.file_type", MOSTLY_F16, ValueType.UINT32)
        write_gguf(path, edited_records(file, [edit]), tensors)
    return path


def quantised_base(precise: Path, mix: str, folder: Path) -> Path:
    """The precise base quantised as a release of it would be."""
    path = folder / mix / "base.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with GGUFFile.open(precise) as file:
            apply_export(plan_export(file, [], tensor_type=mix), path)
    return path


def ask_on(base_path: Path, checkpoint: Path, folder: Path, *, adapted: bool) -> dict[str, Any]:
    """Serve the file at `base_path`, with the checkpoint's adapter or without, and ask the held-out questions."""
    run_create_modelfile(ExportOptions(checkpoint, folder, format="adapter"))
    _, config, base = load_run(checkpoint)
    samples = held_out_samples(config, None)
    modelfile = read_modelfile(folder)
    assert modelfile.adapter is not None
    adapter = folder / modelfile.adapter if adapted else None
    with LlamaCppEngine(base_path, context=CONTEXT, parallel=PARALLEL, adapter=adapter) as engine:
        stops = modelfile.parameters.get("stop", [])
        served = LlamaCppServed(engine, base.template, stops=stops)
        return ask(served, samples, end_of_turn(base))


def rows_of(mix: str, precise: Path, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Both adapters served on the `mix` file; and the precise one on the base it was trained on."""
    served_path = quantised_base(precise, mix, folder)
    on_served = train_once(str(served_path), "as-served", training__seed=seed)
    on_precise = train_once(str(precise), "none", training__seed=seed)
    cases = [
        ("served (packed)", mix, on_served, served_path, True),
        ("precise (F16)", mix, on_precise, served_path, True),
        ("precise (F16)", "F16", on_precise, precise, True),
        ("untrained", mix, on_served, served_path, False),
    ]
    rows = []
    for trained_on, served_as, checkpoint, base_path, adapted in cases:
        row: dict[str, Any] = {"served": served_as, "trained_on": trained_on, "seed": seed}
        adapter_folder = folder / mix / f"adapter-{checkpoint.parent.name}"
        ask_it = partial(ask_on, base_path, checkpoint, adapter_folder, adapted=adapted)
        name = f"{served_as}-{checkpoint.parent.name}-{adapted}.json"
        rows.append(row | remembered(folder / mix / name, ask_it))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_options(parser)
    parser.add_argument("--types", nargs="+", default=list(SERVED_TYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    arguments = parser.parse_args()
    folder = FOLDER / "base-precision"
    precise = precise_base(folder / "smollm2-135m-f16.gguf")
    with torch.no_grad():
        sizes = {"F16": precise.stat().st_size}
        for mix in arguments.types:
            sizes[mix] = quantised_base(precise, mix, folder).stat().st_size
    rows = []
    for mix in arguments.types:
        for seed in arguments.seeds:
            rows += rows_of(mix, precise, folder, seed)
    result = {"size_bytes": sizes, "rows": rows}
    publish("base-precision", result, arguments)


if __name__ == "__main__":
    main()
