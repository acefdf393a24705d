"""Number types: fp16 with loss scaling, bf16 products over fp32 weights; NF4 and 8-bit moments by bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ollatune.checkpoint.format import read_checkpoint
from ollatune.config.schema import TrainingConfig
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, lora_layers
from ollatune.training import loss_scale
from ollatune.training.loss_scale import LossScale
from ollatune.training.optimizer import build_optimizer
from tests.run_helpers import (
    assert_same_weights,
    inject,
    last,
    run,
    steps_of,
    train_command,
)
from tests.tiny_models import tiny_gguf

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the quantization extra"
)
FP16 = ("--set", "model.dtype=fp16", "--set", "model.quantization=none")
NF4 = ("--set", "model.quantization=nf4")


def dtypes(value: Any) -> set[str]:
    """Number types of all tensors in nested dictionaries."""
    if isinstance(value, torch.Tensor):
        return {str(value.dtype)}
    if isinstance(value, dict):
        return set().union(*map(dtypes, value.values()))
    return set()


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in steps_of(output)]


# ----- loss scaling --------------------------------------------------------------------------------------------------


def test_the_scale_is_torchs() -> None:
    """The same good and bad steps as `torch.amp.GradScaler`."""
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    ours = LossScale.for_dtype("fp16")
    ours.growth_interval = 3
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for is_bad in (False, True, False, False, False, False, True, True, False, False, False):
        loss = theirs.scale((weight * (float("inf") if is_bad else 1.0)).sum())
        optimizer.zero_grad()
        loss.backward()
        theirs.step(optimizer)
        theirs.update()
        ours.overflowed() if is_bad else ours.went_well()
        assert ours.value == theirs.get_scale()


def test_without_fp16_there_is_no_scale() -> None:
    scale = LossScale.for_dtype("bf16")
    for _ in range(3000):
        scale.went_well()
    assert scale.value == 1.0
    assert not scale.can_shrink()


@pytest.mark.parametrize("more", [(), ("--set", "training.fast_path=false")], ids=["fast", "plain"])
def test_fp16_follows_fp32(base: Path, data: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    dropless = ("--set", "advanced.lora_dropout=0", *more)
    assert run(train_command(base, data, tmp_path / "fp16", *FP16, *dropless)) == 0
    fp32 = ("--set", "model.dtype=fp32", "--set", "model.quantization=none")
    assert run(train_command(base, data, tmp_path / "fp32", *fp32, *dropless)) == 0
    assert losses(tmp_path / "fp16") == pytest.approx(losses(tmp_path / "fp32"), rel=5e-3)
    assert losses(tmp_path / "fp16") != losses(tmp_path / "fp32")
    norms = [[s["grad_norm"] for s in steps_of(tmp_path / name)] for name in ("fp16", "fp32")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)  # unscaled again


def test_overflow_skips_halves_and_is_counted(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale far beyond fp16's range the run comes down to one that works; the weights are finite."""
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**40)
    command = train_command(base, data, tmp_path, *FP16, "--epochs", "20")
    assert run(command) == 0
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["steps"] == 40
    assert values["overflows"] == 40 - len(steps_of(tmp_path)) > 10
    saved = read_checkpoint(tmp_path / "checkpoints" / "epoch_20.pt")
    assert saved.is_finite()
    assert saved.resume["loss_scale"]["value"] == 2.0 ** (40 - values["overflows"])


def test_fp16_resumes_exactly_in_the_middle_of_coming_down(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 2.0**30)
    more = (*FP16, "--epochs", "12")
    assert run(train_command(base, data, tmp_path / "whole", *more)) == 0
    with inject("train.step:interrupt@5"):
        assert run(train_command(base, data, tmp_path / "cut", *more)) == 130
    assert run(train_command(base, data, tmp_path / "cut", *more, "--resume", "auto")) == 0
    name = "checkpoints/epoch_12.pt"
    assert_same_weights(tmp_path / "whole" / name, tmp_path / "cut" / name)
    first, second = (read_checkpoint(tmp_path / n / name).resume for n in ("whole", "cut"))
    assert first["loss_scale"] == second["loss_scale"]
    assert first["state"] == second["state"]
    assert first["state"]["num_overflows"] > 5


def test_a_loss_that_is_not_finite_is_not_the_scales_fault(
    base: Path, data: Path, tmp_path: Path
) -> None:
    with inject("train.loss:nan@2"):
        assert run(train_command(base, data, tmp_path, *FP16)) == 6


@pytest.mark.parametrize(("dtype", "close"), [("bf16", 3e-2), ("fp16", 5e-3)])
def test_all_weights_in_mixed_precision(
    base: Path, data: Path, tmp_path: Path, dtype: str, close: float
) -> None:
    """Weights and moments stay fp32, products are computed in the other type."""
    full = ("--set", "advanced.lora_enabled=false", "--learning-rate", "1e-3")
    for name in ("fp32", dtype):
        command = train_command(base, data, tmp_path / name, *full, "--set", f"model.dtype={name}")
        assert run(command) == 0
    assert losses(tmp_path / dtype) == pytest.approx(losses(tmp_path / "fp32"), rel=close)
    assert losses(tmp_path / dtype) != losses(tmp_path / "fp32")
    saved = read_checkpoint(last(tmp_path / dtype))
    assert {t.dtype for t in saved.model_state_dict.values()} == {torch.float32}


