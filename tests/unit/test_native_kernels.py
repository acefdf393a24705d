"""The compiled kernels: no worse than torch's operators, both in bf16, against fp64."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ollatune.gguf.codecs import quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType
from ollatune.modeling import packed
from ollatune.modeling.fast.blocks import Norm, gated_mlp, projections, rms_norm
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.fast.linear_group import LinearGroup, gated
from ollatune.modeling.fast.loss import HeadSettings, _chunk_loss
from ollatune.modeling.fast.native import build, kernels
from ollatune.modeling.fast.native import products as native_products
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
from ollatune.modeling.packed import PackedEmbedding, PackedLinear, packed_layers
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
        LoRALinear(torch.nn.Linear(64, 96, bias=False), rank, 2.0 * rank),
        LoRALinear(torch.nn.Linear(64, 96, bias=False), rank + 1, 2.0 * rank),
        LoRALinear(torch.nn.Linear(96, 64, bias=False), rank, 2.0 * rank),
    ]
    for layer in layers:
        layer.lora_B.data.normal_(0, 0.1)
    inputs, upstream, weight = torch.randn(41, 64), torch.randn(41, 64), torch.rand(64)

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
        assert (gate_up.plan.fits(values) and down.plan.fits(values)) or not kernels.usable(values)
        output = gated_mlp(values, Norm(weight, 1e-5), gate_up, down, activation, add_inputs=True)
        output.backward(leaf(upstream, dtype).detach())
        assert values.grad is not None
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        return [output.detach(), values.grad, torch.cat(gradients)]

    compare(compute)


def _group(
    sizes: list[tuple[int, int, bool]], num_inputs: int, seed: int = 0
) -> tuple[LinearGroup, Callable[[torch.dtype], None]]:
    """Layers of (outputs, rank, bias) with one input, rank 0 for none; and what puts them into a number type."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for outputs, rank, bias in sizes:
        base = torch.nn.Linear(num_inputs, outputs, bias=bias).requires_grad_(False)
        layers.append(LoRALinear(base, rank, 2.0 * rank) if rank else base)
        if rank:
            cast(LoRALinear, layers[-1]).lora_B.data.normal_(0, 0.1)

    def become(dtype: torch.dtype) -> None:
        for layer in layers:
            adapter_dtype = torch.float64 if dtype is torch.float64 else torch.float32
            for name, parameter in layer.named_parameters():
                frozen = not name.startswith("lora")
                kind = dtype if frozen else adapter_dtype
                parameter.data = (parameter.to(torch.bfloat16) if frozen else parameter).to(kind)
                parameter.grad = None

    return LinearGroup(tuple(layers)), become


@needs_kernels
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 23, 25, 200])
@pytest.mark.parametrize(
    ("sizes", "num_inputs", "residual"),
    [
        ([(96, 8, False), (32, 8, True), (64, 3, False)], 64, False),
        ([(64, 0, False), (32, 64, False)], 96, False),
        ([(160, 0, True)], 32, True),
        ([(1024, 5, True)], 544, True),  # more columns than one buffer of panels holds
    ],
)
def test_linear_group(
    rows: int, sizes: list[tuple[int, int, bool]], num_inputs: int, residual: bool
) -> None:
    group, become = _group(sizes, num_inputs)
    inputs = torch.randn(rows, num_inputs)
    upstream = [torch.randn(rows, outputs) for outputs, _, _ in sizes]
    other = torch.randn(rows, sizes[0][0])

    def compute(dtype: torch.dtype) -> list[Tensor]:
        become(dtype)
        values, added = leaf(inputs, dtype), leaf(other, dtype)
        assert group.plan.fits(values) == kernels.usable(values)
        outputs = projections(values, None, group, residual_TO=added if residual else None)
        torch.autograd.backward(outputs, [leaf(u, dtype).detach() for u in upstream])
        found = [output.detach() for output in outputs]
        gradients = [p.grad.flatten() for p in group.parameters if p.grad is not None]
        leaves = [values, added] if residual else [values]
        found += [tensor.grad for tensor in leaves if tensor.grad is not None]
        return [*found, torch.cat(gradients)] if gradients else found

    compare(compute)


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up_in_one_layer(activation: str) -> None:
    """As Phi-3 has them: one layer, one adapter; its halves are activated as two layers' outputs would be."""
    both, become = _group([(2 * 96, 4, True)], 64)
    down, become_too = _group([(64, 4, False)], 96, seed=1)
    inputs, upstream, weight = torch.randn(29, 64), torch.randn(29, 64), torch.rand(64)

    def compute(dtype: torch.dtype) -> list[Tensor]:
        become(dtype), become_too(dtype)
        values = leaf(inputs, dtype)
        output = gated_mlp(values, Norm(weight, 1e-5), both, down, activation)
        output.backward(leaf(upstream, dtype).detach())
        assert values.grad is not None
        gradients = [
            p.grad.flatten() for g in (both, down) for p in g.parameters if p.grad is not None
        ]
        return [output.detach(), values.grad, torch.cat(gradients)]

    compare(compute)


DECODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def packed_and_dense(type: GGMLType, outputs: int, inputs: int, bias: bool) -> list[LoRALinear]:
    """Adapters alike on a layer that keeps its blocks and on a dense one of the decoded weights."""
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    added = torch.randn(outputs).to(torch.bfloat16) if bias else None
    kept = PackedLinear(quantize(weight, type), type, inputs, outputs, added)
    dense = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    dense.weight.data = kept.dequantized(torch.bfloat16)
    if added is not None:
        dense.bias.data = added
    pair = [LoRALinear(base, 8, 16.0) for base in (kept, dense)]
    pair[0].lora_B.data.normal_(0, 0.1)
    for name in ("lora_A", "lora_B"):
        getattr(pair[1], name).data = getattr(pair[0], name).data
    return pair


def outputs_and_gradients(group: LinearGroup, inputs: Tensor, upstream: Tensor) -> list[Tensor]:
    values = leaf(inputs, torch.bfloat16)
    outputs = projections(values, None, group)
    torch.autograd.backward(outputs, list(upstream.split([o.shape[1] for o in outputs], dim=1)))
    gradients = [p.grad for p in group.parameters]
    for parameter in group.parameters:
        parameter.grad = None
    return [t for t in (*(o.detach() for o in outputs), values.grad, *gradients) if t is not None]


@needs_kernels
@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("rows", [1, 21, 300])
def test_blocks_are_computed_with_as_the_weights_they_decode_to(name: str, rows: int) -> None:
    """The same bits as of a dense layer, forth and back; no other way may have computed them."""
    torch.manual_seed(0)
    type = GGMLType[name]
    pair = packed_and_dense(type, 96, 512, bias=rows == 21)
    inputs, upstream = torch.randn(rows, 512), torch.randn(rows, 96).to(torch.bfloat16)
    groups = [LinearGroup((layer,)) for layer in pair]
    assert all(group.plan.fits(inputs.to(torch.bfloat16)) for group in groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "matmul_forward", None)
        patch.setattr(PackedLinear, "matmul_backward", None)
        found, wanted = (outputs_and_gradients(group, inputs, upstream) for group in groups)
    assert len(found) == len(wanted) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@needs_kernels
