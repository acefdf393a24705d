"""Runs of several gloo processes on this machine, started as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.run_helpers import run, train_command

NO_DROPOUT = ("--set", "advanced.lora_dropout=0")
METHODS = {
    "lora": NO_DROPOUT,
    "full": ("--set", "advanced.lora_enabled=false", "--set", "training.max_grad_norm=0.5"),
    "packed": (*NO_DROPOUT, "--set", "model.quantization=as-served"),
    "dora": (*NO_DROPOUT, "--set", "advanced.use_dora=true"),
}


def launch(
    count: int,
    arguments: list[str],
    *,
    faults: dict[int, str] | None = None,
    folders: list[Path] | None = None,
) -> list[tuple[int, str]]:
    """Exit code and stderr of each of `count` processes, started as torchrun starts them, without its own watching.

    As torchrun's agent does, this process holds the store that they meet at, on a port that nobody else can take.
    """
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "OMP_NUM_THREADS": "1", "OLLATUNE_FAULT": (faults or {}).get(rank, ""),
            }  # fmt: skip
            # Files, not pipes: a full pipe would hold up the one process and with it all others.
            with Path(folder, str(rank)).open("wb") as errors:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "ollatune", *map(str, arguments), "--distributed"],
                        env=environment,
                        cwd=None if folders is None else folders[rank],
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )
        try:
            codes = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [(code, Path(folder, str(rank)).read_text()) for rank, code in enumerate(codes)]


def started(
    count: int, arguments: list[str], *, code: int = 0, faults: dict[int, str] | None = None
) -> list[str]:
    """Stderr of each of `count` processes, which must all end with `code` and without a traceback."""
    results = launch(count, arguments, faults=faults)
    assert [found for found, _ in results] == [code] * count, results
    assert all("Traceback" not in error for _, error in results), results
    return [error for _, error in results]


def method_command(
    base: Path, data: Path, output: Path, method: str, count: int, *more: str
) -> list[str]:
    """Three steps an epoch, the last of a single example, whatever the number of processes."""
    return with_sizes(train_command(base, data, output, *METHODS[method], *more), 2, 4 // count)


def single_runs(
    methods: Iterable[str], base: Path, data: Path, factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The output folders of the same run by one process, for each method."""
    outputs = {method: factory.mktemp(method) for method in methods}
    for method, output in outputs.items():
        assert run(method_command(base, data, output, method, 1)) == 0
    return outputs


def with_sizes(command: list[str], batch: int, accumulation: int) -> list[str]:
    return [
        *command, "--batch-size", str(batch), "--gradient-accumulation-steps", str(accumulation),
    ]  # fmt: skip


def assert_same_losses(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert [s["num_targets"] for s in left] == [s["num_targets"] for s in right]
    assert [s["num_tokens"] for s in left] == [s["num_tokens"] for s in right]
    assert [s["loss"] for s in left] == pytest.approx([s["loss"] for s in right], rel=1e-5)
    assert [s["grad_norm"] for s in left] == pytest.approx(
        [s["grad_norm"] for s in right], rel=1e-4
    )
