"""Rows made ahead are the rows made when they are needed."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ollatune.config.schema import DataConfig
from ollatune.data.loader import BatchLoader, LoaderSettings, Step
from ollatune.data.order import SampleOrder
from ollatune.modeling.fast.forward import PackedRow
from ollatune.training.feed import RowFeed
from tests.run_helpers import assert_same_weights, inject, run, train_command
from tests.unit.test_data_batching import make_set

CPU = torch.device("cpu")


def makers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "ollatune-batches"]


def loader_of(lengths: list[int]) -> BatchLoader:
    settings = LoaderSettings(batch_size=3, accumulation_steps=2)
    return BatchLoader(make_set(lengths), SampleOrder(len(lengths), seed=1), settings)


def feed_of(loader: BatchLoader, num_ahead: int) -> RowFeed:
    settings = DataConfig(prefetch_batches=num_ahead)
    return RowFeed(loader, share=True, settings=settings, device=CPU)


def numbers(rows: list[PackedRow]) -> list[list[int]]:
    return [[*row.input_ids_T.tolist(), *row.target_positions_N.tolist()] for row in rows]


@pytest.mark.parametrize("num_ahead", [1, 2, 7])
def test_rows_of_steps_repeated_cut_and_jumped_to(num_ahead: int) -> None:
    """Also where a step is left in the middle, as when memory runs out."""
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 9, 20)]
    loader = loader_of(lengths)
    steps: list[Step] = []
    for step in loader.steps():
        steps.append(step)
        if len(steps) == 7:
            break
    asked = [(0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (3, 4), (4, 1), (1, 1), (2, 1), (6, 3)]
    plain, ahead = feed_of(loader, 0), feed_of(loader, num_ahead)
    for which, split in asked:
        wanted = numbers(list(plain.rows(steps[which], split)))
        assert len(wanted) == 2 * split or which in (3, 6)  # fewer at the end of an epoch
        assert numbers(list(ahead.rows(steps[which], split))) == wanted
        rows = ahead.rows(steps[which], split)
        next(rows)
        rows.close()  # type: ignore[attr-defined]
    assert makers() == ["ollatune-batches"]
    ahead.close()
    assert makers() == []


def test_what_is_not_configured_follows_the_device() -> None:
    loader = loader_of([4, 5])
    found = RowFeed(loader, share=True, settings=DataConfig(), device=CPU)
    assert (found.num_ahead, found.pins) == (0, False)
    found = RowFeed(loader, share=True, settings=DataConfig(), device=torch.device("cuda"))
    assert (found.num_ahead, found.pins) == (2, True)
    off = DataConfig(prefetch_batches=0, pin_memory=False)
    found = RowFeed(loader, share=True, settings=off, device=torch.device("cuda"))
    assert (found.num_ahead, found.pins) == (0, False)


def test_a_run_is_the_same_whether_its_rows_are_made_ahead_or_not(
    base: Path, data: Path, tmp_path: Path
) -> None:
    ahead = ("--set", "data.prefetch_batches=3")
    assert run(train_command(base, data, tmp_path / "plain")) == 0
    with inject("train.micro_batch:oom@3"):  # makes a step anew, in smaller pieces
        assert run(train_command(base, data, tmp_path / "ahead", *ahead)) == 0
    assert makers() == []
    with inject("train.micro_batch:oom@3"):
        assert run(train_command(base, data, tmp_path / "cut")) == 0
    last = Path("checkpoints") / "epoch_2.pt"
    assert_same_weights(tmp_path / "ahead" / last, tmp_path / "cut" / last)
    assert run(train_command(base, data, tmp_path / "whole", *ahead)) == 0
    assert_same_weights(tmp_path / "plain" / last, tmp_path / "whole" / last)
    broken = train_command(base, data, tmp_path / "broken", *ahead)
    with inject("train.gradient:nan@2"):
        assert run(broken) == 6
    assert makers() == []
