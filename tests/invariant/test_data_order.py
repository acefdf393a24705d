"""The order of samples: every record once an epoch, the same on any number of processes, resumed exactly anywhere."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.data.loader import BatchLoader, LoaderSettings
from ollatune.data.order import SampleOrder, make_key, permute, source_repeats
from tests.unit.test_data_batching import make_set


@settings(max_examples=60, deadline=None)
@given(size=st.one_of(st.integers(1, 300), st.integers(4000, 9000)), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    image = permute(np.arange(size), size, np.uint64(key))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_of_one_index_is_that_of_all() -> None:
    size, key = 100_003, make_key(5)
    some = np.array([0, 17, 99_999, 100_002])
    assert np.array_equal(permute(some, size, key), permute(np.arange(size), size, key)[some])


@pytest.mark.parametrize("size", [60, 4000, 4097, 20_000])
def test_permutations_look_random(size: int) -> None:
    """First places over many keys are spread evenly, and neighbours are not kept together."""
    firsts = np.array([permute(np.array([0]), size, make_key(k))[0] for k in range(400)])
    assert abs(firsts.mean() / size - 0.5) < 0.07
    image = permute(np.arange(size), size, make_key(1))
    assert np.mean(np.abs(np.diff(image)) == 1) < 0.08
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.3


def test_order_is_pinned() -> None:
    """A run begun with one version must resume with the next: these numbers never change."""
    assert SampleOrder(10, seed=42).samples(0, 20).tolist() == [
        *(7, 6, 3, 1, 8, 5, 9, 4, 2, 0),
        *(4, 7, 8, 2, 1, 5, 9, 6, 3, 0),
    ]
    assert SampleOrder(10_000, seed=42).of_epoch(1, 5000, 5).tolist() == [
        369,
        824,
        6900,
        9739,
        3360,
    ]


ORDERS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "file order": {"shuffle": False},
    "mixed": {"source_ids": np.arange(37) % 3, "repeats": (1.0, 2.0, 0.5)},
    "curriculum": {"difficulty": (np.arange(37) * 7 % 37).astype(float)},
    "length groups": {"lengths": np.arange(37) * 5 % 31, "group_size": 4},
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("token_budget", [None, 60])
def test_resuming_after_any_step_repeats_the_stream(name: str, token_budget: int | None) -> None:
    """For every k over three epochs: what was seen up to k and what is seen after k is the whole stream."""
    examples = make_set([2 + (i * 11) % 23 for i in range(37)])

    def stream(position: int) -> list[tuple[int, int, list[int], bool]]:
        order = SampleOrder(37, seed=7, **ORDERS[name])
        loader = BatchLoader(
            examples,
            order,
            LoaderSettings(batch_size=3, accumulation_steps=2, token_budget=token_budget),
        )
        return [
            (s.position, s.position_after, s.sample_ids.tolist(), s.is_epoch_end)
            for s in loader.steps(position, num_epochs=3)
        ]

    whole = stream(0)
    assert sum(step[3] for step in whole) == 3
    for k, step in enumerate(whole):
        assert stream(step[0]) == whole[k:]
    assert stream(whole[-1][1]) == []


@pytest.mark.parametrize("token_budget", [None, 60])
@pytest.mark.parametrize("count", [1, 5, 24, 37])
def test_processes_share_the_same_steps(count: int, token_budget: int | None) -> None:
    """1, 2 and 4 processes with the same optimiser batch: equal steps, each record once an epoch."""
    examples = make_set([2 + (i * 11) % 23 for i in range(count)])
    steps_by_world = []
    for world_size in (1, 2, 4):
        ranks = []
        for rank in range(world_size):
            loader = BatchLoader(
                examples,
                SampleOrder(count, seed=3),
                LoaderSettings(
                    batch_size=3,
                    accumulation_steps=4 // world_size,
                    rank=rank,
                    world_size=world_size,
                    token_budget=token_budget,
                ),
            )
            ranks.append(list(loader.steps(num_epochs=2)))
        assert len({len(steps) for steps in ranks}) == 1
        merged = []
        for together in zip(*ranks, strict=True):
            assert len({len(step.micro_batch_ids) for step in together}) == 1
            assert len({(s.position, s.position_after, s.num_target_tokens) for s in together}) == 1
            seen = sorted(int(i) for step in together for i in step.sample_ids)
            merged.append((together[0].position_after, together[0].num_target_tokens, seen))
        for epoch in range(2):
            ids = [i for after, _, seen in merged for i in seen if (after - 1) // count == epoch]
            assert sorted(ids) == list(range(count))
        steps_by_world.append(merged)
    assert steps_by_world[0] == steps_by_world[1] == steps_by_world[2]


def test_resuming_at_99_percent_of_ten_million_is_immediate() -> None:
    order = SampleOrder(10_000_000, seed=1)
    started = time.thread_time()  # whatever else the machine does
    found = order.samples(2 * 10_000_000 + 9_900_000, 64)
    assert time.thread_time() - started < 2
    assert len(set(found.tolist())) == 64


def test_epochs_differ_and_seeds_differ() -> None:
    order = SampleOrder(50, seed=1)
    assert order.of_epoch(0, 0, 50).tolist() != order.of_epoch(1, 0, 50).tolist()
    assert order.of_epoch(0, 0, 50).tolist() != SampleOrder(50, seed=2).of_epoch(0, 0, 50).tolist()


def test_temperature_evens_sources_out_and_keeps_the_epoch() -> None:
    sizes = [1000, 10]
    assert source_repeats(sizes, [1, 1]) == [1, 1]
    assert source_repeats(sizes, [1, 3]) == [1, 3]
    repeats = source_repeats(sizes, [1, 1], temperature=2)
    drawn = [r * n for r, n in zip(repeats, sizes, strict=True)]
    assert sum(drawn) == pytest.approx(1010)
    assert drawn[0] / drawn[1] == pytest.approx(10)  # sqrt(1000 / 10)
    assert source_repeats([5, 0], [1, 1], temperature=2) == [pytest.approx(1), 0]
