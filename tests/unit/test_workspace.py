"""Memory that steps use again: nobody's tensors are written over while they are needed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.fast.native import kernels
from ollatune.modeling.fast.workspace import Workspace, kept_bytes, kept_empty, scratch_empty
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
from tests.tiny_models import tiny_gguf
from tests.unit.test_fast_path import row_of

bf16 = torch.bfloat16


def place(tensor: Tensor) -> int:
    return tensor.data_ptr()


def test_what_is_kept_stands_side_by_side_and_is_lent_again_when_it_is_gone() -> None:
    workspace = Workspace()
    size = kept_bytes((3, 5), bf16) + kept_bytes((7,), torch.float32)
    assert size == 64 + 64
    with workspace.lend(size):
        first, second = kept_empty((3, 5), bf16), kept_empty((7,), torch.float32)
    assert (first.shape, first.dtype) == ((3, 5), bf16)
    assert place(second) - place(first) == 64
    version = second._version
    first.fill_(1.0)
    assert second._version == version  # autograd would take it for a change to what it saved
    where = place(first)
    del first
    with workspace.lend(size):
        elsewhere = kept_empty((3, 5), bf16)
    assert place(elsewhere) != where  # one tensor of the first pass is still there
    where = place(elsewhere)
    del elsewhere, second
    with workspace.lend(size):
        again = kept_empty((3, 5), bf16)
    assert place(again) == where
    with workspace.lend(size):
        assert place(kept_empty((3, 5), bf16)) != place(again)


def test_what_autograd_saved_keeps_the_memory() -> None:
    workspace = Workspace()
    leaf = torch.ones(16, requires_grad=True)
    with workspace.lend(1024):
        factor = kept_empty((16,), torch.float32).fill_(3.0)
        product = leaf * factor
    del factor
    with workspace.lend(1024):
        kept_empty((16,), torch.float32).fill_(7.0)
    product.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [3.0] * 16


def test_memory_is_used_again_and_grows() -> None:
    workspace = Workspace()
    places = []
    for size in (1 << 20, 1 << 10, 1 << 20, 1 << 23):
        with workspace.lend(size):
            places.append(kept_empty((size,), torch.uint8).fill_(1).data_ptr())
    assert places[0] == places[1] == places[2]
    assert len(workspace._memory or b"") >= 1 << 23


def test_outside_of_a_pass_and_beyond_its_size_memory_comes_from_torch() -> None:
    workspace = Workspace()
    with workspace.lend(64):
        inside, beyond = kept_empty((32,), bf16), kept_empty((32,), bf16)
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(kept_empty((8,), bf16)))
        thread.start()
        thread.join()
    outside = kept_empty((8,), bf16)
    assert len({place(t) for t in (inside, beyond, outside, found[0])}) == 4


def test_no_memory_is_a_memory_error() -> None:
    """Which the loop answers with smaller micro-batches; an OSError would be about a disk."""
    workspace = Workspace()
    with pytest.raises(MemoryError, match="for activations"), workspace.lend(1 << 62):
        pass
    with workspace.lend(64):
        assert kept_empty((8,), bf16).shape == (8,)


def test_scratch_is_by_name() -> None:
    first, other = scratch_empty("first", (4, 8), bf16), scratch_empty("other", (4, 8), bf16)
    assert place(first) != place(other)
    assert scratch_empty("first", (2, 8), torch.float32).data_ptr() == first.data_ptr()
    assert scratch_empty("first", (64, 8), bf16).shape == (64, 8)


@pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.state()}")
def test_passes_side_by_side_give_the_gradients_of_each_alone(tmp_path: Path) -> None:
    """Two rows forward before either goes back, in either order, and an evaluation between."""
    with GGUFFile.open(tiny_gguf("llama", tmp_path)) as gguf:
        model = load_base_model(gguf, dtype=bf16)
    inject_lora(model, LoRASettings(4, 8.0, 0.0), seed=0)
    named = trainable_parameters(model)
    for index, (_, parameter) in enumerate(named):
        generator = torch.Generator().manual_seed(index)
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    step = CausalStep(model)
    rows = [row_of(share=False), row_of(share=True)]

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for _, p in named if p.grad is not None]
        for _, parameter in named:
            parameter.grad = None
        return found

    alone = []
    for row in rows:
        step.loss_sum(row).backward()
        alone.append(gradients())
    for order in ((0, 1), (1, 0)):
        losses = [step.loss_sum(row) for row in rows]
        step.evaluate(rows[0])
        for index in order:
            losses[index].backward()
            for ours, wanted in zip(gradients(), alone[index], strict=True):
                assert torch.equal(ours, wanted)
