"""LoRA as a GGUF adapter: what llama.cpp computes from the file is what was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ollatune.base.errors import DivergedError, InputError, UsageError
from ollatune.base.files import sha256_file
from ollatune.export.adapter_gguf import LoraFactors, write_adapter
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf
from tests.export_cases import lora_factors, shapes, write_small_base

QUERY, DOWN, EXPERTS = "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.0.ffn_gate_exps.weight"


@pytest.fixture
def base(tmp_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(write_small_base(tmp_path / "base.gguf")) as file:
        yield file


def factors(name: str, *, rank: int = 4, scale: float = 2.0) -> LoraFactors:
    a, b = lora_factors(shapes()[name], seed=len(name), rank=rank)
    return a, b, scale


def served_delta(path: Path, name: str) -> Tensor:
    """alpha/rank · B·A by llama.cpp's rule, from what the reference reads in the file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    rank = int(b.shape[0])  # ne[0]
    a_values = torch.from_numpy(np.array(a.data, np.float32))
    b_values = torch.from_numpy(np.array(b.data, np.float32))
    return (alpha / rank if alpha else 1.0) * b_values @ a_values


def test_the_file_is_an_adapter_for_its_base(base: GGUFFile, tmp_path: Path) -> None:
    lora = {QUERY: factors(QUERY), DOWN: factors(DOWN)}
    result = write_adapter(base, lora, tmp_path / "adapter.gguf", name="mine")
    fields = gguf.GGUFReader(result.path).fields
    found = {key: fields[key].contents() for key in fields if not key.startswith("GGUF.")}
    assert found == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "general.file_type": 0,
        "general.name": "mine",
    }
    with GGUFFile.open(result.path) as written:
        assert written.metadata_type("adapter.lora.alpha") is ValueType.FLOAT32
        assert {name: info.shape for name, info in written.tensors.items()} == {
            f"{QUERY}.lora_a": (4, 64),
            f"{QUERY}.lora_b": (64, 4),
            f"{DOWN}.lora_a": (4, 96),
            f"{DOWN}.lora_b": (64, 4),
        }
    assert (result.num_pairs, result.num_folded, result.alpha) == (2, 0, 8.0)
    assert result.sha256 == sha256_file(result.path)
    assert result.size_bytes == result.path.stat().st_size


def test_equal_scales_leave_the_factors_untouched(base: GGUFFile, tmp_path: Path) -> None:
    a, b, _ = factors(QUERY)
    scale = 16 / math.sqrt(4)  # rsLoRA
    result = write_adapter(base, {QUERY: (a, b, scale)}, tmp_path / "adapter.gguf")
    assert result.alpha == scale * 4
    with GGUFFile.open(result.path) as written:
        assert written.tensor_data(f"{QUERY}.lora_a").tobytes() == a.numpy().tobytes()
        assert written.tensor_data(f"{QUERY}.lora_b").tobytes() == b.numpy().tobytes()


def test_patterns_are_folded_into_b(base: GGUFFile, tmp_path: Path) -> None:
    lora = {
        QUERY: factors(QUERY, rank=4, scale=2.0),
        "blk.1.attn_q.weight": factors("blk.1.attn_q.weight", rank=4, scale=2.0),
        DOWN: factors(DOWN, rank=8, scale=0.3),
        "blk.0.attn_v.weight": factors("blk.0.attn_v.weight", rank=2, scale=0.0),
    }
    result = write_adapter(base, lora, tmp_path / "adapter.gguf")
    assert (result.alpha, result.num_folded) == (8.0, 2)
    for name, (a, b, scale) in lora.items():
        torch.testing.assert_close(served_delta(result.path, name), scale * b @ a)


def test_a_scale_of_zero_adds_nothing(base: GGUFFile, tmp_path: Path) -> None:
    a, b, _ = factors(QUERY)
    result = write_adapter(base, {QUERY: (a, b, 0.0)}, tmp_path / "adapter.gguf")
    assert result.alpha == 1.0  # 0 would mean "no scaling" to llama.cpp
    assert torch.equal(served_delta(result.path, QUERY), torch.zeros(64, 64))


def test_stacked_experts(base: GGUFFile, tmp_path: Path) -> None:
    a, b, scale = factors(EXPERTS)
    result = write_adapter(base, {EXPERTS: (a, b, scale)}, tmp_path / "adapter.gguf")
    torch.testing.assert_close(served_delta(result.path, EXPERTS), scale * b @ a)


def test_half_precision(base: GGUFFile, tmp_path: Path) -> None:
    a, b, scale = factors(QUERY)
    path = tmp_path / "adapter.gguf"
    write_adapter(base, {QUERY: (a, b, scale)}, path, tensor_type=GGMLType.F16)
    expected = scale * b.half().float() @ a.half().float()
    torch.testing.assert_close(served_delta(path, QUERY), expected)
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == 1


def base_with_output(path: Path) -> Path:
    tensors = [
        TensorToWrite(name, (48, 64), GGMLType.F16, lambda: [bytes(48 * 64 * 2)])
        for name in ("token_embd.weight", "output.weight")
    ]
    architecture = encode_metadata("general.architecture", "llama", ValueType.STRING)
    write_gguf(path, [architecture], tensors)
    return path


def test_the_token_embedding_is_flipped(tmp_path: Path) -> None:
    a, b = lora_factors((48, 64), seed=1)
    with GGUFFile.open(base_with_output(tmp_path / "base.gguf")) as base:
        result = write_adapter(base, {"token_embd.weight": (a, b, 2.0)}, tmp_path / "adapter.gguf")
    with GGUFFile.open(result.path) as written:
        stored_a = written.tensors["token_embd.weight.lora_a"]
        assert stored_a.shape == (48, 4)  # looked up by token
        assert written.tensors["token_embd.weight.lora_b"].shape == (64, 4)
        assert written.tensor_data(stored_a.name).tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize(
    ("lora", "error", "expected"),
    [
        ({}, InputError, "no factors"),
        ({"blk.0.attn_z.weight": factors(QUERY)}, InputError, "is not in the base. Did you mean"),
        ({QUERY: factors(DOWN)}, InputError, r"\(64, 64\) has factors A \(4, 96\) and B \(64, 4\)"),
        (
            {QUERY: (torch.zeros(4, 64), torch.zeros(64, 8), 1.0)},
            InputError,
            r"has factors A \(4, 64\) and B \(64, 8\)",
        ),
        (
            {"output_norm.weight": (torch.zeros(4, 64), torch.zeros(64, 4), 1.0)},
            InputError,
            r"\(64,\) has factors",
        ),
        (
            {"token_embd.weight": factors("token_embd.weight")},
            InputError,
            "also this model's output layer",
        ),
        (
            {QUERY: (torch.full((4, 64), float("inf")), torch.zeros(64, 4), 1.0)},
            DivergedError,
            "NaN or infinity",
        ),
    ],
)
def test_factors_that_do_not_fit(
    base: GGUFFile,
    tmp_path: Path,
    lora: dict[str, LoraFactors],
    error: type[Exception],
    expected: str,
) -> None:
    with pytest.raises(error, match=expected):
        write_adapter(base, lora, tmp_path / "out" / "adapter.gguf")
    assert not (tmp_path / "out").exists()


def test_only_plain_types(base: GGUFFile, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Choose one of f32, f16"):
        write_adapter(base, {QUERY: factors(QUERY)}, tmp_path / "a.gguf", tensor_type=GGMLType.Q8_0)