# ----- bitsandbytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", ["model.quantization=nf4", "training.optimizer=adamw_8bit"], ids=["nf4", "8 bit"]
)
def test_without_the_extra_the_error_says_how_to_get_it(
    base: Path, data: Path, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest),
    )  # fmt: skip
    assert run(train_command(base, data, tmp_path, "--set", setting)) == 2
    message = capsys.readouterr().err
    assert "pip install 'ollatune[quantization]'" in message
    assert setting.partition("=")[2] in message


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "gemma3", "phi3"])
def test_nf4_layers_are_the_decoded_ones(family: str, tmp_path: Path) -> None:
    """Forward and backward equal a dense layer that holds the decoded weights, which are near the file's own."""
    path = tiny_gguf(family, tmp_path)
    dense = load_base_model(GGUFFile.open(path))
    packed = load_base_model(GGUFFile.open(path), mode="nf4")
    names = [name for name, module in packed.named_modules() if hasattr(module, "size_bytes")]
    linear = {
        n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear) and ".layers." in n
    }
    assert set(names) == {n for n, m in linear.items() if m.in_features % 64 == 0}
    assert len(names) >= 8
    for name in names:
        layer, own = packed.get_submodule(name), dense.get_submodule(name)
        decoded = layer.dequantized()
        assert (decoded - own.weight).norm() < 0.12 * own.weight.norm()
        assert layer.size_bytes < 0.6 * own.weight.numel() + 200
        inputs = torch.randn(5, layer.in_features, requires_grad=True)
        wanted = nn.functional.linear(inputs, decoded, own.bias)
        torch.testing.assert_close(layer(inputs), wanted)
        gradient = torch.randn_like(wanted)
        (found,) = torch.autograd.grad(layer(inputs), inputs, gradient)
        (right,) = torch.autograd.grad(wanted, inputs, gradient)
        torch.testing.assert_close(found, right)


@needs_bitsandbytes
def test_nf4_is_bitsandbytes_own_layer(tmp_path: Path) -> None:
    from bitsandbytes.nn import LinearNF4

    packed = load_base_model(GGUFFile.open(tiny_gguf("llama", tmp_path)), mode="nf4")
    dense = load_base_model(GGUFFile.open(tiny_gguf("llama", tmp_path)))
    name = "model.layers.1.mlp.up_proj"
    theirs = LinearNF4(64, 128, bias=False)
    theirs.weight.data = dense.get_submodule(name).weight.data.clone()
    theirs = theirs.to("cpu")
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(
        packed.get_submodule(name)(inputs), theirs(inputs), rtol=1e-3, atol=1e-3
    )


@needs_bitsandbytes
def test_a_run_on_nf4_resumes_exactly_and_fast_is_plain(
    base: Path, data: Path, tmp_path: Path
) -> None:
    assert run(train_command(base, data, tmp_path / "whole", *NF4)) == 0
    with inject("train.step:interrupt@3"):
        assert run(train_command(base, data, tmp_path / "cut", *NF4)) == 130
    assert run(train_command(base, data, tmp_path / "cut", *NF4, "--resume", "auto")) == 0
    assert_same_weights(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert read_checkpoint(last(tmp_path / "cut")).base["mode"] == "nf4"
    dropless = (*NF4, "--set", "advanced.lora_dropout=0")
    assert run(train_command(base, data, tmp_path / "fast", *dropless)) == 0
    plain = ("--set", "training.fast_path=false")
    assert run(train_command(base, data, tmp_path / "plain", *dropless, *plain)) == 0
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "fast"), rel=1e-5)
    assert losses(tmp_path / "fast")[-1] < losses(tmp_path / "fast")[0]


@needs_bitsandbytes
def test_dora_on_nf4(tmp_path: Path) -> None:
    model = load_base_model(GGUFFile.open(tiny_gguf("llama", tmp_path)), mode="nf4")
    inject_lora(model, LoRASettings(4, 8.0, 0.0, use_dora=True), seed=1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1)
        merged = layer.delta_update(layer.base.dequantized())
        inputs = torch.randn(2, layer.in_features)
        torch.testing.assert_close(layer(inputs), inputs @ merged.T, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_all_weights_cannot_be_nf4(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(base, data, tmp_path, *NF4, "--set", "advanced.lora_enabled=false")
    assert run(command) == 2
    assert "in NF4" in capsys.readouterr().err


@needs_bitsandbytes
def test_eight_bit_adamw_is_near_adamw_and_resumes_exactly(
    base: Path, data: Path, tmp_path: Path
) -> None:
    full = ("--set", "advanced.lora_enabled=false", "--learning-rate", "1e-3")
    eight = (*full, "--set", "training.optimizer=adamw_8bit")
    assert run(train_command(base, data, tmp_path / "adamw", *full)) == 0
    assert run(train_command(base, data, tmp_path / "whole", *eight)) == 0
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "adamw"), rel=0.02)
    with inject("train.step:interrupt@3"):
        assert run(train_command(base, data, tmp_path / "cut", *eight)) == 130
    assert run(train_command(base, data, tmp_path / "cut", *eight, "--resume", "auto")) == 0
    assert_same_weights(last(tmp_path / "whole"), last(tmp_path / "cut"))
    assert "torch.uint8" in dtypes(read_checkpoint(last(tmp_path / "cut")).optimizer_state_dict)


@needs_bitsandbytes
def test_eight_bit_moments_take_the_groups_decay() -> None:
    matrix, norm = nn.Parameter(torch.ones(80, 80)), nn.Parameter(torch.ones(80))
    settings = TrainingConfig(optimizer="adamw_8bit", learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer([("layer.weight", matrix), ("norm.weight", norm)], settings)
    matrix.grad, norm.grad = torch.zeros_like(matrix), torch.zeros_like(norm)
    optimizer.step()
    assert float(matrix.detach()[0, 0]) == pytest.approx(0.95)
    assert float(norm.detach()[0]) == 1.0