@pytest.mark.parametrize("name", DECODED)
def test_any_bits_decode_as_the_codecs_decode_them(name: str) -> None:
    """Blocks of random bytes, scales among them, times the identity."""
    type, size = GGMLType[name], 512
    generator = np.random.default_rng(7)
    blocks = generator.integers(0, 256, (64, type.row_bytes(size)), dtype=np.uint8)
    by_block = blocks.reshape(-1, type.block_bytes)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(
        name, (0, 2) if name.endswith("_1") else (0,)
    )
    for at in halves:  # finite, of either sign, from 2^-14 up: no others are halved to zero in bf16
        scale = generator.integers(1 << 10, 0x7000, len(by_block)).astype("<u2")
        scale |= (generator.integers(0, 2, len(by_block)) << 15).astype("<u2")
        by_block[:, at : at + 2] = scale[:, None].view(np.uint8)
    layer = PackedLinear(torch.from_numpy(blocks), type, size, 64)
    wanted = layer.dequantized(torch.bfloat16)
    found = native_products.product(torch.eye(size, dtype=torch.bfloat16), layer)
    assert found is not None
    assert torch.equal(found.T, wanted)
    found = native_products.gradient_product(torch.eye(64, dtype=torch.bfloat16), layer)
    assert found is not None
    assert torch.equal(found, wanted)
    ids = torch.tensor([[63, 0], [5, 63]])
    table = PackedEmbedding(torch.from_numpy(blocks), type, 64, size, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "dequantize", None)
        assert torch.equal(table(ids), wanted[ids])
        for wrong in (-1, 64):
            with pytest.raises(IndexError):
                table(torch.tensor([0, wrong]))


@needs_kernels
@pytest.mark.parametrize("odd", ["Q6_K", "Q3_K", None])
def test_layers_of_different_types_in_one_group(odd: str | None) -> None:
    """As in files whose value layers are more precise; Q3_K is one that only the codecs decode, None a dense layer."""
    torch.manual_seed(1)
    first = packed_and_dense(GGMLType.Q4_K, 96, 256, bias=False)
    second = packed_and_dense(GGMLType[odd or "Q8_0"], 32, 256, bias=True)
    inputs, upstream = torch.randn(40, 256), torch.randn(40, 128).to(torch.bfloat16)
    mixed = LinearGroup((first[0], second[1] if odd is None else second[0]))
    dense = LinearGroup((first[1], second[1]))
    assert mixed.plan.fits(inputs.to(torch.bfloat16))
    found = outputs_and_gradients(mixed, inputs, upstream)
    wanted = outputs_and_gradients(dense, inputs, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        if odd == "Q3_K":  # one rounding more
            assert relative(ours, theirs.double()) <= 2**-7
        else:
            assert torch.equal(ours, theirs)


@needs_kernels
def test_a_replaced_weight_or_adapter_is_seen() -> None:
    group, become = _group([(64, 4, False)], 32)
    become(torch.bfloat16)
    inputs = torch.randn(5, 32).to(torch.bfloat16)
    layer = cast(LoRALinear, group.layers[0])
    for _ in range(2):
        (found,) = projections(inputs, None, group)
        with torch.no_grad():
            wanted = layer(inputs)
        assert relative(found.detach(), wanted.double()) <= 2**-7
        layer.lora_B.data = torch.ones_like(layer.lora_B)
        cast(torch.nn.Linear, layer.base).weight.data = torch.ones(64, 32, dtype=torch.bfloat16)


@needs_kernels
def test_sizes_that_do_not_fit_go_through_torch() -> None:
    group, become = _group([(48, 4, False)], 32)
    become(torch.bfloat16)
    assert not group.plan.fits(torch.randn(5, 32).to(torch.bfloat16))
    assert LinearGroup(group.layers * 5).plan.fits(torch.zeros(5, 32)) is False


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
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads: int, tmp_path: Path) -> None:
    """Everything adds in a fixed order, whoever does it."""
    torch.manual_seed(0)
    group, become = _group([(96, 4, True), (32, 0, False), (64, 4, False)], 64)
    become(torch.bfloat16)
    activations = torch.randn(215, 64).to(torch.bfloat16)
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
            leaves.append(activations.clone().requires_grad_())
            outputs = projections(leaves[-1], Norm(torch.ones(64), 1e-5), group)
            sum(o.float().square().sum() for o in outputs).backward()  # type: ignore[union-attr]
            found = [
                output,
                *outputs,
                *(t.grad for t in leaves),
                *(p.grad for p in group.parameters),
            ]
            results.append([t.detach().clone() for t in found if t is not None])
            for parameter in group.parameters:
                parameter.grad = None
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
        if function.fast is not None and family not in ("qwen3", "gemma2", "gemma3"):
            # The others' tiny heads make layers of 48 outputs; their attention and norms are the kernels' all the same.
            like = torch.zeros(1, 1, dtype=torch.bfloat16)
            assert all(layer.qkv.plan.fits(like) for layer in function.fast.layers)
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


