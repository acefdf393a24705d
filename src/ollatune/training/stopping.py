"""When to stop early, and how to tell that a run is overfitting."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Stops after `patience` validations in a row without improvement; None never stops.

    An improvement is a loss lower by more than `min_delta` than at the last improvement, so that many small steps
    down count, too. `best` is the lowest loss of all.
    """

    patience: int | None
    min_delta: float = 0.0
    best: float = math.inf
    last_improvement: float = math.inf
    num_bad: int = 0

    def update(self, val_loss: float) -> bool:
        """Take one validation loss; returns whether it is the best so far."""
        if val_loss < self.last_improvement - self.min_delta:
            self.last_improvement = val_loss
            self.num_bad = 0
        else:
            self.num_bad += 1
        is_best = (
            val_loss < self.best or self.best == math.inf
        )  # not finite, but nothing better is there
        if val_loss < self.best:
            self.best = val_loss
        return is_best

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.num_bad >= self.patience

    def state(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "last_improvement": self.last_improvement,
            "num_bad": self.num_bad,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.num_bad = state["best"], state["num_bad"]
        self.last_improvement = state["last_improvement"]


@dataclass
class OverfittingWatch:
    """Overfitting shows as a trend or as a gap (validation minus training loss).

    The trend: validation loss rose `patience` times in a row while training loss fell. The gap: it is larger than
    `max_gap` of the training loss and still growing. None turns either off.
    """

    patience: int | None
    max_gap: float | None = None
    history: list[tuple[float, float]] = field(default_factory=list)

    def update(self, train_loss: float, val_loss: float) -> str | None:
        """Take the losses of one validation; returns what is seen and what to change, or None."""
        self.history.append((train_loss, val_loss))
        seen = self._trend() or self._gap()
        if seen is None:
            return None
        return (
            f"Overfitting: {seen}. Train for fewer epochs or set early_stopping_patience; raise lora_dropout or "
            "weight_decay; lower lora_rank or learning_rate; or add data."
        )

    def _trend(self) -> str | None:
        if self.patience is None or len(self.history) <= self.patience:
            return None
        recent = self.history[-self.patience - 1 :]
        pairs = list(itertools.pairwise(recent))
        if not all(new[1] > old[1] and new[0] < old[0] for old, new in pairs):
            return None
        train_loss, val_loss = recent[-1]
        return (
            f"over the last {self.patience} validations the validation loss rose from {recent[0][1]:.4f} to "
            f"{val_loss:.4f} while the training loss fell to {train_loss:.4f} (gap {val_loss - train_loss:.4f})"
        )

    def _gap(self) -> str | None:
        if self.max_gap is None or len(self.history) < 2:
            return None
        before, now = (val_loss - train_loss for train_loss, val_loss in self.history[-2:])
        train_loss, val_loss = self.history[-1]
        if now <= self.max_gap * train_loss or now <= before:
            return None
        return (
            f"the validation loss ({val_loss:.4f}) is {now:.4f} above the training loss ({train_loss:.4f}), "
            f"more than {self.max_gap:.0%} of it, and the gap grows (it was {before:.4f})"
        )

    def state(self) -> dict[str, Any]:
        return {"history": [list(pair) for pair in self.history]}

    def load(self, state: dict[str, Any]) -> None:
        self.history = [(pair[0], pair[1]) for pair in state["history"]]
