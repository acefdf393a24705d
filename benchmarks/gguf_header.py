"""How long it takes to read a model file's header, beside `gguf.GGUFReader`: everything decoded in both."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf

from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import ValueType
from ollatune.gguf.writer import encode_metadata, write_gguf

NUM_TOKENS = 256_000
NUM_MERGES = 250_000
ROUNDS = 2


def write_vocabulary(
    path: Path, num_tokens: int = NUM_TOKENS, num_merges: int = NUM_MERGES
) -> None:
    """A file with a vocabulary of the size and the token lengths of today's large ones, and no tensors."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz ▁éüñ的是αβ"
    tokens = ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(num_tokens)]
    merges = [f"{rng.choice(tokens)} {rng.choice(tokens)}" for _ in range(num_merges)]

    def array(key: str, values: list[Any], element_type: ValueType) -> bytes:
        return encode_metadata(key, values, ValueType.ARRAY, element_type=element_type)

    records = [
        encode_metadata("general.architecture", "llama", ValueType.STRING),
        encode_metadata("tokenizer.ggml.model", "gpt2", ValueType.STRING),
        array("tokenizer.ggml.tokens", tokens, ValueType.STRING),
        array("tokenizer.ggml.token_type", [1] * num_tokens, ValueType.INT32),
        array("tokenizer.ggml.scores", [-1.0] * num_tokens, ValueType.FLOAT32),
        array("tokenizer.ggml.merges", merges, ValueType.STRING),
    ]
    write_gguf(path, records, [])


def _ours(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return dict(file.metadata)


def _reference(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def measure_header(path: Path | None = None, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times in seconds, alternating, and `header_ratio` (reference over ours, medians).

    `path` is a file to read instead of the generated one.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="ollatune-bench-") as folder:
            generated = Path(folder) / "vocabulary.gguf"
            write_vocabulary(generated)
            return measure_header(generated, rounds=rounds)
    seconds: dict[str, list[float]] = {"open": [], "ours": [], "reference": []}
    for _ in range(rounds):
        values = {}
        for name, read in (("ours", _ours), ("reference", _reference)):
            started = time.perf_counter()
            values[name] = read(path)
            seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        GGUFFile.open(path).close()
        seconds["open"].append(time.perf_counter() - started)
        if values["ours"] != values["reference"]:
            raise AssertionError("the two readers disagree")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "header_ratio": medians["reference"] / medians["ours"],
        "header_seconds": medians["ours"],
        "header_open_seconds": medians["open"],
        "header_reference_seconds": medians["reference"],
        "header_file_bytes": path.stat().st_size,
    }
