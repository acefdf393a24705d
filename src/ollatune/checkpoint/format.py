"""What a checkpoint is: one `.pt` file of tensors and plain values, loadable with `weights_only=True`.

The names of the specification (7.2) are kept; what exact resume needs besides stands in `resume`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ollatune.base.errors import InputError

FORMAT_VERSION = 1
REQUIRED_KEYS = (
    "epoch", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict",
    "train_loss", "val_loss", "config", "timestamp",
)  # fmt: skip


@dataclass
class Checkpoint:
    """A checkpoint's content.

    Attributes:
        epoch: epochs completed; step: optimiser steps completed.
        model_state_dict: the trained tensors only (adapter, or all weights), by parameter name.
        train_loss, val_loss: mean loss per target token; val_loss is None before the first validation.
        config: the resolved configuration as plain values.
        base: what the run was trained on: name, digest, architecture.
        resume: RNG states, data position, loop counters.
        versions: package versions of the writer.
        shards: the folder where the tensors still are, for a sharded checkpoint that was read without them.
    """

    epoch: int
    step: int
    model_state_dict: dict[str, Tensor]
    optimizer_state_dict: dict[str, Any]
    scheduler_state_dict: dict[str, Any]
    train_loss: float | None
    val_loss: float | None
    config: dict[str, Any]
    timestamp: str
    run_id: str
    base: dict[str, Any]
    resume: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    shards: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """What is stored."""
        return {key: value for key, value in vars(self).items() if key != "shards"}

    def is_finite(self) -> bool:
        """Whether every trained tensor is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.model_state_dict.values())


class _Written:
    """Passes bytes on and hashes them; keeps the error that torch would replace by one of its own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            self._stream.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        return len(content)

    def flush(self) -> None:
        self._stream.flush()


def write_checkpoint(checkpoint: Checkpoint, stream: IO[bytes]) -> str:
    """Serialise to `stream` without a copy in memory; returns the hex sha256 of what was written.

    The same content gives the same bytes. Raises OSError where the stream cannot be written.
    """
    written = _Written(stream)
    try:
        torch.save(checkpoint.as_dict(), cast(IO[bytes], written))
    except RuntimeError:
        if written.error is not None:
            raise written.error from None
        raise
    return written.digest.hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint safely. Raises InputError for anything that is not a complete checkpoint of ours."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"There is no checkpoint {path}.",
            hint="Pass --resume auto to take the newest one, or a path under checkpoints/.",
        ) from None
    except OSError as error:
        raise InputError(f"Cannot read the checkpoint {path}: {error.strerror}.") from error
    return parse_checkpoint(content, str(path))


def parse_checkpoint(content: bytes, name: str) -> Checkpoint:
    """`read_checkpoint` of bytes already in memory; `name` is used in messages."""
    _check_archive(content, name)
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} holds more than tensors and plain values, so it was not loaded: "
            "a checkpoint can carry code.",
            hint="Use a checkpoint written by ollatune.",
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError) as error:
        raise InputError(
            f"{name} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="Use an earlier checkpoint, or --resume auto.",
        ) from error
    return _validated(values, name)


def _check_archive(content: bytes, name: str) -> None:
    """torch.load does not look at the archive's checksums; a flipped bit would pass unseen."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise InputError(
            f"{name} is not a checkpoint, or was cut short ({len(content)} bytes): {error}.",
            hint="Use an earlier checkpoint, or --resume auto.",
        ) from error
    if damaged is not None:
        raise InputError(
            f"{name} is damaged: the checksum of {damaged} is wrong.",
            hint="Use an earlier checkpoint, or --resume auto.",
        )


def _validated(values: Any, name: str) -> Checkpoint:
    if not isinstance(values, Mapping):
        raise InputError(f"{name} holds a {type(values).__name__}, not a checkpoint.")
    missing = [key for key in REQUIRED_KEYS if key not in values]
    if missing:
        raise InputError(
            f"{name} is not a checkpoint of ollatune: it lacks {', '.join(missing)}.",
            hint="Pass a file from checkpoints/ or a best_model.pt.",
        )
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name} has checkpoint format {version}; this version reads {FORMAT_VERSION}.",
            hint="Use the version of ollatune that wrote it.",
        )
    known = set(Checkpoint.__dataclass_fields__) - {"shards"}
    return Checkpoint(**{key: value for key, value in values.items() if key in known})
