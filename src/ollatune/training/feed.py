"""The rows of a run's steps, made ahead while earlier ones are computed on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ollatune.config.schema import DataConfig
from ollatune.data.loader import BatchLoader, Step, prefetched
from ollatune.modeling.fast.forward import PackedRow
from ollatune.training.rows import row_of

_AHEAD_OF_A_GPU = 2
"""Rows made ahead where nothing is configured; a CPU would make them with the cores that compute."""


class RowFeed:
    """Rows for one optimiser step after the other.

    A step that is not the next one - repeated in smaller pieces, after a roll-back - begins a new stream. The rows are
    the same whether they are made ahead or not.

    Args:
        share: common beginnings of a row's examples are computed once.
        settings: `prefetch_batches` and `pin_memory`; None is decided by `device`.
    """

    def __init__(
        self, loader: BatchLoader, *, share: bool, settings: DataConfig, device: torch.device
    ) -> None:
        on_gpu = device.type == "cuda"
        ahead, pin = settings.prefetch_batches, settings.pin_memory
        self.num_ahead = (_AHEAD_OF_A_GPU if on_gpu else 0) if ahead is None else ahead
        self.pins = on_gpu if pin is None else pin and torch.cuda.is_available()
        self._loader, self._share = loader, share
        self._stream: Iterator[PackedRow] = iter(())
        self._next: tuple[int, int] | None = None

    def rows(self, step: Step, split: int) -> Iterator[PackedRow]:
        """The rows of `step`, its micro-batches cut into `split` parts."""
        if self._next != (step.position, split):
            self.close()
            self._stream = prefetched(self._rows_from(step.position, split), self.num_ahead)
        self._next = None  # until all of the step's are taken
        for _ in range(len(step.micro_batch_ids) * split):
            yield next(self._stream)
        self._next = (step.position_after, split)

    def close(self) -> None:
        """Stop making rows."""
        self._next = None
        stream, self._stream = self._stream, iter(())
        if (stop := getattr(stream, "close", None)) is not None:
            stop()

    def _rows_from(self, position: int, split: int) -> Iterator[PackedRow]:
        for step in self._loader.steps(position):
            for batch in step.micro_batches(split):
                row = row_of(batch, share=self._share)
                yield row.pin_memory() if self.pins else row
