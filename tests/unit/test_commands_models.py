"""`ollatune models show`: what a newcomer reads of a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ollatune.cli import main
from tests.run_helpers import run, tiny_base


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert run(["models", "show", path]) == 0
    return capsys.readouterr().out.splitlines()


def test_show_says_what_is_there_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_base(tmp_path)
    lines = shown(path, capsys)
    facts = {line[:13].strip(): line[14:] for line in lines if line[:13].strip()}
    assert facts["architecture"].startswith("llama, 2 layers, ")
    assert re.fullmatch(r".*\(\d+\.\d [KM]iB, sha256 [0-9a-f]{12}\)", facts["file"])
    assert "F32" in " ".join(lines)
    assert facts["tokenizer"].startswith("gpt2, ")
    assert facts["template"] == "the file's own (Jinja)"
    assert facts["trainable"] == "yes"
    assert lines[-1] == f"Next: ollatune train --model {path} --data YOUR_DATA"


def test_show_says_why_a_file_cannot_be_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_base(tmp_path)
    content = path.read_bytes()
    unknown = tmp_path / "unknown.gguf"
    value = (5).to_bytes(8, "little") + b"llama"
    assert content.count(value) == 1
    unknown.write_bytes(content.replace(value, (5).to_bytes(8, "little") + b"mamba"))
    lines = shown(unknown, capsys)
    assert lines[-1].startswith("trainable     no: the file states the architecture `mamba`; ")
    assert main(["models", "show", str(unknown), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] is False
