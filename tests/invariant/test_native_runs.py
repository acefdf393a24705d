"""Runs on the compiled kernels, in bf16 with dropout: the same twice, and resumed as uninterrupted, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ollatune.modeling.fast.native import kernels
from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    tiny_base,
    train_command,
    write_records,
)

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.state())
MORE = {
    "lora": ("--set", "advanced.lora_dropout=0.3"),
    "packed": (
        "--set",
        "advanced.lora_dropout=0.3",
        "--set",
        "model.quantization=as-served",
    ),
    "full": ("--set", "advanced.lora_enabled=false"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), train=8, validation=2, test=0)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setenv("OMP_NUM_THREADS", str(request.param))  # as it is: runs leave it alone
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    seen: list[str] = []
    original = kernels._call

    def call(name: str, *arguments: object) -> int:
        seen.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(kernels, "_call", call)
    for module in ("attention", "blocks", "loss", "decoder", "linear_group"):
        imported = __import__(f"ollatune.modeling.fast.{module}", fromlist=["_"])
        if hasattr(imported, "_call"):
            monkeypatch.setattr(imported, "_call", call)
    return seen


@pytest.mark.parametrize("kind", list(MORE))
def test_twice_and_resumed_are_one(
    data: Path, tmp_path: Path, kind: str, num_threads: int, calls: list[str]
) -> None:
    tensor_type = {"tensor_type": "Q8_0"} if kind == "packed" else {}
    base = tiny_base(tmp_path, **tensor_type)

    def command(name: str, *more: str) -> list[str]:
        bf16 = ("--set", "model.dtype=bf16", "--set", "validation.samples=0")
        return train_command(base, data, tmp_path / name, *bf16, *MORE[kind], *more)

    assert run(command("first")) == 0
    if kind != "full":  # which computes its products in mixed precision
        assert len(set(calls)) >= 4, set(calls)
    assert run(command("second")) == 0
    with inject("train.step:interrupt@4"):
        assert run(command("resumed")) == 130
    assert run(command("resumed", "--resume", "auto")) == 0
    for name in ("first", "second", "resumed"):
        export = tmp_path / name / "export"
        best = tmp_path / name / "best_model.pt"
        assert run(["create-modelfile", "--checkpoint", best, "--output", export]) == 0
    for name in ("second", "resumed"):
        assert steps_of(tmp_path / name) == steps_of(tmp_path / "first")
        last = "checkpoints/epoch_2.pt"
        assert_same_weights(tmp_path / "first" / last, tmp_path / name / last)
        files = ["export/model.gguf"] + ([] if kind == "full" else ["adapter_model.safetensors"])
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
