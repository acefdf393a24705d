"""`training.torch_compile`: the same losses, gradients, random numbers and checkpoints as uncompiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ollatune.checkpoint.format import read_checkpoint
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.compiled import compile_layers, warm_up
from ollatune.modeling.fast.forward import (
    CausalStep,
    PackedRow,
    evaluation_mode,
    generate_greedy,
)
from ollatune.modeling.fast.segments import Segment
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import (
    LoRALinear,
    LoRASettings,
    inject_lora,
    lora_layers,
    trainable_parameters,
)
from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    tiny_base,
    train_command,
)
from tests.tiny_models import tiny_gguf

COMPILED = ("--set", "training.torch_compile=true", "--set", "model.quantization=none")


def row_of(*lengths: int) -> PackedRow:
    """Examples of these lengths; every position has a target."""
    ids = torch.arange(sum(lengths)) * 7 % 300
    positions = torch.cat([torch.arange(length) for length in lengths])
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    segments = [Segment(start, length) for start, length in zip(starts, lengths, strict=True)]
    return PackedRow(ids, positions, segments, torch.arange(len(ids)), ids * 3 % 300, len(ids))


def model_of(path: Path, trains: str) -> nn.Module:
    """Dropout where an adapter is trained, so that random numbers count."""
    model: nn.Module = load_base_model(GGUFFile.open(path))
    if trains == "all weights":
        return model.requires_grad_(True).train()
    settings = LoRASettings(4, 8.0, 0.1, layers=1, use_dora=trains == "dora")
    inject_lora(model, settings, seed=3)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "trains", "recompute"),
    [
        ("llama", "adapter", True),
        ("qwen2", "dora", False),
        ("gemma3", "all weights", False),
        ("mixtral", "adapter", False),
    ],
)
def test_compiled_layers_are_the_layers(
    family: str, trains: str, recompute: bool, tmp_path: Path
) -> None:
    """Rows of other lengths and numbers of segments than the one that was compiled on; none compiles anew."""
    path = tiny_gguf(family, tmp_path)
    plain, compiled = model_of(path, trains), model_of(path, trains)
    compile_layers(compiled, recompute=recompute)
    steps = [CausalStep(model, use_fast_path=False) for model in (plain, compiled)]
    warm_up(steps[1], [p for _, p in trainable_parameters(compiled)])
    assert all(p.grad is None for p in compiled.parameters())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for row in (row_of(20, 30), row_of(7), row_of(9, 9, 40, 2)):
        found = []
        for step in steps:
            torch.manual_seed(5)
            step.model.zero_grad()
            loss = step.loss_sum(row)
            loss.backward()
            with evaluation_mode(step.model):
                found.append((loss.item(), *step.evaluate(row)))
        assert found[1] == pytest.approx(found[0], rel=1e-5)
        wanted = {name: p.grad for name, p in trainable_parameters(plain)}
        for name, parameter in trainable_parameters(compiled):
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert list(compiled.state_dict()) == list(plain.state_dict())
    answers = [
        generate_greedy(m, [3, 1, 4], max_new_tokens=6, stop_ids=frozenset())
        for m in (plain, compiled)
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_adapter_has_its_scale(dtype: torch.dtype) -> None:
    """With and without gradient, by the definition in fp64; the adapter's part is as large as the base's."""
    base = nn.Linear(576, 576, bias=False).to(dtype).requires_grad_(False)
    layer = LoRALinear(base, 8, 24.0)
    layer.lora_B.data.normal_(0, 0.1)
    compiled = torch.compile(lambda values: layer(values), dynamic=True)
    inputs = torch.randn(61, 576).to(dtype)
    low = inputs.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    wanted = (inputs.double() @ base.weight.double().T + 3.0 * low).to(dtype)
    close = 1e-4 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs), wanted, rtol=close, atol=close)
    torch.testing.assert_close(compiled(inputs), wanted, rtol=close, atol=close)


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_resumes_exactly(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """With dropout; the resumed run has compiled everything anew."""
    plain = ("--set", "training.fast_path=false")
    assert run(train_command(base, data, tmp_path / "plain", *plain)) == 0
    assert run(train_command(base, data, tmp_path / "whole", *COMPILED)) == 0
    for key in ("loss", "grad_norm"):
        pairs = [[s[key] for s in steps_of(tmp_path / name)] for name in ("plain", "whole")]
        assert pairs[1] == pytest.approx(pairs[0], rel=1e-4)
    last = Path("checkpoints") / "epoch_2.pt"
    states = [read_checkpoint(tmp_path / n / last).model_state_dict for n in ("plain", "whole")]
    assert states[0].keys() == states[1].keys()
    with inject("train.step:interrupt@3"):
        assert run(train_command(base, data, tmp_path / "cut", *COMPILED)) == 130
    torch._dynamo.reset()
    assert run(train_command(base, data, tmp_path / "cut", *COMPILED, "--resume", "auto")) == 0
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "cut" / last)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


@pytest.mark.slow
def test_debug_looks_into_compiled_layers(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(base, data, tmp_path, *COMPILED, "--debug", "--max-steps", "1")
    assert run(command) == 0
    assert "model.layers.1.mlp.down_proj (LoRALinear): [1, " in capsys.readouterr().err


def test_without_a_compiler_the_error_says_what_to_install(
    base: Path, data: Path, tmp_path: Path
) -> None:
    command = train_command(base, data, tmp_path / "out", *COMPILED)
    environment = os.environ | {
        "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ollatune", *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "torch cannot compile here" in done.stderr
    assert "apt install g++" in done.stderr
    assert not (tmp_path / "out" / "run.json").exists()


def test_packed_weights_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tiny_base(tmp_path / "base", tensor_type="Q8_0")
    served = ("--set", "model.quantization=as-served")
    assert run(train_command(packed, data, tmp_path / "out", *COMPILED, *served)) == 2
    assert "Set model.quantization: none" in capsys.readouterr().err
