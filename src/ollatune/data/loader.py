"""The training stream cut into optimiser steps, each split among micro-batches and processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ollatune.data.batching import Batch, packed_batch, padded_batch
from ollatune.data.order import SampleOrder
from ollatune.data.packing import fill_rows
from ollatune.data.store import Example, ExampleSource

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LoaderSettings:
    """How examples become batches. `token_budget` replaces `batch_size` as the size of a packed micro-batch."""

    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    token_budget: int | None = None
    is_packed: bool = True
    pad_id: int = 0
    pad_multiple_of: int = 1


@dataclass(frozen=True)
class Step:
    """One optimiser step: its global samples, and this process's share of them as micro-batches."""

    epoch: int
    position: int
    position_after: int
    is_epoch_end: bool
    num_target_tokens: int
    """Over all micro-batches of all processes: what the summed loss is divided by."""
    micro_batch_ids: tuple[Indices, ...]
    """This process's examples, micro-batch by micro-batch. An empty one keeps step with the other processes."""
    loader: BatchLoader

    @property
    def sample_ids(self) -> Indices:
        """This process's examples in order."""
        return (
            np.concatenate(self.micro_batch_ids) if self.micro_batch_ids else np.zeros(0, np.int64)
        )

    def micro_batches(self, split: int = 1) -> Iterator[Batch]:
        """The batches of this process, each cut into up to `split` parts of about equal size (after an OOM).

        Cutting changes neither the samples nor the number of target tokens of the step. Every process gets the same
        number of batches; one without examples of its own gets one without targets.
        """
        for ids in self.micro_batch_ids:
            for part in np.array_split(ids, split):
                yield self.loader.batch(part, position_after=self.position_after)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of this process's share."""
        return int(self.loader.examples.lengths[self.sample_ids].sum())


class BatchLoader:
    """Deals the training stream out in optimiser steps. Its whole state is the position, an integer.

    A step takes the next batch_size × accumulation_steps × world_size samples (fewer at the end of an epoch), so the
    samples of a step do not depend on how they are shared out. With a token budget it takes as many samples as fit
    into accumulation_steps × world_size rows of that many tokens.
    """

    def __init__(
        self, examples: ExampleSource, order: SampleOrder, settings: LoaderSettings
    ) -> None:
        assert settings.token_budget is None or settings.is_packed
        self.examples = examples
        self.order = order
        self.settings = settings

    @property
    def epoch_size(self) -> int:
        """Samples in one epoch."""
        return self.order.epoch_size

    @property
    def _num_micro_batches(self) -> int:
        return self.settings.accumulation_steps * self.settings.world_size

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimiser steps in one epoch; with a token budget they differ a little from epoch to epoch."""
        if self.settings.token_budget is None:
            return -(-self.epoch_size // (self.settings.batch_size * self._num_micro_batches))
        return sum(1 for _ in self._epoch_bins(epoch, 0))

    def steps(self, position: int = 0, *, num_epochs: int | None = None) -> Iterator[Step]:
        """Steps from `position` on, to the end of epoch `num_epochs` (without end if None)."""
        epoch, offset = divmod(position, self.epoch_size)
        while num_epochs is None or epoch < num_epochs:
            for start, bins in self._epoch_bins(epoch, offset):
                yield self._step(epoch, start, bins)
            epoch, offset = epoch + 1, 0

    def _epoch_bins(self, epoch: int, offset: int) -> Iterator[tuple[int, list[Indices]]]:
        """(offset, global micro-batches) of every step of an epoch from `offset` on."""
        settings = self.settings
        num_bins = self._num_micro_batches
        chunk = settings.batch_size * num_bins
        while offset < self.epoch_size:
            if settings.token_budget is None:
                ids = self.order.of_epoch(epoch, offset, min(chunk, self.epoch_size - offset))
                bins = [
                    ids[i : i + settings.batch_size]
                    for i in range(0, len(ids), settings.batch_size)
                ]
            else:
                bins = self._filled(epoch, offset, settings.token_budget)
            yield offset, bins
            offset += sum(len(part) for part in bins)

    def _filled(self, epoch: int, offset: int, budget: int) -> list[Indices]:
        return fill_rows(
            lambda count: self.order.of_epoch(epoch, offset, count),
            self.epoch_size - offset,
            self.examples.lengths,
            num_rows=self._num_micro_batches,
            budget=budget,
        )

    def _step(self, epoch: int, offset: int, bins: Sequence[Indices]) -> Step:
        settings = self.settings
        rounds = -(-len(bins) // settings.world_size)
        empty = np.zeros(0, np.int64)
        mine = [
            bins[i] if (i := number * settings.world_size + settings.rank) < len(bins) else empty
            for number in range(rounds)
        ]
        count = sum(len(part) for part in bins)
        position = epoch * self.epoch_size + offset
        return Step(
            epoch=epoch,
            position=position,
            position_after=position + count,
            is_epoch_end=offset + count == self.epoch_size,
            num_target_tokens=int(sum(self.examples.num_targets[part].sum() for part in bins)),
            micro_batch_ids=tuple(mine),
            loader=self,
        )

    def batch(self, ids: Indices, *, position_after: int = 0) -> Batch:
        """One micro-batch of the examples `ids`; without ids, a placeholder in which nothing is a target."""
        if len(ids):
            examples = [self.examples[int(index)] for index in ids]
        else:
            shortest = self.examples[int(np.argmin(self.examples.lengths))]
            examples = [Example(shortest.token_ids, np.zeros_like(shortest.is_target))]
        known: dict[str, Any] = {"sample_ids": ids.tolist(), "position_after": position_after}
        if self.settings.is_packed:
            return packed_batch(examples, **known)
        return padded_batch(
            examples,
            pad_id=self.settings.pad_id,
            multiple_of=self.settings.pad_multiple_of,
            **known,
        )


def evaluation_batches(
    examples: ExampleSource, settings: LoaderSettings, *, limit: int | None = None
) -> Iterator[Batch]:
    """This process's share of all examples once, in their own order; every process gets the same number of batches."""
    count = len(examples) if limit is None else min(limit, len(examples))
    loader = BatchLoader(examples, SampleOrder(len(examples), seed=0, shuffle=False), settings)
    starts = range(0, count, settings.batch_size)
    rounds = -(-len(starts) // settings.world_size)
    for number in range(rounds):
        index = number * settings.world_size + settings.rank
        start = starts[index] if index < len(starts) else count
        yield loader.batch(np.arange(start, min(start + settings.batch_size, count)))


T = TypeVar("T")


def prefetched(batches: Iterator[T], num_ahead: int = 2) -> Iterator[T]:
    """The same batches, made by a thread while the last one is being computed on. Errors come through."""
    if num_ahead < 1:
        yield from batches
        return
    ready: queue.Queue[Any] = queue.Queue(maxsize=num_ahead)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((None, None))
        except BaseException as error:  # handed to the consumer, who raises it
            put((None, error))

    thread = threading.Thread(target=produce, name="ollatune-batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stopped.set()
        thread.join()
