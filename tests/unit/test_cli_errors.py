"""Wrong input on purpose: one paragraph, the right exit code, no traceback, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.run_helpers import run, tiny_base, train_command, write_records

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "data")


def failure(capsys: Capture, arguments: list[str], code: int) -> str:
    """Run, expect `code`, and return the message."""
    capsys.readouterr()
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    message = captured.err[captured.err.rindex("error:") :]
    assert len(message.strip().splitlines()) <= 5
    return message


def test_missing_data(base: Path, tmp_path: Path, capsys: Capture) -> None:
    message = failure(capsys, train_command(base, tmp_path / "none", tmp_path / "out"), 3)
    assert f"There is no data at {tmp_path / 'none'}" in message


def test_a_bad_line_is_named(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-5]
    (data / "train.jsonl").write_text("\n".join(lines))
    message = failure(capsys, train_command(base, data, tmp_path / "out"), 3)
    assert f"{data / 'train.jsonl'}:7" in message


def test_unknown_option_and_key(capsys: Capture) -> None:
    assert "--epohcs" in failure(capsys, ["train", "--epohcs", "3"], 2)
    message = failure(capsys, ["train", "--set", "training.epohcs=3"], 2)
    assert "Did you mean `epochs`?" in message


def test_unknown_embedded_model(data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = train_command(Path("embedded:smollm2-135"), data, tmp_path / "out")
    assert "Did you mean `smollm2-135m`?" in failure(capsys, arguments, 2)


def test_truncated_gguf(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(base.read_bytes()[:-1000])
    message = failure(capsys, train_command(short, data, tmp_path / "out"), 3)
    assert str(short) in message


def test_wrong_family(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = train_command(base, data, tmp_path / "out", "--set", "model.model_family=qwen2")
    message = failure(capsys, arguments, 2)
    assert "model_family is `qwen2`" in message
    assert "`llama`" in message


def test_no_such_target_module(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = train_command(
        base, data, tmp_path / "out", "--set", "advanced.lora_target_modules=[q_prj]"
    )
    assert "Did you mean `q_proj`?" in failure(capsys, arguments, 2)


def test_the_folder_of_another_run(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "out"
    command = train_command(base, data, output, "--max-steps", "1")
    assert run(command) == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.suffix != ".log"}
    message = failure(capsys, command, 2)
    assert "already holds run" in message
    assert "--resume auto" in message
    after = {p: p.read_bytes() for p in before if p.name != ".run.lock"}
    assert all(before[p] == content for p, content in after.items())
    assert run([*command, "--overwrite"]) == 0


def test_output_is_a_file(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file" in failure(capsys, train_command(base, data, tmp_path / "out"), 5)
    assert (tmp_path / "out").read_text() == "mine"


def test_resume_from_nothing(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = [*train_command(base, data, tmp_path / "out"), "--resume", "auto"]
    assert "There is no whole checkpoint" in failure(capsys, arguments, 3)
    arguments[-1] = str(tmp_path / "epoch_9.pt")
    assert "There is no checkpoint" in failure(capsys, arguments, 3)


def test_distributed_without_torchrun(
    base: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = train_command(base, data, tmp_path / "out", "--distributed")
    assert "torchrun --nproc_per_node" in failure(capsys, arguments, 2)


def test_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = train_command(base, data, tmp_path / "out", "--dry-run", "--json")
    assert run(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["splits"]["train"]["num_records"] == 20
    assert plan["steps"] == 10
    assert plan["trainable_parameters"] > 0
    assert plan["memory"]["total_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_underscores_in_flags_mean_dashes(base: Path, data: Path, tmp_path: Path) -> None:
    arguments = train_command(
        base, data, tmp_path / "out", "--learning_rate", "3e-3", "--max_steps", "1"
    )
    assert run(arguments) == 0
    assert "learning_rate: 0.003" in (tmp_path / "out" / "config.yaml").read_text()
