"""The bar that shows how far the cache of a large data set is built. On stderr, only where that is a terminal."""

from __future__ import annotations

import sys
from typing import Any


class BuildBar:
    """Called with the bytes done and the bytes in all; what an earlier, killed build finished counts as done."""

    def __init__(self, *, is_shown: bool = True) -> None:
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
                total=total, initial=done, desc="Tokenising", unit="B", unit_scale=True,
                file=sys.stderr, dynamic_ncols=True,
            )  # fmt: skip
            return
        self._bar.update(done - self._bar.n)
