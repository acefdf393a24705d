"""Settings that contradict each other, the data or the model: what a run says of them, and that it ends well."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ollatune.base.errors import DivergedError, InputError, UsageError
from ollatune.checkpoint.format import read_checkpoint
from ollatune.config.schema import Config
from ollatune.data.loader import BatchLoader, LoaderSettings
from ollatune.data.order import SampleOrder
from ollatune.training.length import total_steps
from ollatune.training.state import RunState
from ollatune.training.validation import Validator
from tests.run_helpers import inject, last, run, steps_of, train_command, write_records

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records for five steps an epoch."""
    return write_records(tmp_path_factory.mktemp("data"))


def _json(path: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return dict(json.loads(path.read_text(), parse_constant=refuse))


# ----- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora_target_modules=[]", "should have at least 1 item"),
        ("lora_target_modules=['']", "should have at least 1 character"),
        ("lora_layers=99", "advanced.lora_layers: 99 is more than the 2 layers of this model"),
    ],
)
def test_an_adapter_that_there_cannot_be(
    base: Path, data: Path, tmp_path: Path, capsys: Capture, setting: str, said: str
) -> None:
    command = train_command(base, data, tmp_path / "out", "--set", f"advanced.{setting}")
    assert run(command) == UsageError.exit_code
    assert said in capsys.readouterr().err


def test_adapter_settings_without_an_adapter(
    base: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = [
        "--max-steps", "1", "--set", "advanced.lora_enabled=false", "--set", "advanced.lora_layers=1",
        "--set", "advanced.use_dora=true", "--lora-rank", "4",
    ]  # fmt: skip
    assert run(train_command(base, data, tmp_path / "out", *more)) == 0
    said = capsys.readouterr().err
    assert (
        "all weights are trained, advanced.lora_layers and advanced.use_dora has no effect" in said
    )


# ----- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "training.early_stopping_patience=1",
        "training.evaluate_every_steps=2",
        "validation.metrics=[exact_match]",
    ],
)
def test_what_wants_validation_records_says_that_there_are_none(
    base: Path, tmp_path: Path, capsys: Capture, setting: str
) -> None:
    data = write_records(tmp_path / "data", train=6, validation=0, test=0)
    more = ["--set", "data.validation_fraction=0", "--max-steps", "1"]
    assert run(train_command(base, data, tmp_path / "plain", *more)) == 0
    assert "no validation records" not in capsys.readouterr().err
    assert run(train_command(base, data, tmp_path / "out", *more, "--set", setting)) == 0
    said = capsys.readouterr().err
    assert f"There are no validation records: {setting.partition('=')[0]} has no effect" in said


def test_a_validation_loss_that_is_no_number(
    base: Path, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends nothing, counts as no improvement, and what is written stays JSON."""
    validate = Validator.validate
    seen: list[float] = []

    def spoiled(self: Validator, *arguments: Any) -> Any:
        report = validate(self, *arguments)
        seen.append(report.loss)
        object.__setattr__(report, "loss", math.nan)
        object.__setattr__(report, "perplexity", math.nan)
        return report

    monkeypatch.setattr(Validator, "validate", spoiled)
    output = tmp_path / "out"
    assert run(train_command(base, data, output)) == 0
    assert len(seen) == 2
    assert (
        "validation loss at step 5 is nan: it counts as no improvement" in capsys.readouterr().err
    )
    assert _json(output / "run.json")["best_val_loss"] is None
    for line in (output / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
    index = _json(output / "checkpoints" / "index.json")
    assert [entry["val_loss"] for entry in index["checkpoints"]] == [None, None]
    assert read_checkpoint(output / "best_model.pt").step == 10


def test_an_epoch_of_steps_left_out_has_no_training_loss(
    base: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It has none of its own; zero would look like overfitting."""
    small = write_records(tmp_path / "data", train=4, validation=2)
    more = ["--set", "training.on_non_finite=skip", "--epochs", "3"]
    with inject("train.loss:nan@2"):
        assert run(train_command(base, small, tmp_path / "out", *more)) == 0
    assert "Overfitting" not in capsys.readouterr().err
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if line["type"] == "validation"]
    assert losses[0] == losses[1]
    assert losses[2] > 0


