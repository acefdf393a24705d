"""Encoders against llama.cpp's own quantisers (libgguf compiles them unchanged), on real and on awkward weights."""

from __future__ import annotations

from pathlib import Path

import libgguf
import numpy as np
import pytest
import torch

from ollatune.gguf.codecs import dequantize, quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType

K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def reference_blocks(weights: torch.Tensor, type: GGMLType) -> torch.Tensor:
    return torch.from_numpy(libgguf.quantize_rows(weights.numpy(), int(type)).view(np.uint8))


def rmse(weights: torch.Tensor, blocks: torch.Tensor, type: GGMLType) -> float:
    return float((dequantize(blocks, type) - weights).double().square().mean().sqrt())


def importance_rmse(weights: torch.Tensor, blocks: torch.Tensor, type: GGMLType) -> float:
    """The error that ggml itself weighs: |x| plus the root mean square of 32 weights."""
    x = weights.reshape(-1, 32).double()
    error = dequantize(blocks, type).reshape(-1, 32) - x
    importance = x.abs() + x.square().mean(1, keepdim=True).sqrt()
    return float((importance * error.square()).mean().sqrt())


def random_weights(num_rows: int = 512) -> torch.Tensor:
    """Rows of every tail and size: from normal to heavy, scales over three orders of magnitude."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.standard_t(df, 1024) for df in rng.choice([3, 5, 30], num_rows)])
    rows *= 10.0 ** rng.uniform(-4, -1, (num_rows, 1))
    return torch.from_numpy(rows.astype(np.float32))


def real_weights(path: Path, name: str) -> torch.Tensor:
    with GGUFFile.open(path) as file:
        info = file.tensors[name]
        stored = torch.from_numpy(np.array(file.tensor_data(name)))
    return dequantize(stored, info.type).reshape(-1, 256)[:2048]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_legacy_types_are_the_engines_bits(name: str) -> None:
    weights = random_weights(64)
    assert torch.equal(quantize(weights, GGMLType[name]), reference_blocks(weights, GGMLType[name]))


@pytest.mark.parametrize("name", K_TYPES)
def test_error_on_random_weights_is_no_larger(name: str) -> None:
    weights = random_weights()
    ours = quantize(weights, GGMLType[name])
    theirs = reference_blocks(weights, GGMLType[name])
    for row, error in enumerate((rmse, importance_rmse)):
        assert error(weights, ours, GGMLType[name]) <= error(weights, theirs, GGMLType[name]), row


@pytest.mark.weights
@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.10.ffn_down.weight"])
@pytest.mark.parametrize("name", K_TYPES)
def test_error_on_real_weights_is_no_larger(name: str, tensor: str, smollm2_path: Path) -> None:
    weights = real_weights(smollm2_path, tensor)
    ours = quantize(weights, GGMLType[name])
    theirs = reference_blocks(weights, GGMLType[name])
    for error in (rmse, importance_rmse):
        assert error(weights, ours, GGMLType[name]) <= error(weights, theirs, GGMLType[name])


@pytest.mark.parametrize("name", K_TYPES)
def test_the_engine_decodes_our_blocks_to_our_weights(name: str) -> None:
    type = GGMLType[name]
    blocks = quantize(random_weights(16), type)
    raw = libgguf.dequantize_rows_raw(int(type), blocks.numpy().tobytes(), 16, 1024)
    theirs = np.frombuffer(raw, np.float32).reshape(16, 1024)
    assert np.array_equal(dequantize(blocks, type).numpy(), theirs)


@pytest.mark.parametrize("name", K_TYPES)
def test_no_awkward_block_is_lost(name: str) -> None:
    """Zeros, constants of both signs, one outlier, all positive, all negative, and weights below a half's range."""
    type = GGMLType[name]
    weights = torch.zeros(10, 256)
    weights[1], weights[2] = 0.5, -0.5
    weights[3, 7] = 3.0
    weights[4] = torch.linspace(0.5, 1.0, 256)
    weights[5] = -weights[4]
    weights[6] = torch.linspace(-1e-7, 1e-7, 256)
    weights[7, ::2] = 1.0
    weights[8] = torch.linspace(-1, 1, 256).sign()
    weights[9] = 6e4 * torch.linspace(-1, 1, 256)
    ours, theirs = quantize(weights, type), reference_blocks(weights, type)
    for row in range(len(weights)):
        ours_rmse = rmse(weights[row], ours[row], type)
        bound = 1.4 * rmse(weights[row], theirs[row], type) + 1e-3 * float(weights[row].abs().max())
        assert ours_rmse <= bound, row
