"""What validation does inside a run: early stopping, overfitting, samples, task metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollatune.checkpoint.format import read_checkpoint
from ollatune.training.stopping import OverfittingWatch
from tests.run_helpers import run, train_command


@pytest.fixture(scope="module")
def contradicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to learn by heart; the same questions have other answers in validation."""
    folder = tmp_path_factory.mktemp("contradicting")
    for name, answers in (("train", "abcd"), ("validation", "dcba")):
        lines = [
            json.dumps({"instruction": f"Letter {i}?", "response": letter * 6})
            for i, letter in enumerate(answers)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def validations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "validation"]


def test_a_run_stops_when_validation_no_longer_improves(
    base: Path, contradicting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(
        base, contradicting, tmp_path, "--epochs", "30", "--gradient-accumulation-steps", "1",
        "--set", "training.early_stopping_patience=3", "--set", "validation.samples=0",
        "--set", "training.early_stopping_min_delta=0.01",
    )  # fmt: skip
    assert run(command) == 0
    assert "Stopped early: no improvement over" in capsys.readouterr().err
    values = json.loads((tmp_path / "run.json").read_text())
    losses = [line["val_loss"] for line in validations(tmp_path)]
    best = losses.index(min(losses))
    assert values["stopped_early"]
    assert values["epochs"] == len(losses) < 30
    assert len(losses) - 1 - best <= 3
    assert values["best_val_loss"] == min(losses)
    assert read_checkpoint(tmp_path / "best_model.pt").epoch == best + 1


def test_overfitting_is_seen_and_dropout_raised(
    base: Path, contradicting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(
        base, contradicting, tmp_path, "--epochs", "25", "--gradient-accumulation-steps", "1",
        "--set", "training.overfitting_raise_dropout=0.1", "--set", "validation.samples=0",
        "--set", "advanced.lora_dropout=0", "--set", "training.keep_checkpoints=30",
    )  # fmt: skip
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "Overfitting: " in said
    assert "raise lora_dropout" in said
    assert "LoRA dropout is 0.1 now" in said
    saved = [read_checkpoint(tmp_path / "checkpoints" / f"epoch_{n}.pt") for n in (1, 25)]
    dropouts = [set(checkpoint.resume["dropout"]) for checkpoint in saved]
    assert dropouts[0] == {0.0}
    assert all(0.09 < dropout <= 0.5 for dropout in dropouts[1])


def test_the_gap_alone_is_overfitting_when_it_grows() -> None:
    watch = OverfittingWatch(patience=None, max_gap=0.5)
    losses = ((1.0, 1.2), (0.9, 1.2), (0.8, 1.19), (0.7, 1.18), (0.75, 1.18))
    advice = [watch.update(*pair) for pair in losses]
    assert [line is None for line in advice] == [True, True, True, False, True]
    assert "is 0.4800 above the training loss (0.7000), more than 50% of it" in str(advice[3])


def test_samples_and_metrics_of_every_validation(base: Path, tmp_path: Path) -> None:
    """Built-in scores and a user's function, over all validation records; the first two answers are kept."""
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 8), ("validation", 4)):
        lines = [
            json.dumps({"instruction": f"{name} {i}?", "response": json.dumps({"n": i})})
            for i in range(count)
        ]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    user = tmp_path / "scores.py"
    user.write_text("def length(answer, expected):\n    return min(1.0, len(answer) / 100)\n")
    command = train_command(
        base, data, tmp_path / "out", "--set", "validation.samples=2", "--set",
        f"validation.metrics=[exact_match, field_accuracy, '{user}:length']",
        "--set", "training.evaluate_every_steps=1",
    )  # fmt: skip
    assert run(command) == 0
    lines = validations(tmp_path / "out")
    samples = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert len(samples) == 2 * len(lines)
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all("n" in json.loads(sample["expected"]) for sample in samples)
    assert all(set(sample) >= {"prompt", "answer", "expected", "epoch"} for sample in samples)
    for line in lines:
        assert line["exact_match"] == line["field_accuracy"] == 0.0
        assert 0 < line[f"{user}:length"] < 0.5
        assert line["perplexity"] > 1
        assert 0 <= line["token_accuracy"] <= 1
