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
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import (
    clean_staging,
    make_folder,
    sha256_file,
    staged_file,
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
from ollatune.checkpoint.index import INDEX_NAME, IndexEntry, read_index, write_index

_NAME = re.compile(r"(epoch|step)_(\d+)\.(pt|shards)")


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
        self.entries = read_index(folder)

    def refuse_other_run(self, *, resumes: bool = False) -> None:
        """Raise UsageError when the folder holds checkpoints of another run.

        One that `resumes` has written some itself, and a kill may have left one of them out of the index.
        """
        known = {entry.file: entry.run_id for entry in self.entries}
        foreign = []
        for path in checkpoints_in(self.folder):
            owner = known.get(path.name)
            if owner is None and resumes:
                owner = self._owner_of(path)
            if owner != self.run_id:
                foreign.append(path.name)
        if foreign:
            raise UsageError(
                f"{self.folder} holds checkpoints of another run ({', '.join(sorted(foreign)[:3])}); "
                "nothing was changed.",
                hint=(
                    "Choose another folder with --output, or set output.checkpoints."
                    if resumes
                    else "Continue it with --resume auto, choose another folder with --output, "
                    "or start anew with --overwrite."
                ),
            )

    def _owner_of(self, path: Path) -> str:
        """The run that a checkpoint outside the index is of; one that cannot be read is of nobody else."""
        try:
            return _read_with_digest(path)[0].run_id
        except InputError:
            return self.run_id

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
        write_index(self.folder, self.entries)

    def kept(self) -> set[str]:
        """Names that rotation leaves: the best N, the last, the last finite."""
        ordered = sorted(self.entries, key=lambda e: (e.step, e.file))
        keep = {e.file for e in ordered[-1:]}
        keep |= {e.file for e in [e for e in ordered if e.is_finite][-1:]}
        scored = [e for e in ordered if _is_number(e.val_loss)]
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

    def adopt(self, step: int) -> list[str]:
        """Make the index true for a run that goes on from `step`; returns the names that were set aside.

        What a kill left out of it is entered: this run's checkpoints beside it (the next save rotates). What is gone
        is forgotten. Checkpoints of later steps are set aside as `later-…`: the run will write others in their place,
        and must neither count them as its last nor go on from them.
        """
        self.entries = [e for e in self.entries if (self.folder / e.file).exists()]
        self._enter_left_out()
        later = [e for e in self.entries if e.run_id == self.run_id and e.step > step]
        if not later:
            return []
        self.entries = [e for e in self.entries if e not in later]
        for entry in later:
            set_aside(self.folder / entry.file, "later-")
        self._write_index()
        return [entry.file for entry in later]

    def _enter_left_out(self) -> None:
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
        val_loss=checkpoint.val_loss if _is_number(checkpoint.val_loss) else None,
        is_finite=bool(checkpoint.metrics.get("is_finite", True)) and checkpoint.is_finite(),
        run_id=checkpoint.run_id,
        timestamp=checkpoint.timestamp,
    )


def _is_number(value: float | None) -> bool:
    """Whether JSON can hold it, and losses be compared by it."""
    return value is not None and math.isfinite(value)


def checkpoints_in(folder: Path) -> list[Path]:
    """Every file and folder that has a checkpoint's name; those that were set aside have not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def set_aside(path: Path, prefix: str) -> None:
    """Rename a checkpoint, so that nothing takes it for one; what had that name goes."""
    aside = path.with_name(prefix + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process of the run was faster
        path.replace(aside)


def load_checkpoint(path: Path, *, with_tensors: bool = True) -> Checkpoint:
    """Load one checkpoint, compared with the digest in the index beside it. Raises InputError.

    Without tensors a sharded one is read as far as every process needs it, and says where the rest is.
    """
    known = {entry.file: entry for entry in read_index(path.parent)}
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
    by_name = {entry.file: entry for entry in read_index(folder)}

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
            set_aside(bad, "corrupt-")
        return path, checkpoint
    raise InputError(
        f"There is no whole checkpoint in {folder}.",
        hint="Start the run without --resume, and with --overwrite if the output folder holds an earlier one.",
    )
