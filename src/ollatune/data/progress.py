"""The bar that shows how far the reading of a large data set is. On stderr, only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""
OnRead = Callable[[int], None]
"""Called with the number of bytes that were just read."""


class BuildBar:
    """Called with the bytes done and the bytes in all; what an earlier, killed build finished counts as done."""

    def __init__(self, description: str = "Tokenising", *, is_shown: bool = True) -> None:
        self._description = description
        self._is_shown = is_shown and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> BuildBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if not self._is_shown or (self._bar is None and done == total):
            return  # nothing to do: the cache is there
        if self._bar is None:
            from tqdm import tqdm

            # `initial` keeps what was there before out of the rate, and so the time left right.
            self._bar = tqdm(
                total=total, initial=done, desc=self._description, unit="B", unit_scale=True,
                file=sys.stderr, dynamic_ncols=True,
            )  # fmt: skip
            return
        self._bar.update(done - self._bar.n)


class TwoReadings:
    """Adds up the bytes of files that are read twice. Called with the number of bytes that were just read."""

    def __init__(self, paths: Iterable[Path], progress: Progress | None) -> None:
        self._half = 0
        for path in paths:
            with suppress(OSError):  # reading it says what is wrong with it
                self._half += path.stat().st_size
        self._progress = progress
        self._limit = self._half
        self._move_to(0)

    def __call__(self, num_bytes: int) -> None:
        # Parquet's numbers are near the file's size, not equal to it.
        self._move_to(min(self._done + num_bytes, self._limit))

    def begin_second(self) -> None:
        """The first reading is over, the second begins."""
        self._limit = 2 * self._half
        self._move_to(self._half)

    def finish(self) -> None:
        """Both are over."""
        self._move_to(2 * self._half)

    def _move_to(self, done: int) -> None:
        self._done = done
        if self._progress:
            self._progress(done, 2 * self._half)
