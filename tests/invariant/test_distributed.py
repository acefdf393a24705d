"""Several gloo processes are one: same losses as one process, one error for all, any number of them goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ollatune.checkpoint.format import read_checkpoint
from tests.process_helpers import NO_DROPOUT, assert_same_losses, launch, with_sizes
from tests.run_helpers import run, steps_of, train_command, write_records


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
@pytest.mark.parametrize(
    ("before", "after"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]
)
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
    assert [code for code, _ in results] == [5, 5], results
    lines = [line for _, error in results for line in error.splitlines()]
    messages = [line for line in lines if line.startswith("error:")]
    assert len(messages) == 1, results
    assert "No space left" in messages[0] or "Disk full" in messages[0]
    assert not any("Traceback" in line for line in lines), results
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


@pytest.mark.slow
def test_a_loss_spike_on_one_process_is_one_on_all(base: Path, data: Path, tmp_path: Path) -> None:
    more = (*NO_DROPOUT, "--epochs", "5", "--set", "training.on_loss_spike=rollback")
    more += ("--set", "training.checkpoint_every_steps=5")
    command = with_sizes(train_command(base, data, tmp_path / "out", *more), 1, 1)
    results = launch(2, command, faults={1: "train.loss_spike:spike@37"})
    assert [code for code, _ in results] == [0, 0], results
    values = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (values["steps"], values["loss_spikes"], values["rollbacks"]) == (45, 1, 1)
    assert sum("Loss spike at step 37: loss " in error for _, error in results) == 1


@pytest.mark.slow
def test_different_data_is_noticed_before_the_first_step(base: Path, tmp_path: Path) -> None:
    """As on two machines with another copy each: the same relative path, from two folders."""
    for number in range(2):
        write_records(tmp_path / str(number) / "records", train=17 + number, validation=3, test=0)
    command = train_command(base, Path("records"), tmp_path / "out", *NO_DROPOUT)
    results = launch(2, command, folders=[tmp_path / "0", tmp_path / "1"])
    assert [code for code, _ in results] == [2, 2], results
    said = [error for _, error in results if "error:" in error]
    assert len(said) == 1, results
    assert "Process 1 of 2 has other training data than process 0" in said[0]


def test_distributed_needs_a_launcher(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*train_command(base, data, tmp_path / "out"), "--distributed"]) == 2
    assert "torchrun --nproc_per_node=2" in capsys.readouterr().err
