"""The specification's chapter 11: its commands word for word, unit, integration and smoke tests of training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ollatune.checkpoint.format import REQUIRED_KEYS
from tests.run_helpers import run, steps_of, tiny_base, train_command, write_records

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "src" / "models"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: data/processed/, configs/model_config.yaml naming a small local base."""
    write_records(tmp_path / "data" / "processed")
    base = tiny_base(tmp_path / "bases")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "model_config.yaml").write_text(
        f"""
model:
  base_model: "{base}"
  model_family: "llama"
  context_window: 8192
  quantization: "q4_K_M"

training:
  method: "fine-tuning"
  epochs: 3
  batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 2e-3
  warmup_steps: 1

advanced:
  lora_enabled: true
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.05

validation:
  max_new_tokens: 4
"""
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher as the specification writes it."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


# ----- the commands of chapters 10, 12 and 14, word for word ---------------------------------------------------------


@pytest.mark.slow
def test_the_specifications_commands(workspace: Path) -> None:
    basic = script(
        "train.py", "--config", "configs/model_config.yaml", "--data", "data/processed/",
        "--output", "models/trained/",
    )  # fmt: skip
    assert basic.returncode == 0, basic.stderr
    assert {p.name for p in Path("checkpoints").iterdir()} == {
        "epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "index.json",
    }  # fmt: skip
    trained = Path("models/trained")
    for name in (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "best_model.pt",
        "adapter_model.safetensors",
    ):
        assert (trained / name).is_file(), name
    assert list(Path("logs/training").glob("*.log"))

    resumed = script(
        "train.py", "--config", "configs/model_config.yaml", "--resume", "checkpoints/epoch_2.pt",
        "--output", "models/trained/",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((trained / "run.json").read_text())["epochs"] == 3

    exported = script(
        "create_modelfile.py", "--checkpoint", "models/trained/best_model.pt",
        "--output", "models/ollama/",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    modelfile = Path("models/ollama/Modelfile").read_text()
    assert modelfile.count("FROM ./model.gguf") == 1
    assert "TEMPLATE" in modelfile
    assert "PARAMETER repeat_penalty 1" in modelfile


@pytest.mark.slow
def test_custom_parameters_and_debug_mode(workspace: Path) -> None:
    base = next((workspace / "bases").glob("*.gguf"))
    custom = script(
        "train.py", "--config", "configs/model_config.yaml", "--model", str(base), "--epochs", "3",
        "--batch-size", "4", "--learning-rate", "2e-5", "--output", "models/trained/",
    )  # fmt: skip
    assert custom.returncode == 0, custom.stderr
    assert "learning_rate: 2.0e-05" in Path("models/trained/config.yaml").read_text()
    debug = script(
        "train.py", "--config", "configs/model_config.yaml", "--debug", "--max-steps", "10",
        "--overwrite",
    )  # fmt: skip
    assert debug.returncode == 0, debug.stderr
    assert json.loads(Path("models/trained/run.json").read_text())["steps"] == 9  # 3 epochs of 3


def test_the_named_base_is_not_there_and_no_server_answers(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("OLLAMA_MODELS", str(workspace / "empty-store"))
    code = run(["train", "--config", str(ROOT / "configs" / "model_config.yaml")])
    message = capsys.readouterr().err
    assert code == 4
    assert "llama3.1:8b" in message
    assert "embedded:smollm2-135m" in message
    assert "Traceback" not in message
    assert not Path("models/trained/run.json").exists()


# ----- unit: what a run writes -----


def test_a_checkpoint_holds_the_specifications_fields(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), write_records(tmp_path / "data")
    assert run(train_command(base, data, tmp_path / "out")) == 0
    content = torch.load(tmp_path / "out" / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert set(REQUIRED_KEYS) <= content.keys()
    assert content["epoch"] == 2
    assert content["val_loss"] > 0
    assert content["optimizer_state_dict"]["state"]
    assert content["config"]["training"]["epochs"] == 2


def test_loss_falls_and_metrics_tell_every_step(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), write_records(tmp_path / "data")
    assert run(train_command(base, data, tmp_path / "out", "--epochs", "4")) == 0
    steps = steps_of(tmp_path / "out")
    assert [step["step"] for step in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert all(step["grad_norm"] > 0 and step["num_targets"] > 0 for step in steps)


def test_smoke_two_batches(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path), write_records(tmp_path / "data")
    assert run(train_command(base, data, tmp_path / "out", "--max-steps", "2")) == 0
    assert len(steps_of(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "checkpoints" / "step_2.pt").is_file()
    run_json = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_json["status"] == "finished"
    assert run_json["peak_memory_mb"] > 0
