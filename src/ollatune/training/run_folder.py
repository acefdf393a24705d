"""A run's output folder: who owns it, what is in it, what the run has said.

config.yaml, run.json, metrics.jsonl, samples.jsonl, best_model.pt, adapter_model.safetensors + adapter_config.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import (
    clean_staging,
    make_folder,
    storage_error,
    write_json,
    write_text,
)
from ollatune.base.locks import own_folder, refuse_owned
from ollatune.base.log import get_logger

LOCK_NAME = ".run.lock"


def utc_now() -> str:
    """ISO 8601 in UTC with microseconds: sorts as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def new_run_id() -> str:
    return f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """The output folder at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def run_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def best_path(self) -> Path:
        return self.path / "best_model.pt"

    def refuse_other_run(self, resumed_id: str = "") -> None:
        """Raise UsageError when the folder already holds a run other than the one that is resumed.

        One that ended before it saved anything is not in the way: the same command simply runs again.
        """
        run = self.read_run()
        ended_empty = bool(run) and run.get("status") != "finished"
        if not (self.best_path.exists() or (self.run_path.exists() and not ended_empty)):
            return
        if resumed_id and self._owner(run) == resumed_id:
            return
        what = f"run {run['run_id']} ({run.get('status', 'unknown')})" if run else "a run"
        if resumed_id:
            raise UsageError(
                f"{self.path} holds {what}, the checkpoint is of run {resumed_id}; nothing was changed.",
                hint="Pass the --output that the checkpoint's run had, or a new one.",
            )
        raise UsageError(
            f"{self.path} already holds {what}; nothing was changed.",
            hint=(
                "Continue it with --resume auto, choose another folder with --output, "
                "or start anew with --overwrite."
            ),
        )

    def _owner(self, run: dict[str, Any]) -> str:
        """Whose folder it is, by what run.json holds, else by its best model."""
        if "run_id" in run:
            return str(run["run_id"])
        from ollatune.checkpoint.format import read_checkpoint  # torch: not for a look at a folder

        try:
            return read_checkpoint(self.best_path).run_id
        except InputError:
            return ""

    def clear(self) -> None:
        """Remove what a run writes here (the user asked for --overwrite); other files stay."""
        names = [
            "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "best_model.pt",
            "adapter_model.safetensors", "adapter_config.json", "rejected.jsonl", "report.html",
        ]  # fmt: skip
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def read_run(self) -> dict[str, Any]:
        """run.json, or {} where it is missing or unreadable."""
        try:
            value = json.loads(self.run_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_run(self, values: dict[str, Any]) -> None:
        write_json(self.run_path, values)

    def write_config(self, text: str) -> None:
        write_text(self.config_path, text)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder for the length of the block. Raises LockedError naming the owner.

        See `base.locks`: what a dead process held is free.
        """
        with own_folder(self.path, LOCK_NAME):
            clean_staging(self.path)
            yield

    def refuse_owned(self) -> None:
        """Raise LockedError where another process has the lock now: asked before anything heavy is loaded."""
        refuse_owned(self.path, LOCK_NAME)

    def truncate_logs(self, last_step: int) -> None:
        """Drop what metrics.jsonl and samples.jsonl say about steps after `last_step`."""
        self.truncate_log(self.metrics_path, last_step)
        self.truncate_log(self.samples_path, last_step)

    def truncate_log(self, path: Path, last_step: int) -> None:
        """Drop lines of `path` after `last_step`, and a half-written last line: a resumed run writes them again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                step = json.loads(line).get("step", 0)
            except ValueError:
                continue
            if step <= last_step:
                kept.append(line + "\n")
        write_text(path, "".join(kept))


class MetricsLog:
    """Appends JSON lines to a file; each line is complete on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self.path = path
        self._is_torn = self._has_warned = False
        try:
            self._stream = path.open(
                "ab", buffering=0
            )  # what cannot be written must not wait for the end
        except OSError as error:
            raise storage_error(error, path) from error

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. A failing disk is reported once and does not end the run: checkpoints will.

        Lines that could not be written are missing; the next one that can begins on a line of its own.
        """
        written = {key: finite(value) for key, value in values.items()}
        line = json.dumps(written, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        left = b"\n" * self._is_torn + line
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self._is_torn = self._is_torn or len(left) < len(line)
            if not self._has_warned:
                get_logger("training").warning(
                    "Cannot write %s: %s. Lines will be missing there.", self.path, error.strerror
                )
            self._has_warned = True
        else:
            self._is_torn = False

    def close(self) -> None:
        self._stream.close()
