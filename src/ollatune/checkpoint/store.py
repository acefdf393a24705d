"""The checkpoint folder: atomic saves, an index with digests, rotation that never removes the last good one.

Order of one save: checkpoint staged → fsync → rename → index staged → fsync → rename → superseded files removed.
A kill at any instant leaves the earlier checkpoints, and the index true or one entry behind. A file that the index
does not know was either just renamed or just superseded: it is whole, and what it says of itself counts.

A sharded checkpoint (see `shards.py`) is a folder that goes the same way. A folder cannot be renamed over another: one
that is saved anew is first renamed itself, and named back where a kill came between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import (
    clean_staging,
    make_folder,
    sha256_file,
    staged_file,
    write_json,
)
from ollatune.base.log import get_logger
from ollatune.checkpoint.folders import (
    finish_replacing,
    is_checkpoint_folder,
    remove_checkpoint,
    replace_folder,
    staging_path,
)
from ollatune.checkpoint.format import (
    Checkpoint,
    parse_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

INDEX_NAME = "index.json"
_NAME = re.compile(r"(epoch|step)_(\d+)\.(pt|shards)")


@dataclass(frozen=True)
class IndexEntry:
    """One checkpoint as the index knows it."""

    file: str
    sha256: str
    size_bytes: int
    step: int
    epoch: int
    val_loss: float | None
    is_finite: bool
    run_id: str
    timestamp: str


class CheckpointStore:
    """The checkpoints of one run in `folder`.

    Args:
        keep_best: how many are kept by validation loss; the last and the last finite one stay besides.
        run_id: owner; checkpoints of another run in the same folder are never touched and refuse a new run.
    """

    def __init__(self, folder: Path, *, keep_best: int, run_id: str) -> None:
        self.folder = folder
        self.keep_best = keep_best
        self.run_id = run_id
        self.entries = _read_index(folder)

    def refuse_other_run(self) -> None:
        """Raise UsageError when the folder holds checkpoints of another run."""
        others = [path.name for path in checkpoints_in(self.folder)]
        known = {entry.file for entry in self.entries if entry.run_id == self.run_id}
        foreign = [name for name in others if name not in known]
        if foreign:
            raise UsageError(
                f"{self.folder} holds checkpoints of another run ({', '.join(sorted(foreign)[:3])}).",
                hint=(
                    "Continue it with --resume auto, choose another folder with --output, "
                    "or start anew with --overwrite."
                ),
            )

    def save(self, checkpoint: Checkpoint, name: str) -> Path:
        """Write `checkpoint` as `name` (`epoch_2.pt`), update the index, then rotate. Raises StorageError."""
        make_folder(self.folder)
        path = self.folder / name
        with staged_file(path, needed_bytes=self.usual_bytes) as stream:
            sha256 = write_checkpoint(checkpoint, stream)
        return self._enter(_entry(checkpoint, path, sha256, path.stat().st_size))

    def _enter(self, entry: IndexEntry) -> Path:
        """Note in the index what now lies under the entry's name, then rotate."""
        name = entry.file
        self.entries = [e for e in self.entries if e.file != name] + [entry]
        self._write_index()
        self._rotate()
        return self.folder / name

    @property
    def usual_bytes(self) -> int | None:
        """What the checkpoint before took, as far as one is known."""
        return self.entries[-1].size_bytes if self.entries else None

    @property
    def newest(self) -> Path | None:
        """The checkpoint of the last step that was saved."""
        last = max(self.entries, key=lambda entry: entry.step, default=None)
        return None if last is None else self.folder / last.file

    def stage_shards(self, name: str) -> Path:
        """A staging folder for the parts of the sharded checkpoint `name`. Raises StorageError."""
        return make_folder(staging_path(self.folder / name))

    def adopt_shards(
        self, staging: Path, checkpoint: Checkpoint, name: str, *, is_finite: bool
    ) -> Path:
        """Complete `staging`, where every part is, and let it become `name`. Raises OSError."""
        from ollatune.checkpoint.shards import CONTENT_NAME, write_manifest

        checkpoint.metrics["is_finite"] = is_finite  # its own tensors cannot say
        with staged_file(staging / CONTENT_NAME) as stream:
            write_checkpoint(checkpoint, stream)
        digest, size_bytes = write_manifest(staging)
        path = self.folder / name
        replace_folder(staging, path)
        return self._enter(_entry(checkpoint, path, digest, size_bytes))

    def _write_index(self) -> None:
        entries = sorted(self.entries, key=lambda e: (e.step, e.file))
        listed = [asdict(entry) for entry in entries]
        write_json(self.folder / INDEX_NAME, {"checkpoints": listed, "sha256": _digest_of(listed)})

    def kept(self) -> set[str]:
        """Names that rotation leaves: the best N, the last, the last finite."""
        ordered = sorted(self.entries, key=lambda e: (e.step, e.file))
        keep = {e.file for e in ordered[-1:]}
        keep |= {e.file for e in [e for e in ordered if e.is_finite][-1:]}
        scored = [e for e in ordered if e.val_loss is not None and math.isfinite(e.val_loss)]
        scored.sort(key=lambda e: (e.val_loss, e.step))
        keep |= {e.file for e in scored[: self.keep_best]}
        if not scored:
            keep |= {e.file for e in ordered[-self.keep_best :]}
        return keep

    def _rotate(self) -> None:
        keep = self.kept()
        superseded = [e for e in self.entries if e.file not in keep]
        if not superseded:
            return
        self.entries = [e for e in self.entries if e.file in keep]
        self._write_index()
        for entry in superseded:
            with contextlib.suppress(OSError):
                remove_checkpoint(self.folder / entry.file)

    def adopt(self) -> None:
        """Enter into the index what a kill left out of it: this run's checkpoints beside it. The next save rotates."""
        known = {entry.file for entry in self.entries}
        for path in checkpoints_in(self.folder):
            if path.name in known:
                continue
            try:
                checkpoint, digest = _read_with_digest(path)
            except InputError:
                continue
            if checkpoint.run_id == self.run_id:
                size = sum(f.stat().st_size for f in (path, *path.glob("*")) if f.is_file())
                self.entries.append(_entry(checkpoint, path, digest, size))

    def clear(self) -> None:
        """Remove every checkpoint and the index (the user asked for --overwrite)."""
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for path in checkpoints_in(self.folder):
            remove_checkpoint(path)
        self.entries = []


