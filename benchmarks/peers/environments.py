"""The environments of the measured systems: made once in the user cache, pinned, each for itself.

`python benchmarks/peers/environments.py` makes those that are missing and says where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from ollatune.base.folders import user_cache_folder

HERE = Path(__file__).resolve().parent
_WITHOUT_DEPENDENCIES = ("llamafactory",)
"""Its pins are all it needs; what it asks for beyond them has wheels for CUDA alone."""
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_FORBIDDEN = ("nvidia-", "nvidia_", "cuda-", "cuda_")


class NotInstallableError(Exception):
    """An environment cannot be made here; the message says why, in one line."""


def cache_folder() -> Path:
    """Where environments and frozen inputs lie: `bench` in Ollatune's user cache."""
    return user_cache_folder() / "bench"


def python_of(name: str) -> Path:
    """Its interpreter."""
    return cache_folder() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pins_of(name: str) -> Path:
    """Its pinned requirements, in pip's format."""
    return HERE / f"{name}.txt"


def _digest(name: str) -> str:
    text = pins_of(name).read_text() + sys.version
    return hashlib.sha256(text.encode()).hexdigest()


def is_ready(name: str) -> bool:
    """Whether it is there and made from today's pins."""
    stamp = cache_folder() / name / "pins.sha256"
    return stamp.is_file() and stamp.read_text() == _digest(name)


def ensure(name: str) -> Path:
    """Its interpreter, made first where it is missing. Raises NotInstallableError."""
    if is_ready(name):
        return python_of(name)
    folder = cache_folder() / name
    print(f"Making the environment {folder} from {pins_of(name).name} ...", file=sys.stderr)
    try:
        venv.EnvBuilder(with_pip=True, clear=True, symlinks=os.name != "nt").create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInstallableError(f"no environment can be made in {folder}: {error}") from error
    for more in ([], ["--extra-index-url", _CPU_INDEX]):  # a local or mirrored CPU wheel first
        problem = _install(name, more)
        if problem is None:
            (folder / "pins.sha256").write_text(_digest(name))
            return python_of(name)
    raise NotInstallableError(problem)


def _install(name: str, more: list[str]) -> str | None:
    """Install the pins; returns what is wrong. Looks first at what would come, so that no CUDA build is pulled."""
    pip = [str(python_of(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = ["--requirement", str(pins_of(name)), *more]
    if name in _WITHOUT_DEPENDENCIES:
        wanted.append("--no-deps")
    plan = cache_folder() / name / "plan.json"
    tried = _run([*pip, "--dry-run", "--report", str(plan), *wanted])
    if tried is not None:
        return tried
    problem = _cuda_build(json.loads(plan.read_text())["install"])
    problem = problem or _run([*pip, *wanted])
    if problem is None:
        _take_out_cuda_parts(name)
    return problem


def _cuda_build(planned: list[dict[str, Any]]) -> str | None:
    """What of a pip report would be built for CUDA, in words; None for nothing."""
    names = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in planned}
    heavy = [name for name in names if name.startswith(_FORBIDDEN)]
    torch = names.get("torch", "+cpu")
    if sys.platform == "linux" and platform.machine() == "x86_64" and not torch.endswith("+cpu"):
        heavy.append(f"torch {torch}")
    if heavy:
        return f"pip would pull a CUDA build of torch ({', '.join(heavy[:3])}, ...)"
    return None


def _take_out_cuda_parts(name: str) -> None:
    """torchaudio does without its compiled part, but not with one that wants CUDA libraries; text needs none of it."""
    for folder in (cache_folder() / name).glob("[Ll]ib*/**/site-packages/torchaudio/lib"):
        for part in [*folder.glob("*.so"), *folder.glob("*.pyd")]:
            part.unlink(missing_ok=True)


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.strip().splitlines() or ["pip failed without a word"])[-1]


if __name__ == "__main__":
    for pins in sorted(HERE.glob("*.txt")):
        try:
            print(f"{pins.stem}: {ensure(pins.stem)}")
        except NotInstallableError as error:
            print(f"{pins.stem}: not installable here: {error}")
