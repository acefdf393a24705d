"""DeepSpeed's ZeRO stages with gloo processes are one process; their checkpoints are everybody's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.process_helpers import (
    assert_same_losses,
    launch,
    method_command,
    single_runs,
    started,
)
from tests.run_helpers import run, steps_of, train_command

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the deepspeed extra"
)


def zero(stage: int) -> tuple[str, ...]:
    return ("--set", "distributed.backend=deepspeed", "--set", f"distributed.zero_stage={stage}")


@pytest.fixture(scope="module")
def single(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return single_runs(("lora", "full"), base, data, tmp_path_factory)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("method", "stage", "count"),
    [("full", 1, 2), ("lora", 2, 2), ("full", 3, 2)],
)
def test_every_stage_is_one_process(
    base: Path, data: Path, single: dict[str, Path], tmp_path: Path,
    method: str, stage: int, count: int,
) -> None:  # fmt: skip
    started(count, method_command(base, data, tmp_path / "out", method, count, *zero(stage)))
    assert_same_losses(steps_of(single[method]), steps_of(tmp_path / "out"))
    assert (tmp_path / "out" / "best_model.pt").is_file()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("method", "stage"), [("full", 2), ("lora", 3)])
def test_a_stopped_run_goes_on_with_another_number_of_processes_and_then_alone(
    base: Path, data: Path, single: dict[str, Path], tmp_path: Path, method: str, stage: int
) -> None:
    arguments = method_command(base, data, tmp_path / "out", method, 2, *zero(stage))
    started(2, arguments, code=143, faults={0: "train.step:terminate@2"})
    started(4, [*arguments, "--resume", "auto"], code=143, faults={0: "train.step:terminate@2"})
    assert run([*method_command(base, data, tmp_path / "out", method, 2), "--resume", "auto"]) == 0
    assert_same_losses(steps_of(single[method]), steps_of(tmp_path / "out"))


@pytest.mark.slow
@needs_deepspeed
def test_not_finite_ends_all(base: Path, data: Path, tmp_path: Path) -> None:
    arguments = method_command(base, data, tmp_path / "nan", "lora", 2, *zero(2))
    results = launch(2, arguments, faults={1: "train.loss:nan@2"})
    assert [code for code, _ in results] == [6, 6], results
    assert sum("Not finite" in error for _, error in results) == 1


def test_a_missing_extra_names_the_line_that_installs_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from ollatune.training import backends

    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    arguments = [*train_command(base, data, tmp_path / "out", *zero(2)), "--distributed"]
    assert run(arguments) == 2
    assert "pip install 'ollatune[deepspeed]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("backend", "setting", "said"),
    [
        ("fsdp", "training.batch_size=auto", "cannot be measured"),
        ("fsdp", "training.optimizer=adafactor", "does not work on sharded weights"),
        ("deepspeed", "training.on_non_finite=skip", "does not work with DeepSpeed"),
        ("deepspeed", "training.on_loss_spike=rollback", "on_loss_spike: rollback does not work"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_before_the_run(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], backend: str, setting: str, said: str,
) -> None:  # fmt: skip
    from ollatune.training import backends

    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    more = ("--set", f"distributed.backend={backend}", "--set", setting, "--distributed")
    command = train_command(base, data, tmp_path / "out", *more)
    if "batch_size" in setting:
        place = command.index("--batch-size")
        del command[place : place + 2]
    assert run(command) == 2
    assert said in capsys.readouterr().err


def test_a_backend_without_distributed_has_no_effect(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_command(base, data, tmp_path / "out", *zero(2), "--max-steps", "1")
    assert run(arguments) == 0
    assert "no effect without --distributed" in capsys.readouterr().err
