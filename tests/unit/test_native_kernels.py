"""The compiled kernels: no worse than torch's operators, both in bf16, against fp64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.blocks import Norm, gated_mlp, projections, rms_norm
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.fast.linear_group import LinearGroup, gated
from ollatune.modeling.fast.loss import HeadSettings, _chunk_loss
from ollatune.modeling.fast.native import build, kernels
from ollatune.modeling.fast.packed_attention import AttentionShape, tree_attention
from ollatune.modeling.fast.segments import Segment, SegmentTable
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import (
    LoRALinear,
    LoRASettings,
    inject_lora,
    lora_layers,
    trainable_parameters,
)
from tests.tiny_models import tiny_gguf
from tests.unit.test_fast_path import FAMILIES, row_of

needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason=f"no compiled kernels here: {kernels.state()}"
)
ROUNDING = 1.05
"""The kernels' error may be this much of torch's: both round to bf16, though not at the same places."""


@pytest.fixture(autouse=True)
def _kernels_on_again() -> Iterator[None]:
    yield
    kernels.set_enabled(True)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def compare(compute: Callable[[torch.dtype], list[Tensor]]) -> None:
    """`compute` gives outputs and gradients for a number type: kernels against torch's bf16, both against fp64."""
    kernels.set_enabled(False)
    exact, torch_bf16 = compute(torch.float64), compute(torch.bfloat16)
    kernels.set_enabled(True)
    native = compute(torch.bfloat16)
    for index, (wanted, other, found) in enumerate(zip(exact, torch_bf16, native, strict=True)):
        allowed = ROUNDING * relative(other, wanted) + 1e-6
        assert relative(found, wanted) <= allowed, (index, relative(found, wanted), allowed)


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bf16 values in any number type."""
    return tensor.to(torch.bfloat16).to(dtype).requires_grad_()


TREE = [
    Segment(0, 130),
    Segment(130, 33, ((0, 130),)),
    Segment(163, 7, ((0, 130),)),
    Segment(170, 40, ((0, 130), (163, 7))),
    Segment(210, 5),
]


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "groups", "size", "segments", "window", "softcap", "half"),
    [
        (9, 3, 64, [Segment(0, 23), Segment(23, 99), Segment(122, 299)], None, None, 32),
        (4, 4, 32, [Segment(0, 1), Segment(1, 2), Segment(3, 64), Segment(67, 65)], None, None, 16),
        (4, 2, 96, TREE, None, None, 24),
        (4, 2, 128, TREE, 37, None, 64),
        (4, 2, 256, TREE, 100, 5.0, 128),
        (2, 1, 16, [Segment(0, 77)], None, 2.0, 8),
    ],
)
def test_attention(
    heads: int,
    groups: int,
    size: int,
    segments: list[Segment],
    window: int | None,
    softcap: float | None,
    half: int,
) -> None:
    torch.manual_seed(0)
    length = sum(segment.length for segment in segments)
    shape = AttentionShape(heads, groups, size, size**-0.5, window, softcap)
    angles = torch.randn(length, half)
    inputs = [torch.randn(length, n * size) for n in (heads, groups, groups)]
    upstream = torch.randn(length, heads * size)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        leaves = [leaf(tensor, dtype) for tensor in inputs]
        copies = [tensor * 1 for tensor in leaves]  # rotated in place
        rotary = (angles.cos(), angles.sin())
        output = tree_attention(*copies, rotary, SegmentTable(segments), shape)
        output.backward(leaf(upstream, dtype).detach())
        return [output.detach(), *(t.grad for t in leaves if t.grad is not None)]

    assert kernels.attention_fits(size, [torch.zeros(1, dtype=torch.bfloat16)])
    compare(compute)


@needs_kernels
@pytest.mark.parametrize("width", [16, 48, 576, 23])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(width: int, offset: float) -> None:
    torch.manual_seed(0)
    inputs, upstream = torch.randn(37, width) * 3, torch.randn(37, width)
    weight = torch.rand(width)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        values = leaf(inputs, dtype)
        if dtype is torch.float64:  # written out: the fast path's own norm computes in fp32
            inverse = (values.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            output = values * inverse * (weight.double() + offset)
        else:
            output = rms_norm(values, Norm(weight, 1e-5, offset))
        output.backward(leaf(upstream, dtype).detach())
        assert values.grad is not None
        return [output.detach(), values.grad]

    compare(compute)


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str) -> None:
    torch.manual_seed(0)
    both = (torch.randn(19, 2 * 40) * 4).to(torch.bfloat16)
    gate, up = both[:, :40], both[:, 40:]
    function = functional.silu if activation == "silu" else _gelu
    wanted = function(gate.double()) * up.double()
    torch_error = relative(function(gate) * up, wanted)
    assert relative(gated(gate, up, activation), wanted) <= ROUNDING * torch_error


def _gelu(tensor: Tensor) -> Tensor:
    return functional.gelu(tensor, approximate="tanh")


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rank", [1, 8, 33])
def test_mlp_with_adapters(activation: str, rank: int) -> None:
    torch.manual_seed(0)
    layers = [
        LoRALinear(torch.nn.Linear(48, 96, bias=False), rank, 2.0 * rank),
        LoRALinear(torch.nn.Linear(48, 96, bias=False), rank + 1, 2.0 * rank),
        LoRALinear(torch.nn.Linear(96, 48, bias=False), rank, 2.0 * rank),
    ]
    for layer in layers:
        layer.lora_B.data.normal_(0, 0.1)
    inputs, upstream, weight = torch.randn(41, 48), torch.randn(41, 48), torch.rand(48)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
        for layer in layers:
            base = layer.base
            assert isinstance(base, torch.nn.Linear)
            base.weight.data = base.weight.data.to(torch.bfloat16).to(dtype)
            base.weight.requires_grad_(False)
        for parameter in parameters:
            parameter.grad = None
            parameter.data = parameter.data.to(
                torch.float64 if dtype is torch.float64 else torch.float32
            )
        values = leaf(inputs, dtype)
        gate_up, down = LinearGroup((layers[0], layers[1])), LinearGroup((layers[2],))
        output = gated_mlp(values, Norm(weight, 1e-5), gate_up, down, activation)
        output.backward(leaf(upstream, dtype).detach())
        assert values.grad is not None
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        return [output.detach(), values.grad, torch.cat(gradients)]

    compare(compute)


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(softcap: float | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(13, 20011) * 3).to(torch.bfloat16)
    targets = torch.randint(0, 20011, (13,))
    exact = logits.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    wanted = functional.cross_entropy(capped, targets, reduction="sum", label_smoothing=smoothing)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact)
    loss, gradient = _chunk_loss(logits, targets, HeadSettings(softcap, smoothing), True)
    assert gradient is logits
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert relative(gradient, wanted_gradient) <= 2**-8


@needs_kernels
def test_dropout_is_the_same_forth_and_back_and_scaled() -> None:
    """y = B A drop(x) with A = B = 1: what comes out is the kept inputs, and so is what goes back."""
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 32, bias=False), 64, 64.0, dropout=0.25)
    torch.nn.init.zeros_(layer.base.weight)  # type: ignore[arg-type]
    layer.base.to(torch.bfloat16).requires_grad_(False)
    layer.lora_A.data = torch.eye(64)
    layer.lora_B.data = torch.zeros(32, 64)
    layer.lora_B.data[:, :32] = torch.eye(32)
    layer.train()
    inputs = torch.ones(4000, 64, dtype=torch.bfloat16, requires_grad=True)
    group = LinearGroup((layer,))
    assert group.plan.fits(inputs)
    (output,) = projections(inputs, None, group)
    values = output.detach().float()
    assert set(values.unique().tolist()) == {0.0, float(torch.tensor(4 / 3).bfloat16())}
    assert float((values > 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    columns = (values > 0).float().mean(0)
    assert float((columns - 0.75).abs().max()) < 0.04
    output.backward(torch.ones_like(output))
    assert inputs.grad is not None
    assert torch.equal(inputs.grad[:, :32].float(), values)
    torch.manual_seed(0)
    (again,) = projections(inputs.detach().requires_grad_(), None, group)
    torch.manual_seed(1)
    (other,) = projections(inputs.detach().requires_grad_(), None, group)
    assert not torch.equal(again, other)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int, tmp_path: Path) -> None:
    """Matrix products are torch's own; everything of ours adds in a fixed order."""
    torch.manual_seed(0)
    inputs = [torch.randn(215, n * 16).to(torch.bfloat16) for n in (4, 2, 2)]
    shape = AttentionShape(4, 2, 16, 0.25)
    angles = torch.randn(215, 8)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (2, threads):
            torch.set_num_threads(number)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            copies = [tensor * 1 for tensor in leaves]
            rotary = (angles.cos(), angles.sin())
            output = tree_attention(*copies, rotary, SegmentTable(TREE), shape)
            output.backward(torch.ones_like(output))
            results.append([output.detach(), *(t.grad for t in leaves if t.grad is not None)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [False, True])
def test_bf16_step_is_no_worse_than_transformers(family: str, share: bool, tmp_path: Path) -> None:
    """Loss and gradients of a whole step: ours and Transformers' own in bf16, both against Transformers' in fp64."""
    path = tiny_gguf(family, tmp_path)

    def step(dtype: torch.dtype, fast: bool) -> tuple[float, Tensor]:
        model = load_base_model(GGUFFile.open(path), dtype=torch.bfloat16).to(dtype)
        inject_lora(model, LoRASettings(4, 8.0, 0.0), seed=3)
        for index, layer in enumerate(lora_layers(model).values()):
            layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
            if dtype is torch.float64:
                layer.double()
        function = CausalStep(model.train(), use_fast_path=fast)
        row = row_of(share and fast)
        loss = function.loss_sum(row)
        (loss / row.num_targets).backward()
        gradients = [
            p.grad.flatten().double() for _, p in trainable_parameters(model) if p.grad is not None
        ]
        return float(loss.detach()), torch.cat(gradients)

    exact, wanted = step(torch.float64, False)
    plain, plain_gradient = step(torch.bfloat16, False)
    ours, our_gradient = step(torch.bfloat16, True)
    assert relative(our_gradient, wanted) <= ROUNDING * relative(plain_gradient, wanted)
    assert abs(ours - exact) <= 2e-3 * abs(exact)
    assert abs(plain - exact) <= 1e-2 * abs(exact)


def test_without_a_compiler_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "processor_flags", lambda: "sse2 avx512_bf16")
    monkeypatch.setattr(build, "user_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert build.load_library.__wrapped__() == build.Loaded(
        None, "no C compiler (gcc or clang) was found"
    )
    monkeypatch.setattr(build, "processor_flags", lambda: "sse2")
    assert "AVX512-BF16" in build.load_library.__wrapped__().reason


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "badcc"
    compiler.write_text("#!/bin/sh\necho first >&2\necho no luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(build, "processor_flags", lambda: "avx512_bf16")
    monkeypatch.setattr(build, "user_cache_folder", lambda: tmp_path)
    loaded = build.load_library.__wrapped__()
    assert loaded.library is None
    assert loaded.reason == f"{compiler} failed: no luck"
    assert not list((tmp_path / "native").iterdir())


@needs_kernels
def test_other_tensors_are_not_taken() -> None:
    assert kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(1))
    kernels.set_enabled(False)
    assert not kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert kernels.state() == "switched off"


def test_the_table_keeps_trees_together() -> None:
    table = SegmentTable([Segment(0, 5), Segment(5, 40), Segment(45, 3, ((5, 40),))])
    arrays = table._arrays
    assert table.num_units == 2
    assert [a.tolist() for a in arrays[:6]] == [
        [0, 2, 3],
        [5, 45, 0],
        [40, 3, 5],
        [0, 0, 1, 1],
        [5],
        [40],
    ]
    assert arrays[6].tolist() == [*range(5), *range(40), 40, 41, 42]
    assert all(a.dtype == np.int32 for a in arrays)
