"""The machine a run is on: device, number type, threads, versions, memory; and the code it was run from."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import torch
from torch.nn import functional

from ollatune.base.allocator import keep_freed_memory
from ollatune.base.log import get_logger
from ollatune.base.memory import peak_resident_bytes
from ollatune.base.processor import processor_flags, processor_name
from ollatune.modeling.fast.native import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DETERMINISM = (
    "Deterministic: the same machine, thread count and versions give the same bits; on a CPU that costs nothing "
    "measurable (training.deterministic).",
    "Deterministic: the same GPU and versions give the same bits; some operations are slower for it, one that has no "
    "deterministic form ends the run, and cuBLAS gets a fixed workspace (training.deterministic: false lets go of it).",
)
"""What `training.deterministic` gives and costs, on a CPU and on a GPU."""
_BF16_MINIMUM_GAIN = 1.2
_PROBE_SHAPE = (256, 768, 2048)
_PACKAGES = (
    "ollatune",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
)


_ADVISED_BYTES = 2 << 30
"""As much of the memory as activations of a step usually need is asked for in huge pages."""


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_dtype(setting: str, device: torch.device) -> tuple[str, str]:
    """The computation type for `setting` and the reason, e.g. ("fp32", "no bf16 instructions").

    `auto` takes bf16 only where the processor has instructions for it *and* it is measured to be faster: some
    processors lose with it. fp16 is never chosen by itself: it needs loss scaling, and CPUs are slow with it.
    """
    if setting != "auto":
        return setting, "configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bf16", "this GPU has bf16"
        return "fp32", "this GPU has no bf16"
    if not _cpu_has_bf16():
        return "fp32", "no bf16 instructions"
    gain = _measured_bf16_gain()
    name = "bf16" if gain >= _BF16_MINIMUM_GAIN else "fp32"
    return name, f"bf16 measured {gain:.1f}x as fast"


def has_onednn_bf16() -> bool:
    """Whether torch's CPU library computes in bf16 on this processor (be it slowly)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())


def _cpu_has_bf16() -> bool:
    if not has_onednn_bf16():
        return False
    flags = processor_flags().split()
    # Where the system has no list of them, the measurement decides.
    return not flags or any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _measured_bf16_gain() -> float:
    """Measured on one core in its own processor time, in turn: what else the machine does must not decide."""
    rows, inner, columns = _PROBE_SHAPE
    operands = {
        dtype: (torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds = dict.fromkeys(operands, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            for dtype, (inputs, weight) in operands.items():
                started = time.thread_time()
                functional.linear(inputs, weight)
                seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32] / max(seconds[torch.bfloat16], 1e-9)


def configure_threads() -> int:
    """Use as many threads as this process may run on, unless OMP_NUM_THREADS says otherwise; returns the number."""
    if "OMP_NUM_THREADS" not in os.environ:
        usable = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        torch.set_num_threads(max(1, usable or 1))
    return torch.get_num_threads()


def configure_allocator() -> str:
    """Keep freed memory for the next step, in huge pages where the system has them; what was done, for the log."""
    import psutil

    return keep_freed_memory(min(_ADVISED_BYTES, psutil.virtual_memory().available // 4))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str | None:
    """Commit of the working directory, with `+changes` where it is not clean; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run computed on."""
    described: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor_name(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["gpu_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return described


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: of the GPU's allocator on CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def log_environment(
    device: torch.device, dtype: str, reason: str, num_threads: int, *, native_kernels: bool
) -> None:
    """Say what the run computes with, and set whether compiled kernels are used (see `modeling/fast/native`)."""
    kernels.set_enabled(native_kernels)
    logger = get_logger("training")
    logger.info("Computing on %s in %s (%s), %d threads.", device, dtype, reason, num_threads)
    if device.type == "cpu":
        logger.info("Allocator: %s.", configure_allocator())
    if device.type == "cpu" and dtype == "bf16":
        used = "in use" if kernels.available() else "not in use, torch operators instead"
        logger.info("Compiled kernels: %s (%s).", used, kernels.state())