def _read_with_digest(path: Path) -> tuple[Checkpoint, str]:
    """A checkpoint that the index does not know, and what the index would say of it. Raises InputError."""
    if is_checkpoint_folder(path):
        from ollatune.checkpoint.shards import read_folder

        return read_folder(path)
    return read_checkpoint(path), sha256_file(path)


def _entry(checkpoint: Checkpoint, path: Path, sha256: str, size_bytes: int) -> IndexEntry:
    return IndexEntry(
        file=path.name,
        sha256=sha256,
        size_bytes=size_bytes,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        val_loss=checkpoint.val_loss,
        is_finite=bool(checkpoint.metrics.get("is_finite", True)) and checkpoint.is_finite(),
        run_id=checkpoint.run_id,
        timestamp=checkpoint.timestamp,
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """Every file and folder that has a checkpoint's name; those that were set aside have not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _digest_of(listed: list[dict[str, Any]]) -> str:
    """Hex sha256 of an index's entries: a flipped bit in the step would otherwise make another one the newest."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def _read_index(folder: Path) -> list[IndexEntry]:
    try:
        content = json.loads((folder / INDEX_NAME).read_bytes())
        listed = content.pop("checkpoints")
        if content and content != {"sha256": _digest_of(listed)}:  # none in older indexes
            raise ValueError
        return [IndexEntry(**entry) for entry in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        get_logger("checkpoint").warning(
            "%s is damaged; the checkpoints beside it are checked one by one.", folder / INDEX_NAME
        )
        return []


def load_checkpoint(path: Path, *, with_tensors: bool = True) -> Checkpoint:
    """Load one checkpoint, compared with the digest in the index beside it. Raises InputError.

    Without tensors a sharded one is read as far as every process needs it, and says where the rest is.
    """
    known = {entry.file: entry for entry in _read_index(path.parent)}
    entry = known.get(path.name)
    if is_checkpoint_folder(path):
        return _load_shards(path, entry, with_tensors)
    if entry is None:
        return read_checkpoint(path)
    try:
        content = path.read_bytes()
    except OSError:
        return read_checkpoint(path)  # raises with the right message
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256 and not _is_newer_whole(content, path, entry):
        raise InputError(
            f"{path} is damaged: its sha256 begins {found[:12]}, the index says {entry.sha256[:12]}.",
            hint="Use an earlier checkpoint, or --resume auto.",
        )
    return parse_checkpoint(content, str(path))


def _load_shards(path: Path, entry: IndexEntry | None, with_tensors: bool) -> Checkpoint:
    from ollatune.checkpoint.shards import read_folder, with_all_tensors

    checkpoint, found = read_folder(path)
    if entry and found != entry.sha256 and checkpoint.timestamp == entry.timestamp:
        raise InputError(
            f"{path} is damaged: the sha256 of its manifest begins {found[:12]}, the index says {entry.sha256[:12]}.",
            hint="Use an earlier checkpoint, or --resume auto.",
        )
    return with_all_tensors(checkpoint) if with_tensors else checkpoint


def _is_newer_whole(content: bytes, path: Path, entry: IndexEntry) -> bool:
    """A kill between the two renames of a re-save leaves a whole file that is newer than the index.

    Only that it is another save can be seen: clocks may have been set back in between.
    """
    try:
        checkpoint = parse_checkpoint(content, str(path))
    except InputError:
        return False
    return checkpoint.timestamp != entry.timestamp


def newest_checkpoint(
    folder: Path, *, report: Callable[[str], None] | None = None, with_tensors: bool = True
) -> tuple[Path, Checkpoint]:
    """The newest checkpoint in `folder` that is whole; damaged ones are set aside and reported.

    Raises InputError when there is none.
    """
    report = report or get_logger("checkpoint").warning
    if folder.is_dir():
        finish_replacing(folder)
        clean_staging(folder)
    by_name = {entry.file: entry for entry in _read_index(folder)}

    def recency(path: Path) -> tuple[float, str]:
        if (entry := by_name.get(path.name)) is not None:
            return entry.step, entry.timestamp
        try:
            unknown = _read_with_digest(path)[0]
        except InputError:
            return math.inf, ""  # tried first, reported and set aside
        return unknown.step, unknown.timestamp

    damaged = []
    for path in sorted(checkpoints_in(folder), key=recency, reverse=True):
        try:
            checkpoint = load_checkpoint(path, with_tensors=with_tensors)
        except InputError as error:
            damaged.append(path)
            report(f"{error.message} It is set aside; trying the one before.")
            continue
        for bad in damaged:
            aside = bad.with_name(f"corrupt-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process of the run was faster
                bad.replace(aside)
        return path, checkpoint
    raise InputError(
        f"There is no whole checkpoint in {folder}.",
        hint="Start the run without --resume, and with --overwrite if the output folder holds an earlier one.",
    )
