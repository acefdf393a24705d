"""Packed, padded and single batches give the same loss and gradients; every token is trained exactly once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ollatune.data.batching import IGNORED, Batch, packed_batch, padded_batch
from ollatune.data.store import Example

VOCABULARY = 97
LENGTHS = (5, 1, 17, 2, 9, 30)


def make_examples() -> list[Example]:
    rng = np.random.default_rng(3)
    examples = []
    for length in LENGTHS:
        is_target = rng.random(length) < 0.6
        is_target[0] = False
        if length > 1:
            is_target[-1] = True
        examples.append(Example(rng.integers(0, VOCABULARY, length).astype(np.int32), is_target))
    return examples


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def attention(batch: Batch) -> torch.Tensor:
    """[B, 1, T, T], True where a position may look: back, within its own example, never at padding."""
    if batch.cu_seqlens_N is not None:
        lengths = batch.cu_seqlens_N.diff()
        segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        same = segment[:, :, None] == segment[:, None, :]
    else:
        assert batch.attention_mask_BT is not None
        same = batch.attention_mask_BT[:, None, :].expand(-1, batch.input_ids_BT.shape[1], -1)
    length = batch.input_ids_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # A padding position may look at itself, or its softmax would have nothing to sum over.
    return ((same & causal) | torch.eye(length, dtype=torch.bool))[:, None]


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Sum of token losses over all batches, divided once by the number of targets."""
    model.zero_grad()
    count = sum(batch.num_target_tokens for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=attention(batch),
            use_cache=False,
        ).logits
        loss = cross_entropy(
            logits.flatten(0, 1),
            batch.target_ids_BT.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        (loss / count).backward()
        total += loss.item() / count
    return total, [parameter.grad.clone() for parameter in model.parameters()]


def layouts() -> dict[str, list[Batch]]:
    examples = make_examples()
    return {
        "packed in two": [packed_batch(examples[:3]), packed_batch(examples[3:])],
        "padded right": [padded_batch(examples, pad_id=5)],
        "padded left": [padded_batch(examples, pad_id=0, pad_left=True, multiple_of=8)],
        "one by one": [packed_batch([example]) for example in examples if example.num_targets],
        "packed backwards": [packed_batch(examples[::-1])],
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_every_layout_gives_the_loss_and_gradients_of_one_packed_row(model: Any, name: str) -> None:
    reference_loss, reference = loss_and_gradients(model, [packed_batch(make_examples())])
    loss, gradients = loss_and_gradients(model, layouts()[name])
    assert loss == pytest.approx(reference_loss, rel=1e-5)
    for ours, theirs in zip(gradients, reference, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-9


def test_without_borders_the_loss_would_differ(model: Any) -> None:
    """The comparison above can fail: one that lets examples see each other does."""
    (packed,) = layouts()["packed backwards"]
    reference, _ = loss_and_gradients(model, [packed])
    joined = Batch(
        **{
            **vars(packed),
            "cu_seqlens_N": torch.tensor([0, packed.num_tokens], dtype=torch.int32),
        }
    )
    leaking, _ = loss_and_gradients(model, [joined])
    assert abs(leaking - reference) > 1e-4
