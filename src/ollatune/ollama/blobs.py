"""Reading small files of the store: bounded, and every failure an error that says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, StorageError
from ollatune.base.text import printable

_MAX_SMALL_BYTES = (
    16 << 20
)  # manifests and text layers; the largest known licence is well under 1 MiB


def read_small(path: Path) -> bytes:
    """A manifest, config or text layer. Raises InputError if it is missing or huge, StorageError if not readable."""
    with readable(path):
        try:
            with path.open("rb") as stream:
                content = stream.read(_MAX_SMALL_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise damaged(path, "the file is missing") from error
    if len(content) > _MAX_SMALL_BYTES:
        raise damaged(path, f"more than {_MAX_SMALL_BYTES >> 20} MiB, a small text was expected")
    return content


def read_text(path: Path) -> str:
    """A text layer. Raises InputError if it is not UTF-8."""
    try:
        return read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"not UTF-8 at byte {error.start}") from error


def read_object(path: Path, content: bytes | None = None) -> dict[str, Any]:
    """A JSON object, from `content` where that was read already. Raises InputError."""
    value = _parse(path, content)
    if not isinstance(value, dict):
        raise damaged(path, "a JSON object was expected")
    return value


def read_objects(path: Path) -> tuple[dict[str, Any], ...]:
    """A JSON list of objects. Raises InputError."""
    value = _parse(path, None)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise damaged(path, "a JSON list of objects was expected")
    return tuple(value)


def _parse(path: Path, content: bytes | None) -> Any:
    content = read_small(path) if content is None else content
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON ({printable(str(error), limit=80)})") from error


def damaged(path: Path, reason: str) -> InputError:
    """The error for a file of the store that is not what it should be."""
    return InputError(f"Damaged Ollama store: {path}: {reason}.", hint="Pull the model again.")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn a permission error within the block into a StorageError that says how to get access."""
    try:
        yield
    except PermissionError as error:
        raise StorageError(
            f"No permission to read Ollama's store at {error.filename or path}.",
            hint="On Linux the service keeps it readable for the group `ollama` only: run"
            " `sudo usermod -aG ollama $USER` and log in again.",
        ) from error
