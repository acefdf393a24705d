"""How a base is held: packed where that costs nothing, else by the memory there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ollatune.config.schema import Config
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.native import kernels
from ollatune.modeling.opened import OpenBase
from ollatune.training import placement
from ollatune.training.placement import checking_mode, choose_mode, computes_on_blocks
from tests.tiny_models import tiny_gguf

CPU = torch.device("cpu")


def opened(folder: Path, tensor_type: str) -> OpenBase:
    """A base as far as its placement is concerned: the file and a name."""
    gguf = GGUFFile.open(tiny_gguf("llama", folder, tensor_type=tensor_type, hidden_size=256))
    return cast(OpenBase, SimpleNamespace(gguf=gguf, source=SimpleNamespace(name="tiny")))


def with_setting(**settings: object) -> Config:
    return Config.model_validate({"training": settings})


@pytest.mark.parametrize(
    ("tensor_type", "dtype", "settings", "expected"),
    [
        ("Q8_0", "bf16", {}, True),
        ("Q4_0", "bf16", {}, True),
        ("Q8_0", "fp32", {}, False),
        ("Q8_0", "bf16", {"native_kernels": False}, False),
        ("Q3_K", "bf16", {}, False),  # a type that only the codecs decode
        ("F32", "bf16", {}, False),  # nothing is in blocks
    ],
)
def test_kernels_compute_on_blocks_that_they_can_read(
    tensor_type: str, dtype: str, settings: dict[str, object], expected: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = opened(tmp_path, tensor_type)
    monkeypatch.setattr(kernels, "available", lambda: True)
    config = with_setting(**settings)
    assert computes_on_blocks(config, base.gguf, dtype, CPU) == expected
    assert (choose_mode(config, base, dtype, CPU) == "packed") == expected
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert not computes_on_blocks(config, base.gguf, dtype, CPU)
    assert choose_mode(config, base, dtype, CPU) == "dense"
    monkeypatch.setattr(placement, "free_memory_bytes", lambda device: 1000)
    assert choose_mode(config, base, dtype, CPU) == "packed"


def test_compiled_layers_and_full_training_take_dense_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tmp_path, "Q8_0")
    monkeypatch.setattr(kernels, "available", lambda: True)
    assert choose_mode(Config(), base, "bf16", CPU) == "packed"
    assert choose_mode(with_setting(torch_compile=True), base, "bf16", CPU) == "dense"
    full = Config.model_validate({"advanced": {"lora_enabled": False}})
    assert choose_mode(full, base, "bf16", CPU) == "dense"


def test_a_check_holds_the_base_dense_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tmp_path, "Q8_0")
    size = placement.dense_bytes(base, "fp32")
    monkeypatch.setattr(placement, "free_memory_bytes", lambda device: 4 * size)
    assert checking_mode(Config(), base, num_models=2) == "dense"
    monkeypatch.setattr(placement, "free_memory_bytes", lambda device: 4 * size - 1)
    assert checking_mode(Config(), base, num_models=2) == "packed"
    full = Config.model_validate({"advanced": {"lora_enabled": False}})
    assert checking_mode(full, base, num_models=2) == "dense"
