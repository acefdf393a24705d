"""What a release is made from: the files of an export and its run, and the facts in them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ollatune.base.errors import InputError
from ollatune.base.files import STAGING_PREFIX, staged_file

_EXPORT_FILES = ("model.gguf", "adapter.gguf", "Modelfile", "export.json", "verify.json")
_RUN_FILES = ("config.yaml", "run.json")
_RUN_METRICS = ("train_loss", "val_loss", "best_val_loss")


def source_files(export_folder: Path, run_folder: Path | None) -> dict[str, Path]:
    """What is released, by file name. Raises InputError unless the export is complete."""
    files = {name: export_folder / name for name in _EXPORT_FILES}
    if run_folder is not None:
        files |= {name: run_folder / name for name in _RUN_FILES}
    found = {name: path for name, path in files.items() if path.is_file()}
    has_model = "model.gguf" in found or "adapter.gguf" in found
    if not has_model or "Modelfile" not in found or "export.json" not in found:
        raise InputError(
            f"{export_folder} is no complete export: a GGUF, a Modelfile and export.json are needed, "
            f"found {', '.join(name for name in _EXPORT_FILES if name in found) or 'none of them'}.",
            hint="Make it with `ollatune create-modelfile`.",
        )
    return found


def place_file(source: Path, target: Path) -> None:
    """Put a file at `target`: a GGUF as a hard link, for it is large and only ever replaced as a whole; else a copy."""
    if source.suffix == ".gguf":
        staging = target.with_name(
            f"{STAGING_PREFIX}{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
        )
        try:
            os.link(source, staging)
            os.replace(staging, target)
            staging.unlink(missing_ok=True)  # rename does nothing where both are one file already
            return
        except OSError:
            staging.unlink(missing_ok=True)  # another file system, or one without links: copy
    with (
        source.open("rb") as stream,
        staged_file(target, needed_bytes=source.stat().st_size) as out,
    ):
        shutil.copyfileobj(stream, out, 4 << 20)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"There is no {path}.", hint="Name the folder of a finished run or export."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object.")
    return value


def read_config(run_folder: Path | None) -> dict[str, Any]:
    """The run's resolved configuration, or {}. Raises InputError where it cannot be read."""
    path = None if run_folder is None else run_folder / "config.yaml"
    if path is None or not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))  # dates become text
    return plain


def base_of(export: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Name and digest of the base model, from export.json or run.json."""
    trained_on = run.get("base") or {}
    return {
        "name": export.get("base_name") or trained_on.get("name") or "",
        "digest": export.get("base_digest") or trained_on.get("digest") or "",
    }


def data_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Digest and counts of the training data, from run.json."""
    return {"digest": run.get("data_digest") or "", "report": run.get("data") or {}}


def run_metrics(run: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a run."""
    found = {name: run.get(name) for name in _RUN_METRICS}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
