"""Several gloo processes are one: same losses as one process, one error for all, any number of them goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ollatune.checkpoint.format import read_checkpoint
from tests.run_helpers import run, steps_of, tiny_base, train_command, write_records

NO_DROPOUT = ("--set", "advanced.lora_dropout=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), train=17, validation=3, test=0)


def launch(
    count: int, arguments: list[str], *, faults: dict[int, str] | None = None
) -> list[tuple[int, str]]:
    """Exit code and stderr of each of `count` processes, started as torchrun starts them, without its own watching."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "OLLATUNE_FAULT": (faults or {}).get(rank, ""),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "ollatune", *arguments, "--distributed"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return [
        (process.returncode, error)
        for process in processes
        for _, error in [process.communicate(timeout=240)]
    ]


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


@pytest.fixture(scope="module")
def single(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 4 micro-batches of 2: 17 examples are 3 steps an epoch, the last of a single example."""
    output = tmp_path_factory.mktemp("single")
    command = with_sizes(train_command(base, data, output, *NO_DROPOUT), 2, 4)
    assert run(command) == 0
    return output


@pytest.mark.slow
def test_two_processes_are_one(base: Path, data: Path, single: Path, tmp_path: Path) -> None:
    """In the last step of each epoch the second process has no example at all."""
    command = with_sizes(train_command(base, data, tmp_path / "out", *NO_DROPOUT), 2, 2)
    results = launch(2, command)
    assert [code for code, _ in results] == [0, 0], results
    assert results[1][1] == ""  # only the first one speaks
    assert_same_losses(steps_of(single), steps_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    losses = [
        read_checkpoint(folder / "checkpoints" / "epoch_2.pt").val_loss
        for folder in (single, tmp_path / "out")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_four_processes_are_one(base: Path, data: Path, single: Path, tmp_path: Path) -> None:
    command = with_sizes(train_command(base, data, tmp_path / "out", *NO_DROPOUT), 2, 1)
    results = launch(4, command)
    assert [code for code, _ in results] == [0] * 4, results
    assert_same_losses(steps_of(single), steps_of(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 4), (4, 2)])
def test_another_number_of_processes_goes_on(
    base: Path, data: Path, single: Path, tmp_path: Path, before: int, after: int
) -> None:
    def command(count: int) -> list[str]:
        return with_sizes(train_command(base, data, tmp_path / "out", *NO_DROPOUT), 2, 4 // before)

    def start(count: int, *more: str, faults: dict[int, str] | None = None) -> list[int]:
        results = launch(count, [*command(count), *more], faults=faults)
        assert all("Traceback" not in error for _, error in results), results
        return [code for code, _ in results]

    assert start(before, faults={0: "train.step:terminate@4"}) == [143] * before
    assert start(after, "--resume", "auto") == [0] * after
    assert_same_losses(steps_of(single), steps_of(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_failing_process_ends_all_with_one_message(
    base: Path, data: Path, tmp_path: Path, rank: int
) -> None:
    command = train_command(base, data, tmp_path / "out", *NO_DROPOUT)
    point = "save.before_checkpoint:enospc@1" if rank == 0 else "train.step:enospc@2"
    results = launch(2, command, faults={rank: point})
    messages = [line for _, error in results for line in error.splitlines() if "rror" in line]
    # Where the first process fails, the store goes with it here; under torchrun it lives on.
    assert results[rank][0] == (5 if rank == 0 else 1), results
    assert results[1 - rank][0] in (1, 5), results
    assert results[1 - rank][1].count("Traceback") == 0, results
    assert any("No space left" in line or "Disk full" in line for line in messages), results
    status = json.loads((tmp_path / "out" / "run.json").read_text())
    assert status["status"] == "failed"
    assert "No space left" in status["error"] or "Disk full" in status["error"]


@pytest.mark.slow
def test_non_finite_and_out_of_memory_on_one_process(
    base: Path, data: Path, single: Path, tmp_path: Path
) -> None:
    command = with_sizes(train_command(base, data, tmp_path / "nan", *NO_DROPOUT), 2, 2)
    results = launch(2, command, faults={1: "train.loss:nan@2"})
    assert [code for code, _ in results] == [6, 6], results
    assert sum("Not finite" in error for _, error in results) == 1
    command = with_sizes(train_command(base, data, tmp_path / "oom", *NO_DROPOUT), 2, 2)
    results = launch(2, command, faults={1: "train.micro_batch:oom@3"})
    assert [code for code, _ in results] == [0, 0], results
    assert_same_losses(steps_of(single), steps_of(tmp_path / "oom"))


def test_distributed_needs_a_launcher(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*train_command(base, data, tmp_path / "out"), "--distributed"]) == 2
    assert "torchrun --nproc_per_node=2" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_other_backends_are_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    command = train_command(base, data, tmp_path / "out")
    assert run([*command, "--set", f"distributed.backend={backend}"]) == 2
    assert f"{backend} is not available" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
