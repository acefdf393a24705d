"""Which best_model.pt a resumed run begins with: the one that was the best when its checkpoint was made."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from ollatune.base.errors import InputError
from ollatune.base.files import staged_file
from ollatune.base.log import get_logger
from ollatune.checkpoint.folders import is_checkpoint_folder
from ollatune.checkpoint.format import Checkpoint, read_checkpoint, write_checkpoint
from ollatune.checkpoint.index import IndexEntry, read_index
from ollatune.checkpoint.store import load_checkpoint


def settle_best_model(
    target: Path, resumed_from: Path, checkpoint: Checkpoint, best_loss: float
) -> float:
    """Let `target` be the best model as of `checkpoint`; returns its validation loss (infinite: none was validated).

    It is there already, or in the output folder of before. One that is missing, damaged, of another run or of a later
    step (the run goes back to before it) is made from the best checkpoint kept so far; a warning says so where that
    is not the one whose loss `best_loss` the run remembers. Nothing is to be done before the first validation.
    """
    previous = Path(str(checkpoint.config["output"]["folder"])) / target.name
    if _is_of(target, checkpoint):
        return best_loss
    if _is_of(previous, checkpoint):
        with previous.open("rb") as reader, staged_file(target) as writer:
            shutil.copyfileobj(reader, writer)
        return best_loss
    if checkpoint.val_loss is None and math.isinf(best_loss) and not checkpoint.epoch:
        return best_loss
    source, found = _best_kept(resumed_from, checkpoint)
    stored = load_checkpoint(source)
    with staged_file(target) as stream:
        write_checkpoint(replace(stored, optimizer_state_dict={}, resume={}), stream)
    if found > best_loss:
        get_logger("training").warning(
            "The best model so far (validation loss %.4f) is gone; %s takes its place.", best_loss, source
        )  # fmt: skip
    return found


def _is_of(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether the best model at `path` is of the checkpoint's run and not of a later step."""
    try:
        best = read_checkpoint(path)
    except InputError:
        return False
    return best.run_id == checkpoint.run_id and best.step <= checkpoint.step


def _best_kept(resumed_from: Path, checkpoint: Checkpoint) -> tuple[Path, float]:
    """The checkpoint with the lowest validation loss beside the one resumed from, up to its step, and that loss."""

    def is_usable(entry: IndexEntry) -> bool:
        path = resumed_from.with_name(entry.file)
        return (
            entry.val_loss is not None
            and entry.run_id == checkpoint.run_id
            and entry.step <= checkpoint.step
            and (path.is_file() or is_checkpoint_folder(path))
        )

    entries = [entry for entry in read_index(resumed_from.parent) if is_usable(entry)]
    for entry in sorted(entries, key=lambda e: (e.val_loss, e.step)):
        try:
            path = resumed_from.with_name(entry.file)
            load_checkpoint(path, with_tensors=False)
        except InputError:
            continue
        assert entry.val_loss is not None
        return path, entry.val_loss
    val_loss = checkpoint.val_loss
    return resumed_from, math.inf if val_loss is None else val_loss
