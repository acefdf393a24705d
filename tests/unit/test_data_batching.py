"""Batches: aligned targets, borders, padding, packing into budgets, prefetching."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.data.batching import IGNORED, Batch, packed_batch, padded_batch
from ollatune.data.loader import BatchLoader, LoaderSettings, evaluation_batches, prefetched
from ollatune.data.order import SampleOrder
from ollatune.data.packing import first_fit_decreasing
from ollatune.data.store import (
    Example,
    ExampleSet,
    StoredArrays,
    TokenStore,
    WindowSet,
    pack_tokens,
)

A = Example(np.array([10, 11, 12, 13], np.int32), np.array([False, False, True, True]))
B = Example(np.array([20, 21], np.int32), np.array([False, True]))


def make_set(lengths: list[int]) -> ExampleSet:
    """Example i of length n holds the ids 1000 i … 1000 i + n - 1; all but the first are targets."""
    packed = [pack_tokens(np.arange(n) + 1000 * i, np.arange(n) > 0) for i, n in enumerate(lengths)]
    count = len(lengths)
    arrays = StoredArrays(
        tokens=np.concatenate(packed),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_targets=np.asarray(lengths, np.int64) - 1,
        digests=np.arange(count, dtype=np.uint64),
        prompt_digests=np.arange(count, dtype=np.uint64),
        source_ids=np.zeros(count, np.int64),
        scores=np.zeros(count),
        splits=np.full(count, -1),
        ordinals=np.arange(count),
    )
    return ExampleSet(TokenStore([arrays]))


def test_packed_batch_aligns_targets_and_restarts_positions() -> None:
    batch = packed_batch([A, B], sample_ids=[7, 3], position_after=9)
    assert batch.input_ids_BT.tolist() == [[10, 11, 12, 13, 20, 21]]
    assert batch.target_ids_BT.tolist() == [[IGNORED, 12, 13, IGNORED, 21, IGNORED]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.cu_seqlens_N is not None
    assert batch.cu_seqlens_N.tolist() == [0, 4, 6]
    assert batch.cu_seqlens_N.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_target_tokens, batch.num_tokens) == (4, 3, 6)
    assert (batch.sample_ids, batch.position_after, batch.num_examples) == ((7, 3), 9, 2)


@pytest.mark.parametrize("pad_left", [False, True])
def test_padded_batch_marks_padding_by_length(pad_left: bool) -> None:
    pad = 13  # also a real token: padding is never known by its id
    batch = padded_batch([A, B], pad_id=pad, pad_left=pad_left, multiple_of=5)
    row = [20, 21]
    expected = [pad] * 3 + row if pad_left else row + [pad] * 3
    assert batch.input_ids_BT[1].tolist() == expected
    place = slice(3, 5) if pad_left else slice(0, 2)
    assert batch.attention_mask_BT is not None
    assert batch.attention_mask_BT[1].nonzero().flatten().tolist() == [*range(5)[place]]
    assert batch.target_ids_BT[1, place].tolist() == [21, IGNORED]
    assert batch.position_ids_BT[1, place].tolist() == [0, 1]
    assert batch.num_target_tokens == 3 == int((batch.target_ids_BT != IGNORED).sum())
    assert batch.num_tokens == 6


def test_both_forms_hold_the_same_pairs_of_token_and_target() -> None:
    def pairs(batch: Batch) -> list[tuple[int, int, int]]:
        rows = zip(
            batch.input_ids_BT.flatten().tolist(),
            batch.position_ids_BT.flatten().tolist(),
            batch.target_ids_BT.flatten().tolist(),
            strict=True,
        )
        return [row for row in rows if row[2] != IGNORED]

    assert (
        pairs(packed_batch([A, B]))
        == pairs(padded_batch([A, B]))
        == pairs(padded_batch([A, B], pad_left=True))
    )


def test_tokens_and_targets_share_32_bits() -> None:
    ids = np.array([0, 1, 2**31 - 1], np.int64)
    packed = pack_tokens(ids, [True, False, True])
    assert packed.dtype == np.uint32
    store = TokenStore(
        [
            StoredArrays(
                packed,
                np.array([0, 3]),
                *(np.zeros(1, np.int64) for _ in range(7)),  # type: ignore[arg-type]
            )
        ]
    )
    example = store[0]
    assert example.token_ids.tolist() == ids.tolist()
    assert example.is_target.tolist() == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    num_bins=st.integers(1, 6),
    budget=st.integers(5, 60),
)
def test_bins_hold_every_item_once_and_no_more_than_the_budget(
    lengths: list[int], num_bins: int, budget: int
) -> None:
    bins = first_fit_decreasing(np.asarray(lengths), num_bins, budget)
    if bins is None:
        return
    assert sorted(item for part in bins for item in part) == list(range(len(lengths)))
    for part in bins:
        assert sum(lengths[i] for i in part) <= budget or len(part) == 1


def test_bins_refuse_what_does_not_fit() -> None:
    assert first_fit_decreasing(np.array([6, 6, 6]), 2, 10) is None
    assert first_fit_decreasing(np.array([4, 6, 6, 4]), 2, 10) == [[1, 0], [2, 3]]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=60),
    budget=st.integers(20, 100),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_budgeted_steps_cover_every_token_once(
    lengths: list[int], budget: int, accumulation: int, seed: int
) -> None:
    examples = make_set(lengths)
    order = SampleOrder(len(lengths), seed=seed)
    loader = BatchLoader(
        examples,
        order,
        LoaderSettings(batch_size=1, accumulation_steps=accumulation, token_budget=budget),
    )
    seen: list[int] = []
    position = 0
    for step in loader.steps(num_epochs=1):
        assert step.position == position
        position = step.position_after
        batches = list(step.micro_batches())
        assert len(batches) <= accumulation
        for batch in batches:
            assert batch.num_tokens <= budget or batch.num_examples == 1
            seen += batch.input_ids_BT.flatten().tolist()
        assert step.num_target_tokens == sum(b.num_target_tokens for b in batches)
    expected = sorted(1000 * i + t for i, n in enumerate(lengths) for t in range(n))
    assert sorted(seen) == expected
    assert loader.steps_per_epoch() == len(list(loader.steps(num_epochs=1)))


def test_packing_fills_rows_well() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 0.8, 1500), 8, 2048).astype(int).tolist()
    examples = make_set(lengths)
    loader = BatchLoader(
        examples,
        SampleOrder(len(lengths), seed=0),
        LoaderSettings(batch_size=1, accumulation_steps=8, token_budget=2048),
    )
    steps = list(loader.steps(num_epochs=1))
    filled = [
        len(ids) and int(examples.lengths[ids].sum())
        for s in steps[:-1]
        for ids in s.micro_batch_ids
    ]
    assert sum(filled) / (2048 * 8 * (len(steps) - 1)) > 0.97


@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_a_split_step_holds_the_same_samples_and_targets(split: int) -> None:
    examples = make_set([5, 3, 4, 6, 2, 7, 8, 9])
    loader = BatchLoader(
        examples, SampleOrder(8, seed=1), LoaderSettings(batch_size=4, accumulation_steps=2)
    )
    step = next(loader.steps())
    batches = list(step.micro_batches(split))
    assert [i for b in batches for i in b.sample_ids] == step.sample_ids.tolist()
    assert sum(b.num_target_tokens for b in batches) == step.num_target_tokens
    assert len(batches) == 2 * split


def test_a_process_without_samples_gets_a_batch_without_targets() -> None:
    examples = make_set([5, 3, 4])
    for rank, expected in ((0, 2), (1, 1), (2, 0)):
        loader = BatchLoader(
            examples,
            SampleOrder(3, seed=1, shuffle=False),
            LoaderSettings(batch_size=2 - (rank == 9), rank=rank, world_size=3),
        )
        (step,) = loader.steps(num_epochs=1)
        (batch,) = step.micro_batches()
        assert batch.num_examples == expected
        assert step.num_target_tokens == 9
        assert (batch.num_target_tokens > 0) == (expected > 0)
        assert batch.num_tokens > 0


def test_length_groups_waste_less_padding() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5, 0.9, 400), 4, 4000).astype(int)
    examples = make_set(lengths.tolist())

    def waste(group_size: int) -> float:
        order = SampleOrder(400, seed=2, lengths=lengths, group_size=group_size)
        loader = BatchLoader(examples, order, LoaderSettings(batch_size=8, is_packed=False))
        batches = [b for s in loader.steps(num_epochs=1) for b in s.micro_batches()]
        assert sorted(i for b in batches for i in b.sample_ids) == list(range(400))
        return 1 - sum(b.num_tokens for b in batches) / sum(b.input_ids_BT.numel() for b in batches)

    assert waste(0) > 0.4
    assert waste(8) < 0.15


def test_length_groups_and_batches_coincide_up_to_the_short_last_one() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(2, 39))
    order = SampleOrder(37, seed=5, lengths=lengths, group_size=4)
    shown = lengths[order.of_epoch(0, 0, 37)]
    groups = [shown[i : i + 4] for i in range(0, 37, 4)]
    assert all(group.max() - group.min() == 3 for group in groups[:9])
    assert groups[9].tolist() == [38]
    assert [int(group[0]) for group in groups] != sorted(int(group[0]) for group in groups)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    window=st.integers(2, 9),
    overlap=st.integers(0, 8),
    has_bos=st.booleans(),
    has_masks=st.booleans(),
)
def test_windows_know_their_targets_and_learn_every_token_once(
    documents: list[int], window: int, overlap: int, has_bos: bool, has_masks: bool
) -> None:
    overlap = min(overlap, window - 1)
    masks = []
    for number, length in enumerate(documents):
        mask = np.ones(length, np.bool_)
        mask[0] = not has_bos
        if has_masks and number % 2:
            mask[: length // 2] = False
        masks.append(mask)
    ends = np.cumsum(documents)
    ids = np.arange(ends[-1])
    packed = pack_tokens(ids, np.concatenate(masks))
    count = len(documents)
    arrays = StoredArrays(
        packed,
        np.concatenate([[0], ends]).astype(np.int64),
        np.array([int(mask.sum()) for mask in masks]),
        *(np.zeros(count, np.int64) for _ in range(3)),  # type: ignore[arg-type]
        np.zeros(count),
        np.full(count, -1),
        np.arange(count),
    )
    windows = WindowSet(TokenStore([arrays]), np.arange(count), window=window, overlap=overlap)
    learned: list[int] = []
    for index in range(len(windows)):
        example = windows[index]
        assert len(example) == windows.lengths[index] <= window
        assert example.num_targets == windows.num_targets[index] > 0
        learned += example.token_ids[1:][example.is_target[1:]].tolist()
    starts = set(range(0, int(ends[-1]), window)) if overlap == 0 else {0}
    targets = set(ids[np.concatenate(masks)].tolist())
    assert len(learned) == len(set(learned))
    assert set(learned) == targets - starts


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_example_once(world_size: int) -> None:
    examples = make_set([3] * 11)
    seen: list[int] = []
    counts = set()
    for rank in range(world_size):
        settings_ = LoaderSettings(batch_size=3, rank=rank, world_size=world_size)
        batches = list(evaluation_batches(examples, settings_))
        counts.add(len(batches))
        seen += [i for b in batches for i in b.sample_ids]
    assert sorted(seen) == list(range(11))
    assert len(counts) == 1


def test_prefetching_changes_nothing_and_passes_errors_on() -> None:
    examples = make_set([3] * 6)
    loader = BatchLoader(examples, SampleOrder(6, seed=0), LoaderSettings(batch_size=2))

    def batches() -> Iterator[Batch]:
        for step in loader.steps(num_epochs=1):
            yield from step.micro_batches()

    plain = [b.sample_ids for b in batches()]
    assert [b.sample_ids for b in prefetched(batches(), 2)] == plain
    assert [b.sample_ids for b in prefetched(batches(), 0)] == plain

    def failing() -> Iterator[Batch]:
        yield next(batches())
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(prefetched(failing(), 2))
    early = prefetched(batches(), 1)
    next(early)
    early.close()  # joins its thread, or the test would hang
