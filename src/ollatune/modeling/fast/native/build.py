"""Compiles `kernels.c` and the files that it includes once for this processor and loads it.

A C compiler is asked for, not required: without one, or on another kind of processor, `load_library` says why and the
caller uses torch operators. The compiled file lies in the user cache under a name made of everything it depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ollatune.base.folders import user_cache_folder
from ollatune.base.processor import processor_flags

SOURCE = Path(__file__).with_name("kernels.c")
SOURCES = sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".c", ".h"))
"""All that it is made of."""
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
)
_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Loaded:
    """`library` is None where there is none; `reason` says what was found, for the log."""

    library: ctypes.CDLL | None
    reason: str


@lru_cache(maxsize=1)
def load_library() -> Loaded:
    """The compiled kernels, compiled now if they are not in the cache. Never raises: the reason tells."""
    flags = processor_flags()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return Loaded(None, f"no kernels for {platform.system()} on {platform.machine()}")
    if "avx512_bf16" not in flags.split():
        return Loaded(None, "this processor has no AVX512-BF16 instructions")
    compiler = _compiler()
    if compiler is None:
        return Loaded(None, "no C compiler (gcc or clang) was found")
    try:
        path = _compiled(compiler, flags)
        return Loaded(ctypes.CDLL(str(path)), f"compiled by {Path(compiler[0]).name}")
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return Loaded(None, f"{shlex.join(compiler)} failed: {''.join(last) or error}")
    except (OSError, subprocess.SubprocessError) as error:
        return Loaded(None, f"the kernels could not be compiled or loaded: {error}")


def _compiler() -> list[str] | None:
    """The command in CC, or the first of the usual names that exists."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["gcc"], ["cc"], ["clang"]]
    for command in candidates:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    return None


def _compiled(compiler: list[str], processor_flags: str) -> Path:
    """Path of the shared object, compiled if it is not there yet."""
    runtime = _openmp_runtime()
    stat = os.stat(compiler[0])
    parts = (
        *(path.read_bytes() for path in SOURCES),
        f"{compiler} {stat.st_size} {stat.st_mtime_ns} {_FLAGS} {runtime} {processor_flags}".encode(),
    )
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
    folder = user_cache_folder() / "native"
    path = folder / f"kernels-{digest}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch:
        compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([*compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        # One OpenMP runtime in the process: two would keep two sets of threads that wait for each other by spinning.
        openmp = ["-fopenmp"] if runtime is None else [runtime]
        _run([*compiler, "-shared", str(compiled), "-o", str(linked), *openmp, "-lm"])
        os.replace(linked, path)
    return path


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded into this process."""
    import torch  # noqa: F401 - loads it

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    return None
