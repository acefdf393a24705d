"""Packed layers against dense layers that hold the decoded weights."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ollatune.base.errors import InputError
from ollatune.gguf.codecs import dequantize, quantize
from ollatune.gguf.types import GGMLType
from ollatune.modeling import packed
from ollatune.modeling.packed import (
    PackedEmbedding,
    PackedLinear,
    keep_out_of_ddp,
    packed_layers,
    view_of,
)

TYPES = [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q5_0, GGMLType.Q8_0, GGMLType.BF16]


def make_layer(
    type: GGMLType = GGMLType.Q4_K,
    in_features: int = 512,
    out_features: int = 96,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer and the dense one with its decoded weight."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(out_features, in_features, generator=generator)
    offset = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    layer = PackedLinear(quantize(weights, type), type, in_features, out_features, offset)
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.dequantized(dtype))
        if offset is not None:
            dense.bias.copy_(offset)
    return layer, dense.requires_grad_(False)


def outputs_and_gradient(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    weights = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape).to(outputs)
    outputs.backward(weights)
    assert inputs.grad is not None
    return outputs.detach(), inputs.grad


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces smaller than a layer, with a remainder, so that every loop runs more than once."""
    monkeypatch.setattr(packed, "_CPU_PIECE_WEIGHTS", 40 * 512)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_layer_to_the_bit_in_one_piece(type: GGMLType, bias: bool) -> None:
    layer, dense = make_layer(type, bias=bias)
    inputs = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(
        outputs_and_gradient(layer, inputs), outputs_and_gradient(dense, inputs), strict=True
    ):
        if bias:  # the dense layer adds its bias within the product
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ours, expected)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_equals_the_dense_layer_in_many_pieces(type: GGMLType) -> None:
    layer, dense = make_layer(type, bias=True)
    inputs = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(
        outputs_and_gradient(layer, inputs), outputs_and_gradient(dense, inputs), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_pieces")
def test_gradient_is_the_derivative() -> None:
    layer, _ = make_layer(GGMLType.Q5_1, in_features=64, out_features=12)
    inputs = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (inputs,))


@pytest.mark.usefixtures("small_pieces")
def test_bf16_rounds_every_element_once() -> None:
    layer, dense = make_layer(dtype=torch.bfloat16)
    inputs = torch.randn(9, 512, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    outputs, gradient = outputs_and_gradient(layer, inputs)
    assert outputs.dtype == gradient.dtype == torch.bfloat16
    expected_outputs, expected_gradient = outputs_and_gradient(dense, inputs)
    torch.testing.assert_close(outputs, expected_outputs, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=2**-7)


def test_nothing_is_kept_for_backward() -> None:
    layer, _ = make_layer()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(4, 512, requires_grad=True)).sum().backward()
    assert kept == []


def test_works_under_activation_checkpointing() -> None:
    layer, _ = make_layer(in_features=256, out_features=256)
    inputs = torch.randn(3, 256)
    block = nn.Sequential(layer, nn.SiLU(), layer)
    expected = outputs_and_gradient(block, inputs)
    wrapped = outputs_and_gradient(
        lambda x: checkpoint(block, x, use_reentrant=False),  # type: ignore[arg-type]
        inputs,
    )
    assert torch.equal(wrapped[0], expected[0])
    assert torch.equal(wrapped[1], expected[1])


