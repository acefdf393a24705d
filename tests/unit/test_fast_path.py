"""The fused parts against plain PyTorch and against Transformers' own forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.decoder import is_supported
from ollatune.modeling.fast.forward import CausalStep, PackedRow
from ollatune.modeling.fast.loss import HeadSettings, head_evaluate, head_loss_sum
from ollatune.modeling.fast.segments import MIN_SHARED_TOKENS, Segment, lay_out
from ollatune.modeling.load import Mode, load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, lora_layers, trainable_parameters
from tests.tiny_models import tiny_gguf

FAMILIES = ("llama", "llama-tied", "llama-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_head_loss_equals_cross_entropy(softcap: float | None, smoothing: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    logits = head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected_gradients = torch.autograd.grad(expected, (hidden, head.weight))
    loss = head_loss_sum(hidden, head, targets, HeadSettings(softcap, smoothing))
    gradients = torch.autograd.grad(loss, (hidden, head.weight))
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_head_evaluate_counts_the_likeliest() -> None:
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)
    hidden = torch.eye(4)[[0, 1, 2]]
    loss, correct = head_evaluate(hidden, head, torch.tensor([0, 1, 3]), HeadSettings())
    assert correct == 2
    assert loss == pytest.approx(2 * (np.log(np.e + 3) - 1) + np.log(np.e + 3), rel=1e-6)


def examples(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    common = generator.integers(0, 300, MIN_SHARED_TOKENS + 9)
    deeper = np.concatenate([common, generator.integers(0, 300, MIN_SHARED_TOKENS)])
    tails = [generator.integers(0, 300, n) for n in (7, 30, 80, 1, 12)]
    return [
        np.concatenate([common, tails[0]]),
        np.concatenate([deeper, tails[1]]),
        np.concatenate([deeper, tails[2]]),
        tails[3],
        tails[4],
    ]


def row_of(share: bool) -> PackedRow:
    """Targets are the last third of each example."""
    tree = lay_out(examples(), share=share)
    positions, targets = [], []
    for number, places in enumerate(tree.places):
        count = max(1, len(places) // 3)
        positions.append(places[-count:])
        targets.append((np.arange(count) * 7 + number) % 300)
    return PackedRow(
        torch.from_numpy(tree.token_ids),
        torch.from_numpy(tree.position_ids),
        tree.segments,
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets)),
        sum(map(len, examples())),
    )


def test_the_tree_holds_every_example() -> None:
    tree = lay_out(examples(), share=True)
    for example, places in zip(examples(), tree.places, strict=True):
        assert tree.token_ids[places].tolist() == example.tolist()
        assert tree.position_ids[places].tolist() == list(range(len(example)))
    assert len(tree.token_ids) < sum(map(len, examples()))
    covered = np.concatenate([np.arange(s.start, s.start + s.length) for s in tree.segments])
    assert sorted(covered.tolist()) == list(range(len(tree.token_ids)))


def adapted(path: Path, **settings: object) -> nn.Module:
    model: nn.Module = load_base_model(GGUFFile.open(path))
    inject_lora(model, LoRASettings(4, 8.0, 0.0, **settings), seed=3)  # type: ignore[arg-type]
    for index, layer in enumerate(lora_layers(model).values()):
        generator = torch.Generator().manual_seed(index)
        layer.lora_B.data.normal_(0, 0.1, generator=generator)
    return model.train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, 1], ids=["all layers", "last layer"])
def test_fused_equals_transformers(family: str, layers: int | None, tmp_path: Path) -> None:
    path = tiny_gguf(family, tmp_path)
    results = {}
    for name, fast, share in (("plain", False, False), ("fast", True, False), ("tree", True, True)):
        model = adapted(path, layers=layers)
        assert is_supported(model)
        step = CausalStep(model, use_fast_path=fast)
        assert step.can_share == fast
        row = row_of(share)
        loss = step.loss_sum(row)
        (loss / row.num_targets).backward()
        gradients = {n: p.grad for n, p in trainable_parameters(model)}
        results[name] = (loss.item(), gradients)
    loss, gradients = results["plain"]
    for name in ("fast", "tree"):
        assert results[name][0] == pytest.approx(loss, rel=1e-5)
        for key, wanted in gradients.items():
            found = results[name][1][key]
            assert found is not None
            assert wanted is not None
            assert (found - wanted).norm() <= 2e-5 * wanted.norm() + 1e-9, (name, key)


def test_packed_row_equals_one_by_one(tmp_path: Path) -> None:
    model = adapted(tiny_gguf("llama", tmp_path))
    step = CausalStep(model)
    whole = row_of(False)
    total = float(step.loss_sum(whole).detach())
    alone, offset = 0.0, 0
    for segment in whole.segments:
        chosen = (whole.target_positions_N >= segment.start) & (
            whole.target_positions_N < segment.start + segment.length
        )
        part = slice(segment.start, segment.start + segment.length)
        single = lay_out([whole.input_ids_T[part].numpy()], share=False)
        row = PackedRow(
            whole.input_ids_T[part], whole.position_ids_T[part], single.segments,
            whole.target_positions_N[chosen] - segment.start, whole.target_ids_N[chosen], 0,
        )  # fmt: skip
        alone += float(step.loss_sum(row).detach())
        offset += segment.length
    assert total == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_a_row_of_one_token(mode: Mode, tmp_path: Path) -> None:
    """What a process without examples computes for the sake of the others; nothing is fused in packed layers."""
    model: nn.Module = load_base_model(
        GGUFFile.open(tiny_gguf("llama", tmp_path, tensor_type="Q8_0")), mode=mode
    )
    inject_lora(model, LoRASettings(4, 8.0, 0.0), seed=3)
    zero = torch.zeros(1, dtype=torch.int64)
    row = PackedRow(zero + 5, zero, [Segment(0, 1)], zero, zero + 7, 1)
    losses, gradients = [], []
    for fast in (False, True):
        model.zero_grad()
        loss = CausalStep(model.train(), use_fast_path=fast).loss_sum(row)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for _, p in trainable_parameters(model) if p.grad is not None])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_dora_takes_the_plain_path(tmp_path: Path) -> None:
    model = adapted(tiny_gguf("llama", tmp_path), use_dora=True)
    assert not is_supported(model)
    assert not CausalStep(model).can_share
