"""Runs that must be the same run: batch times accumulation, resumed and uninterrupted, the same twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    train_command,
    write_records,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"))


def test_batch_size_times_accumulation(base: Path, data: Path, tmp_path: Path) -> None:
    trajectories = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        output = tmp_path / f"{batch}x{accumulation}"
        command = train_command(
            base, data, output, "--batch-size", str(batch),
            "--gradient-accumulation-steps", str(accumulation), "--set", "advanced.lora_dropout=0",
        )  # fmt: skip
        assert run(command) == 0
        trajectories.append(steps_of(output))
    reference = trajectories[0]
    for other in trajectories[1:]:
        assert len(other) == len(reference) == 10
        for mine, theirs in zip(reference, other, strict=True):
            assert mine["num_targets"] == theirs["num_targets"]
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("train", [16, 17, 19])
def test_the_last_partial_accumulation_is_a_step(base: Path, tmp_path: Path, train: int) -> None:
    data = write_records(tmp_path / "data", train=train)
    assert run(train_command(base, data, tmp_path / "out")) == 0
    assert len(steps_of(tmp_path / "out")) == 2 * -(-train // 4)


def test_token_budgets_train_each_example_once_an_epoch(
    base: Path, data: Path, tmp_path: Path
) -> None:
    budget = train_command(
        base, data, tmp_path / "budget", "--set", "data.tokens_per_batch=200", "--epochs", "3"
    )
    assert run(budget) == 0
    assert run(train_command(base, data, tmp_path / "plain", "--epochs", "3")) == 0
    totals = [
        [
            sum(step[key] for step in steps_of(tmp_path / name))
            for key in ("num_tokens", "num_targets")
        ]
        for name in ("budget", "plain")
    ]
    assert totals[0] == totals[1]
    assert len(steps_of(tmp_path / "budget")) != len(steps_of(tmp_path / "plain"))


def test_fast_path_and_shared_beginnings_change_nothing(
    base: Path, data: Path, tmp_path: Path
) -> None:
    settings = {
        "shared": (),
        "unshared": ("--set", "advanced.share_prefixes=false"),
        "plain": ("--set", "training.fast_path=false"),
        "recomputed": ("--set", "training.activation_checkpointing=true"),
    }
    losses = {}
    for name, more in settings.items():
        command = train_command(
            base, data, tmp_path / name, "--set", "advanced.lora_dropout=0", *more
        )
        assert run(command) == 0
        losses[name] = [step["loss"] for step in steps_of(tmp_path / name)]
    for name in ("unshared", "plain", "recomputed"):
        assert losses[name] == pytest.approx(losses["shared"], rel=1e-5), name


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_same_run_twice_is_the_same_bytes(
    base: Path, data: Path, tmp_path: Path, full: bool
) -> None:
    """Adapter, loss log, samples and exported GGUF."""
    more = ("--set", "advanced.lora_enabled=false") if full else ()
    for name in ("first", "second"):
        output = tmp_path / name
        assert run(train_command(base, data, output, *more)) == 0
        export = ["create-modelfile", "--checkpoint", output / "best_model.pt", "--output"]
        assert run([*export, output / "export"]) == 0
    files = ["export/model.gguf", "samples.jsonl"]
    files += [] if full else ["adapter_model.safetensors", "adapter_config.json"]
    for name in files:
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert first == second, name
    assert steps_of(tmp_path / "first") == steps_of(tmp_path / "second")


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("signal", [("interrupt", 130), ("terminate", 143)], ids=["ctrl-c", "term"])
def test_resumed_is_uninterrupted(
    base: Path, data: Path, tmp_path: Path, full: bool, signal: tuple[str, int]
) -> None:
    more = ("--set", "advanced.lora_enabled=false") if full else ()
    assert run(train_command(base, data, tmp_path / "whole", *more)) == 0
    with inject(f"train.step:{signal[0]}@8"):  # in the middle of the second epoch
        assert run(train_command(base, data, tmp_path / "cut", *more)) == signal[1]
    assert (tmp_path / "cut" / "checkpoints" / "step_8.pt").is_file()
    status = json.loads((tmp_path / "cut" / "run.json").read_text())["status"]
    assert status == "interrupted"
    assert run(train_command(base, data, tmp_path / "cut", *more, "--resume", "auto")) == 0
    assert_same_weights(
        tmp_path / "whole" / "checkpoints" / "epoch_2.pt",
        tmp_path / "cut" / "checkpoints" / "epoch_2.pt",
    )
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")
    adapter = "adapter_model.safetensors"
    if not full:
        assert (tmp_path / "whole" / adapter).read_bytes() == (
            tmp_path / "cut" / adapter
        ).read_bytes()


def test_changed_settings_are_refused_on_resume(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train_command(base, data, tmp_path / "out", "--max-steps", "2")) == 0
    resume = train_command(base, data, tmp_path / "out", "--resume", "auto")
    assert run([*resume, "--set", "advanced.lora_rank=4"]) == 2
    assert "advanced.lora_rank: 8 → 4" in capsys.readouterr().err
    (data / "extra.jsonl").write_text(
        json.dumps({"instruction": "New?", "response": "Yes."}) + "\n"
    )
    try:
        assert run(resume) == 2
        assert "the training data differs" in capsys.readouterr().err
    finally:
        (data / "extra.jsonl").unlink()


def test_a_setting_of_the_resume_wins_over_a_flag_of_the_run_before(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it `--set training.learning_rate=…` would be ignored in silence where the run began with a flag."""
    command = train_command(base, data, tmp_path)
    assert run([*command, "--max-steps", "2"]) == 0
    at = command.index("--learning-rate")
    resume = [*command[:at], *command[at + 2 :], "--resume", "auto", "--max-steps", "3"]
    assert run([*resume, "--set", "training.learning_rate=0.002"]) == 0
    assert (
        "Changed since the checkpoint: training.learning_rate: 0.01 → 0.002"
        in capsys.readouterr().err
    )
    assert "learning_rate: 0.002" in (tmp_path / "config.yaml").read_text()