# ----- length --------------------------------------------------------------------------------------------------------


class _Examples:
    lengths = [3] * 10
    num_targets = [1] * 10

    def __len__(self) -> int:
        return 10


def _loader(**settings: Any) -> BatchLoader:
    order = SampleOrder(10, seed=0)
    return BatchLoader(_Examples(), order, LoaderSettings(batch_size=2, **settings))  # type: ignore[arg-type]


def _config(**training: Any) -> Config:
    return Config.model_validate({"training": training})


def test_a_thousand_million_epochs_are_counted_at_once() -> None:
    loader = _loader(accumulation_steps=2)
    assert total_steps(_config(epochs=10**9), loader) == 3 * 10**9
    assert total_steps(_config(epochs=10**9, max_steps=7), loader) == 7


def test_steps_of_a_run_that_has_begun() -> None:
    loader = _loader(accumulation_steps=2)
    for position, epoch, step, expected in (
        (0, 0, 0, 9), (4, 0, 1, 9), (8, 0, 2, 9), (10, 1, 3, 9), (14, 1, 4, 9), (30, 3, 9, 9),
        (6, 0, 3, 10),  # its steps were smaller before: 4 examples are left of the epoch, 2 epochs of 3 steps follow
        (40, 4, 12, 12),
    ):  # fmt: skip
        state = RunState(position=position, epoch=epoch, step=step)
        assert total_steps(_config(epochs=3), loader, state) == expected


# ----- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs: `training.epochs` should be greater than 0. Found 0."),
        (["--lora-rank", "-1"], "--lora-rank: `advanced.lora_rank` should be greater than 0."),
        (["--set", "training.epochs=0"], "--set training.epochs: `training.epochs` should be"),
        (["--set", "trainin.epochs=1"], "--set trainin.epochs: unknown key `trainin`. Did you"),
        (["--set", "data.window_overlap=9000"], "error: defaults: data.window_overlap must be"),
    ],
)
def test_a_mistake_is_named_as_it_was_written(
    base: Path, data: Path, tmp_path: Path, capsys: Capture, arguments: list[str], said: str
) -> None:
    command = train_command(base, data, tmp_path / "out")
    for flag in ("--epochs",):
        place = command.index(flag)
        del command[place : place + 2]
    assert run([*command, *arguments]) == UsageError.exit_code
    assert said in capsys.readouterr().err


def test_a_missing_teacher_is_named_as_such(
    base: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    teacher = tmp_path / "none.gguf"
    command = train_command(
        base, data, tmp_path / "out", "--set", f"distillation.teacher={teacher}"
    )
    assert run(command) == InputError.exit_code
    assert f"error: distillation.teacher: {teacher}: there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "faults", "said"),
    [
        ("stop", "train.loss:nan@2", r"or rollback; then run the command again: nothing was saved"),
        ("rollback", "train.loss:nan@2", r"no checkpoint to roll back to yet .*run the command again"),
        ("rollback", "train.loss:nan@7,train.loss:nan@8,train.loss:nan@9,train.loss:nan@10",
         r"rolled back 3 times before\. .*then --resume auto"),
        ("skip", "train.loss:nan@2,train.loss:nan@3,train.loss:nan@4,train.loss:nan@5",
         r"3 steps in a row were skipped before it"),
    ],
)  # fmt: skip
def test_a_diverged_run_says_why_it_gave_up_and_how_to_go_on(
    base: Path, data: Path, tmp_path: Path, capsys: Capture, action: str, faults: str, said: str
) -> None:
    more = ["--set", f"training.on_non_finite={action}"]
    with inject(faults):
        command = train_command(base, data, tmp_path / "out", *more)
        assert run(command) == DivergedError.exit_code
    assert re.search(said, capsys.readouterr().err)
    again = ["--resume", "auto"] if "resume" in said else []
    assert run([*command, *again]) == 0
    assert len(steps_of(tmp_path / "out")) >= 9
    assert last(tmp_path / "out").exists()
