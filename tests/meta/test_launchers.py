"""The launchers of src/models are thin, alike, and answer as their commands do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "src" / "models"
COMMANDS = {
    "train": "train", "create_modelfile": "create-modelfile", "ollama_client": "models",
    "data_loader": "data", "training_preprocessor": "preprocess",
}  # fmt: skip


def test_all_launchers_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_launcher_is_thin_and_shows_its_commands_help(
    name: str, command: str, tmp_path: Path
) -> None:
    path = FOLDER / f"{name}.py"
    text = path.read_text()
    assert len(text.splitlines()) <= 15
    assert f'main(["{command}", *sys.argv[1:]])' in text
    outputs = [
        subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            timeout=60,
        ).stdout
        for arguments in ([str(path), "--help"], ["-m", "ollatune", command, "--help"])
    ]
    assert outputs[0] == outputs[1]
    assert "Usage" in outputs[0]
