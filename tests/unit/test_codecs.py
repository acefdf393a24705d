"""Block codecs against `gguf.quants`: every bit of what is decoded and encoded."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from ollatune.base.errors import InputError
from ollatune.gguf.codecs import DECODABLE, FALLBACK_TYPES, check_columns, dequantize, quantize
from ollatune.gguf.types import GGMLType

NUM_COLUMNS = 1024
BIT_IDENTICAL = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"]

# Byte ranges of the float16 scales in a block.
SCALE_BYTES = {
    "Q8_0": (0, 2),
    "Q4_0": (0, 2),
    "Q4_1": (0, 4),
    "Q5_0": (0, 2),
    "Q5_1": (0, 4),
    "IQ4_NL": (0, 2),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
    "IQ4_XS": (0, 2),
}
EDGE_SCALES = np.array(
    [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0, np.inf, -np.inf, np.nan],
    dtype=np.float16,
)


def reference_type(type: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(type))


def random_rows(type: GGMLType, num_rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_rows, type.row_bytes(NUM_COLUMNS)), dtype=np.uint8)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal as bits, signs of zero included; any NaN equals any other."""
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    is_same = got.view(np.int32) == expected.view(np.int32)
    assert (is_same | (np.isnan(got) & np.isnan(expected))).all()


def reference_decode(rows: np.ndarray, type: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, reference_type(type))


@pytest.mark.parametrize("type", sorted(DECODABLE), ids=lambda type: type.name)
def test_decodes_random_blocks_to_the_bit(type: GGMLType) -> None:
    rows = random_rows(type, 70)
    got = dequantize(torch.from_numpy(rows), type)
    assert_same_bits(got.numpy(), reference_decode(rows, type))


@pytest.mark.parametrize("type", sorted(DECODABLE), ids=lambda type: type.name)
def test_decodes_a_single_block_wherever_it_lies(type: GGMLType) -> None:
    blocks = random_rows(type, 1, seed=4).reshape(-1, type.block_bytes)
    stored = torch.from_numpy(blocks)
    for row in range(len(blocks[:5])):
        got = dequantize(stored[row], type)
        assert_same_bits(got.numpy(), reference_decode(blocks[row : row + 1], type)[0])


@pytest.mark.parametrize("name", SCALE_BYTES)
def test_decodes_edge_scales_to_the_bit(name: str) -> None:
    type = GGMLType[name]
    blocks = random_rows(type, 64).reshape(-1, type.block_bytes)
    first, last = SCALE_BYTES[name]
    rng = np.random.default_rng(1)
    scales = rng.choice(EDGE_SCALES, (len(blocks), (last - first) // 2))
    blocks[:, first:last] = scales.view(np.uint8).reshape(len(blocks), -1)
    got = dequantize(torch.from_numpy(blocks), type)
    assert_same_bits(got.numpy(), reference_decode(blocks, type))


def test_decodes_more_than_one_chunk_and_keeps_leading_dimensions() -> None:
    rows = random_rows(GGMLType.Q6_K, 300).reshape(3, 100, -1)
    got = dequantize(torch.from_numpy(rows), GGMLType.Q6_K)
    assert got.shape == (3, 100, NUM_COLUMNS)
    assert_same_bits(got.numpy(), reference_decode(rows, GGMLType.Q6_K))


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.F16])
def test_other_dtypes_are_the_rounded_float32(type: GGMLType) -> None:
    rows = torch.from_numpy(random_rows(type, 200))
    expected = dequantize(rows, type).to(torch.bfloat16)
    assert torch.equal(
        dequantize(rows, type, dtype=torch.bfloat16).nan_to_num(), expected.nan_to_num()
    )
    out = torch.empty_like(expected)
    assert dequantize(rows, type, out=out) is out
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_decodes_bytes_that_begin_anywhere() -> None:
    rows = random_rows(GGMLType.Q4_K, 4)
    shifted = torch.zeros(rows.size + 3, dtype=torch.uint8)
    shifted[3:] = torch.from_numpy(rows).view(-1)
    got = dequantize(shifted[3:].view(rows.shape), GGMLType.Q4_K)
    assert_same_bits(got.numpy(), reference_decode(rows, GGMLType.Q4_K))


def awkward_weights() -> np.ndarray:
    """Heavy-tailed rows, and rows that make scales zero, ties in rounding, and ties of the extremes."""
    rng = np.random.default_rng(2)
    weights = (0.02 * rng.standard_t(4, (40, NUM_COLUMNS))).astype(np.float32)
    weights[0] = 0.0
    weights[1] = 1.0
    weights[2] = -1.0
    weights[3, ::2] = 0.5
    weights[4, ::2], weights[4, 1::2] = -0.25, 0.25
    weights[5:20] = 0.25 * rng.integers(-8, 8, (15, NUM_COLUMNS))
    weights[20:25] = rng.integers(-127, 128, (5, NUM_COLUMNS)) * 0.5
    weights[25] = 1e-7 * weights[26]
    return weights


@pytest.mark.parametrize("name", BIT_IDENTICAL)
def test_encodes_as_the_reference_to_the_bit(name: str) -> None:
    weights = awkward_weights()
    type = GGMLType[name]
    expected = gguf.quants.quantize(weights, reference_type(type)).view(np.uint8)
    assert np.array_equal(quantize(torch.from_numpy(weights), type).numpy(), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "Q5_1"])
def test_refuses_weights_that_no_block_can_hold(name: str, bad: float) -> None:
    weights = torch.zeros(3, 64)
    weights[1, 5] = bad
    with pytest.raises(InputError, match=r"NaN, infinite or beyond"):
        quantize(weights, GGMLType[name])


def test_names_the_fallback_of_widths_that_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"576 weights.*Use Q8_0 for this tensor"):
        check_columns(576, GGMLType.Q6_K)
    with pytest.raises(InputError, match=r"Use F16"):
        quantize(torch.zeros(2, 100), GGMLType.Q8_0)
    assert FALLBACK_TYPES[GGMLType.Q4_K] is GGMLType.Q5_0


def test_refuses_types_and_bytes_it_does_not_know() -> None:
    with pytest.raises(InputError, match=r"IQ2_XXS cannot be decoded.*Q4_K"):
        dequantize(torch.zeros(66, dtype=torch.uint8), GGMLType.IQ2_XXS)
    with pytest.raises(InputError, match=r"multiple of 34 bytes"):
        dequantize(torch.zeros(35, dtype=torch.uint8), GGMLType.Q8_0)
    with pytest.raises(InputError, match=r"cannot be stored as IQ4_NL"):
        quantize(torch.zeros(32), GGMLType.IQ4_NL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("type", sorted(DECODABLE), ids=lambda type: type.name)
def test_cuda_decodes_the_same_bits(type: GGMLType) -> None:
    rows = random_rows(type, 70)
    got = dequantize(torch.from_numpy(rows).cuda(), type)
    assert got.is_cuda
    assert_same_bits(got.cpu().numpy(), reference_decode(rows, type))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [*BIT_IDENTICAL, "Q4_K", "Q6_K"])
def test_cuda_encodes_as_well(name: str) -> None:
    weights, type = torch.from_numpy(awkward_weights()), GGMLType[name]
    on_cpu, on_cuda = quantize(weights, type), quantize(weights.cuda(), type).cpu()
    if name in BIT_IDENTICAL:
        assert torch.equal(on_cuda, on_cpu)
        return
    errors = [(dequantize(blocks, type) - weights).square().mean() for blocks in (on_cuda, on_cpu)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0.0)