@needs_kernels
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_on_blocks_gives_the_bits_of_a_step_on_decoded_weights(
    recompute: bool, tmp_path: Path
) -> None:
    path = tiny_gguf("llama", tmp_path, tensor_type="Q8_0")
    found = []
    for mode in ("packed", "dense"):
        with GGUFFile.open(path) as gguf:
            model = load_base_model(gguf, mode=cast(Any, mode), dtype=torch.bfloat16)
            inject_lora(model, LoRASettings(4, 8.0, 0.0), seed=3)
            for index, layer in enumerate(lora_layers(model).values()):
                generator = torch.Generator().manual_seed(index)
                layer.lora_B.data.normal_(0, 0.1, generator=generator)
            step = CausalStep(model.train(), recompute=recompute)
            loss = step.loss_sum(row_of(True))
            loss.backward()
            assert len(packed_layers(model)) == (0 if mode == "dense" else 2 + 7 * 2)
            gradients = [p.grad for _, p in trainable_parameters(model) if p.grad is not None]
            found.append([loss.detach(), *(g.clone() for g in gradients)])
    assert len(found[0]) > 1
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("tensor_type", ["Q2_K", "Q3_K"])
def test_a_step_on_blocks_that_the_kernels_cannot_read(tensor_type: str, tmp_path: Path) -> None:
    """The codecs decode them, with one rounding more: their product is written before the adapters are added."""
    path = tiny_gguf("llama", tmp_path, tensor_type=tensor_type, hidden_size=256)
    found = []
    for mode in ("packed", "dense"):
        with GGUFFile.open(path) as gguf:
            model = load_base_model(gguf, mode=cast(Any, mode), dtype=torch.bfloat16)
            inject_lora(model, LoRASettings(4, 8.0, 0.0), seed=3)
            loss = CausalStep(model.train()).loss_sum(row_of(True))
            loss.backward()
            gradients = [
                p.grad.flatten() for _, p in trainable_parameters(model) if p.grad is not None
            ]
            found.append((float(loss.detach()), torch.cat(gradients)))
    (loss_packed, ours), (loss_dense, wanted) = found
    assert abs(loss_packed - loss_dense) <= 1e-2 * abs(loss_dense)
    assert relative(ours, wanted.double()) <= 0.05


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


def test_a_change_in_any_file_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def compile_nothing(command: list[str]) -> None:
        Path(command[command.index("-o") + 1]).touch()

    included = re.findall(r'#include "(.+)"', "".join(path.read_text() for path in build.SOURCES))
    assert {path.name for path in build.SOURCES} == {"kernels.c", *included}
    copies = [tmp_path / path.name for path in build.SOURCES]
    for source, copy in zip(build.SOURCES, copies, strict=True):
        shutil.copy(source, copy)
    monkeypatch.setattr(build, "SOURCES", copies)
    monkeypatch.setattr(build, "_run", compile_nothing)
    monkeypatch.setattr(build, "_openmp_runtime", lambda: None)
    monkeypatch.setattr(build, "user_cache_folder", lambda: tmp_path)
    seen = {build._compiled([sys.executable], "")}
    assert seen == {build._compiled([sys.executable], "")}
    for copy in copies:
        copy.write_text(copy.read_text() + "\n")
        seen.add(build._compiled([sys.executable], ""))
    assert len(seen) == 1 + len(copies)


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
