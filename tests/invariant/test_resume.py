"""What a resumed run takes over from its checkpoint, from changed settings, and from the folders it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ollatune.base.errors import UsageError
from ollatune.checkpoint.format import read_checkpoint
from tests.run_helpers import (
    assert_same_weights,
    inject,
    last,
    run,
    steps_of,
    train_command,
    write_records,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture
def begun(base: Path, data: Path, tmp_path: Path) -> Path:
    """A finished run of two epochs in `tmp_path / "out"`."""
    assert run(train_command(base, data, tmp_path / "out")) == 0
    return tmp_path / "out"


def _resume(base: Path, data: Path, output: Path, checkpoint: Path | str, *more: str) -> int:
    return run(train_command(base, data, output, "--resume", str(checkpoint), *more))


def _run_json(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run.json").read_text()))


# ----- changed settings ----------------------------------------------------------------------------------------------


def test_changed_settings_of_the_optimiser_hold_after_a_resume(
    base: Path, data: Path, begun: Path, tmp_path: Path
) -> None:
    changed = [
        "--set", "training.weight_decay=0.5", "--set", "training.adam_beta1=0.5",
        "--set", "training.adam_beta2=0.9", "--set", "training.adam_epsilon=1e-3",
    ]  # fmt: skip
    output = tmp_path / "changed"
    assert _resume(base, data, output, begun / "checkpoints" / "epoch_1.pt", *changed) == 0
    groups = read_checkpoint(last(output)).optimizer_state_dict["param_groups"]
    decays = {group["weight_decay"] for group in groups}
    assert decays == {0.5}
    assert [(g["betas"], g["eps"]) for g in groups] == [((0.5, 0.9), 1e-3)] * len(groups)
    assert steps_of(output)[-1]["loss"] != steps_of(begun)[-1]["loss"]


def test_changed_dropout_holds_after_a_resume(
    base: Path, data: Path, begun: Path, tmp_path: Path
) -> None:
    output = tmp_path / "changed"
    first = begun / "checkpoints" / "epoch_1.pt"
    assert _resume(base, data, output, first, "--set", "advanced.lora_dropout=0.4") == 0
    assert set(read_checkpoint(last(output)).resume["dropout"]) == {0.4}


def test_raised_dropout_is_kept_by_a_resume(base: Path, data: Path, tmp_path: Path) -> None:
    """By overfitting: it is part of the run's state, not of the settings."""
    output = tmp_path / "out"
    more = [
        "--epochs", "3", "--set", "training.overfitting_raise_dropout=0.1",
        "--set", "training.overfitting_patience=null", "--set", "training.overfitting_gap=1e-9",
        "--set", "training.learning_rate=0.1",
    ]  # fmt: skip
    assert run(train_command(base, data, output, *more)) == 0
    raised = [
        read_checkpoint(output / "checkpoints" / f"epoch_{n}.pt").resume["dropout"][0]
        for n in (1, 2, 3)
    ]
    assert raised[0] == pytest.approx(0.05)
    assert raised[2] > raised[0]
    other = tmp_path / "other"
    assert _resume(base, data, other, output / "checkpoints" / "epoch_2.pt", *more) == 0
    assert_same_weights(output / "checkpoints" / "epoch_3.pt", other / "checkpoints" / "epoch_3.pt")