def test_a_repeated_forward_pass_decodes_for_the_backward_pass_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no room for decoded weights they are decoded once more; the results are the same."""
    decoded: list[int] = []
    monkeypatch.setattr(
        packed, "dequantize", lambda *a, **k: decoded.append(1) or dequantize(*a, **k)
    )
    layers = [make_layer(in_features=256, out_features=256)[0] for _ in range(3)]
    inputs = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, Tensor, int]:
        decoded.clear()
        blocks = [nn.Sequential(layer, nn.SiLU(), layer) for layer in layers]

        def forward(x: Tensor) -> Tensor:
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

        outputs, gradient = outputs_and_gradient(forward, inputs)  # type: ignore[arg-type]
        return outputs, gradient, len(decoded)

    kept = run()
    monkeypatch.setattr(packed, "KEPT_BYTES", 0)
    not_kept = run()
    # Six forward, three repeated (the last layer of a block keeps nothing, so it is not), six backward.
    assert (kept[2], not_kept[2]) == (12, 15)
    assert torch.equal(kept[0], not_kept[0])
    assert torch.equal(kept[1], not_kept[1])
    assert packed._local.backward == {}


def test_autocast_casts_as_torch_does() -> None:
    layer, dense = make_layer()
    inputs = torch.randn(4, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs).dtype == dense(inputs).dtype == torch.bfloat16
        torch.testing.assert_close(layer(inputs), dense(inputs), rtol=2**-7, atol=2**-7)


def test_blocks_are_not_saved_and_move_with_the_module() -> None:
    layer, _ = make_layer(bias=True)
    assert list(layer.state_dict()) == ["bias"]
    assert layer.to("meta").blocks.is_meta
    layer, _ = make_layer()
    assert torch.equal(layer.to(torch.bfloat16).blocks, copy.deepcopy(layer).blocks)
    assert layer.blocks.dtype == torch.uint8


def test_reads_a_mapped_file_in_place(tmp_path: Path) -> None:
    layer, dense = make_layer()
    path = tmp_path / "blocks"
    path.write_bytes(layer.blocks.numpy().tobytes())
    mapped = np.memmap(path, np.uint8, mode="r").reshape(layer.blocks.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = view_of(mapped)
    assert blocks.data_ptr() == mapped.ctypes.data
    on_file = PackedLinear(blocks, layer.ggml_type, 512, 96)
    inputs = torch.randn(2, 512)
    assert torch.equal(on_file(inputs), functional.linear(inputs, dense.weight))


def test_embedding_decodes_the_rows_it_looks_up() -> None:
    table = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    embedding = PackedEmbedding(quantize(table, GGMLType.Q6_K), GGMLType.Q6_K, 50, 256)
    ids = torch.tensor([[3, 49, 3], [0, 7, 20]])
    decoded = dequantize(embedding.blocks, GGMLType.Q6_K)
    assert torch.equal(embedding(ids), decoded[ids])
    assert torch.equal(embedding.dequantized(), decoded)
    half = PackedEmbedding(embedding.blocks, GGMLType.Q6_K, 50, 256, dtype=torch.bfloat16)
    assert torch.equal(half(ids), decoded[ids].to(torch.bfloat16))


def test_tied_head_shares_the_blocks() -> None:
    table = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    embedding = PackedEmbedding(quantize(table, GGMLType.Q8_0), GGMLType.Q8_0, 50, 256)
    head = embedding.tied_head()
    assert head.blocks.data_ptr() == embedding.blocks.data_ptr()
    inputs = torch.randn(4, 256)
    assert torch.equal(head(inputs), functional.linear(inputs, embedding.dequantized()))


def test_refuses_blocks_of_another_shape_and_unknown_types() -> None:
    layer, _ = make_layer()
    with pytest.raises(
        InputError, match=r"uint8 of shape \(96, 288\).*found torch.uint8 .*\(95, 288\)"
    ):
        PackedLinear(layer.blocks[:95], GGMLType.Q4_K, 512, 96)
    with pytest.raises(InputError, match="IQ2_XXS cannot be decoded"):
        PackedEmbedding(layer.blocks, GGMLType.IQ2_XXS, 96, 512)


def test_packed_layers_are_found_and_kept_out_of_ddp() -> None:
    layer, _ = make_layer()
    model = nn.Sequential(layer, nn.Linear(96, 4), nn.BatchNorm1d(4))
    assert packed_layers(model) == {"0": layer}
    keep_out_of_ddp(model)
    assert model._ddp_params_and_buffers_to_ignore == ["0.blocks"]


def _ddp_worker(rank: int, folder: str) -> None:
    """Both processes hold other blocks: what DDP copies between them would show."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    layer, _ = make_layer(in_features=256, out_features=32)
    layer.blocks.fill_(rank)
    model = nn.Sequential(layer, nn.Linear(32, 2))
    keep_out_of_ddp(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        parallel(torch.full((1, 256), float(rank + 1))).sum().backward()
    Path(folder, f"rank{rank}").write_text(
        f"{bool((layer.blocks == rank).all())} {model[1].bias.grad[0]:.1f}"
    )
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_leaves_the_blocks_alone(tmp_path: Path) -> None:
    multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["True 2.0", "True 2.0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_dense_layer(dtype: torch.dtype) -> None:
    layer, dense = make_layer(bias=True, dtype=dtype)
    inputs = torch.randn(7, 512, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    ours = outputs_and_gradient(layer.cuda(), inputs)
    expected = outputs_and_gradient(dense.cuda(), inputs)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