@pytest.mark.parametrize("name", ["sgd", "adafactor", "adam"])
def test_another_optimiser_by_force_begins_without_moments(
    base: Path, data: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:  # fmt: skip
    output = tmp_path / "changed"
    first, change = begun / "checkpoints" / "epoch_1.pt", f"training.optimizer={name}"
    assert _resume(base, data, output, first, "--set", change, "--force") == 0
    said = capsys.readouterr().err
    assert f"of another optimiser (adamw): its moments are left, {name} begins without" in said
    state = read_checkpoint(last(output)).optimizer_state_dict["state"][0]
    if name == "adam":
        assert float(state["step"]) == 5


def test_more_patience_lets_a_run_that_was_stopped_early_go_on(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    early = ["--epochs", "4", "--set", "training.early_stopping_min_delta=100"]
    impatient = [*early, "--set", "training.early_stopping_patience=1"]
    assert run(train_command(base, data, output, *impatient)) == 0
    assert (_run_json(output)["steps"], _run_json(output)["stopped_early"]) == (10, True)
    assert _resume(base, data, output, "auto", *impatient) == 0
    assert "nothing left to train: the run was stopped early" in capsys.readouterr().err
    patient = [*early, "--set", "training.early_stopping_patience=3"]
    assert _resume(base, data, output, "auto", *patient) == 0
    assert (_run_json(output)["steps"], _run_json(output)["stopped_early"]) == (20, True)


def test_a_run_that_is_over_says_what_would_make_it_longer(
    base: Path, data: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert _resume(base, data, begun, "auto", "--max-steps", "3") == 0
    said = capsys.readouterr().err
    assert "Changed since the checkpoint: training.max_steps: None → 3" in said
    assert "nothing left to train: the checkpoint is of step 10, the run ends at step 3" in said
    assert len(steps_of(begun)) == 10


def test_a_stop_in_the_last_validation_changes_nothing(
    base: Path, data: Path, begun: Path, tmp_path: Path
) -> None:
    """No step follows the resume: what the optimiser holds is all of the checkpoint's."""
    output = tmp_path / "stopped"
    with inject("train.validate:terminate@2"):
        assert run(train_command(base, data, output)) == 143
    assert _resume(base, data, output, "auto") == 0
    assert_same_weights(last(output), last(begun))
    groups = [
        read_checkpoint(last(f)).optimizer_state_dict["param_groups"] for f in (output, begun)
    ]
    assert groups[0] == groups[1]


# ----- folders -------------------------------------------------------------------------------------------------------


def test_a_resume_leaves_another_runs_output_alone(
    base: Path, data: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert run(train_command(base, data, other, "--seed", "7")) == 0
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file() and "logs" not in p.parts}
    first = begun / "checkpoints" / "epoch_1.pt"
    assert _resume(base, data, other, first) == UsageError.exit_code
    said = capsys.readouterr().err
    assert f"{other} holds run {_run_json(other)['run_id']} (finished)" in said
    assert f"the checkpoint is of run {_run_json(begun)['run_id']}; nothing was changed" in said
    (other / "run.json").unlink()
    assert _resume(base, data, other, first) == UsageError.exit_code
    del before[other / "run.json"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_resume_leaves_another_runs_checkpoints_alone(
    base: Path, data: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert run(train_command(base, data, other, "--seed", "7")) == 0
    before = {p.name: p.read_bytes() for p in (other / "checkpoints").iterdir()}
    place = ["--set", f"output.checkpoints={other / 'checkpoints'}"]
    first = begun / "checkpoints" / "epoch_1.pt"
    assert _resume(base, data, tmp_path / "new", first, *place) == UsageError.exit_code
    assert "holds checkpoints of another run (epoch_1.pt, epoch_2.pt)" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (other / "checkpoints").iterdir()} == before


def test_resume_and_overwrite_contradict_each_other(
    base: Path, data: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (begun / "best_model.pt").read_bytes()
    assert _resume(base, data, begun, "auto", "--overwrite") == UsageError.exit_code
    assert "--resume" in capsys.readouterr().err
    assert (begun / "best_model.pt").read_bytes() == before


# ----- going back to an earlier checkpoint ---------------------------------------------------------------------------


def test_going_back_sets_later_checkpoints_aside(
    base: Path, data: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the run's new checkpoint is rotated away at once, and --resume auto goes on from the one given up."""
    checkpoints = begun / "checkpoints"
    given_up = (checkpoints / "epoch_2.pt").read_bytes()
    keep = ["--learning-rate", "3e-3", "--set", "training.keep_checkpoints=1"]
    with inject("train.step:terminate@3"):
        assert _resume(base, data, begun, checkpoints / "epoch_1.pt", *keep) == 143
    said = capsys.readouterr().err
    assert "Checkpoints of later steps are set aside as later-…: epoch_2.pt" in said
    assert (checkpoints / "later-epoch_2.pt").read_bytes() == given_up
    stopped = max(read_checkpoint(path).step for path in checkpoints.glob("step_*.pt"))
    assert 5 < stopped < 10
    assert _resume(base, data, begun, "auto", *keep) == 0
    assert [step["step"] for step in steps_of(begun)] == list(range(1, 11))
    assert steps_of(begun)[-1]["learning_rate"] < 3e-3


def test_going_back_takes_the_best_model_along(base: Path, data: Path, tmp_path: Path) -> None:
    """The best of the steps that are given up is not the best of the run that takes their place."""
    output = tmp_path / "out"
    assert run(train_command(base, data, output)) == 0
    assert read_checkpoint(output / "best_model.pt").step == 10
    # A learning rate at which validation only gets worse from there on.
    worse = ["--learning-rate", "100", "--set", "training.on_non_finite=skip"]
    assert _resume(base, data, output, output / "checkpoints" / "epoch_1.pt", *worse) == 0
    best = read_checkpoint(output / "best_model.pt")
    assert best.step == 5
    assert _run_json(output)["best_val_loss"] == best.val_loss
    first = read_checkpoint(output / "checkpoints" / "epoch_1.pt").model_state_dict
    assert all(torch.equal(best.model_state_dict[name], first[name]) for name in first)


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_best_model_that_is_gone_is_made_from_the_checkpoints(
    base: Path, data: Path, begun: Path, damage: str
) -> None:
    best = begun / "best_model.pt"
    before = read_checkpoint(best)
    if damage == "missing":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:1000])
    assert _resume(base, data, begun, "auto") == 0
    after = read_checkpoint(best)
    assert (after.step, after.val_loss) == (before.step, before.val_loss)
    assert not after.optimizer_state_dict
    assert not after.resume
    assert_same_weights(best, last(begun))


# ----- other data, other ways to name a checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "checkpoint", "steps", "said"),
    [
        (
            40,
            "epoch_1.pt",
            5 + 10,
            "40 examples now, 20 before: the run goes on after 0 of epoch 2",
        ),
        (8, "epoch_1.pt", 5 + 2, "8 examples now, 20 before: the run goes on after 0 of epoch 2"),
        (40, "step_2.pt", 2 + 6 + 10, "20 before: the run goes on after 16 of epoch 1"),
    ],
)
def test_other_data_by_force_goes_on_at_the_same_place(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], train: int,
    checkpoint: str, steps: int, said: str,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    keep = ["--set", "training.checkpoint_every_steps=2", "--set", "training.keep_checkpoints=9"]
    with inject("train.step:terminate@3"):
        assert run(train_command(base, data, output, *keep)) == 143
    if checkpoint == "epoch_1.pt":
        assert _resume(base, data, output, "auto", *keep) == 0
    other, source = tmp_path / "other", output / "checkpoints" / checkpoint
    if checkpoint == "step_2.pt":
        source = min((output / "checkpoints").glob("step_*.pt"))
        assert read_checkpoint(source).step == 2
    more = write_records(tmp_path / "data", train=train)
    assert _resume(base, more, other, source) == UsageError.exit_code
    assert _resume(base, more, other, source, "--force") == 0
    assert said in capsys.readouterr().err
    assert _run_json(other)["steps"] == steps
    assert last(other).is_file()


def test_an_output_folder_names_its_newest_checkpoint(
    base: Path, data: Path, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _resume(base, data, tmp_path / "new", begun) == 0
    said = capsys.readouterr().err
    assert f"Resumed from {begun / 'checkpoints' / 'epoch_2.pt'}: epoch 2, step 10" in said
