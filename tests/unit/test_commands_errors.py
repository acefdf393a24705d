"""Wrong input to every command of the round trip: one paragraph, the right exit code, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fake_ollama import FakeOllama
from tests.run_helpers import run, tiny_base, train_command, write_records


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, its export, and a second base."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny_base(folder / "bases")
    data = write_records(folder / "data", train=8)
    command = train_command(base, data, folder / "run", "--max-steps", "2")
    assert run(command) == 0
    assert run(export(folder, "export")) == 0
    tiny_base(folder / "other", seed=1)
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("OLLATUNE_REGISTRY", str(tmp_path / "registry"))


def export(place: Path, output: str, *more: Any) -> list[Any]:
    return ["create-modelfile", "--checkpoint", place / "run" / "best_model.pt", "--output",
            place / output, *more]  # fmt: skip


def refused(
    capsys: pytest.CaptureFixture[str], arguments: list[Any], code: int, *texts: str
) -> None:
    """Run a command and expect one paragraph on stderr, with `texts` in it, and the exit code."""
    capsys.readouterr()
    assert run(arguments) == code
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: "), captured.err
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    for text in texts:
        assert text in last, last


def test_checkpoints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["create-modelfile", "--checkpoint", place / "none.pt"]
    refused(capsys, missing, 3, "There is no checkpoint", "none.pt")
    junk = place / "junk.pt"
    junk.write_bytes(b"not a checkpoint")
    refused(capsys, ["create-modelfile", "--checkpoint", junk], 3, "junk.pt is not a checkpoint")
    other = next((place / "other").glob("*.gguf"))
    refused(capsys, export(place, "x", "--model", other), 3, "this checkpoint was trained on", "--model")  # fmt: skip
    refused(
        capsys, export(place, "x", "--model", "no-such-model"), 4, "no-such-model", "ollama serve"
    )
    assert not (place / "x").exists()


def test_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, export(place, "x", "--format", "ggfu"), 2, "`ggfu` is not known", "gguf")
    refused(capsys, export(place, "x", "--type", "q9_9"), 2, "q9_9", "q8_0")
    refused(capsys, export(place, "x", "--format", "hf", "--create", "a"), 2, "--format gguf")
    refused(capsys, export(place, "x", "--format", "hf", "--type", "q6_K"), 2, "bf16, f16, f32")
    refused(capsys, export(place, "x", "--create", "bad name"), 2, "bad name")
    refused(capsys, export(place, "x", "--unknown"), 2, "--unknown", "--help")
    assert not (place / "x").exists()


def test_the_folders_of_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = place / "theirs"
    theirs.mkdir()
    (theirs / "model.gguf").write_bytes(b"precious")
    refused(capsys, export(place, "theirs"), 3, "did not write", "--output")
    assert (theirs / "model.gguf").read_bytes() == b"precious"
    refused(capsys, export(place, "export", "--format", "adapter"), 3, "in the format `gguf`")
    file = place / "file"
    file.write_text("x")
    refused(capsys, export(place, "file"), 5, "is a file")


@pytest.mark.slow
def test_a_server_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = export(place, "export", "--create", "new-model")
    refused(capsys, done, 4, "is written to", "`new-model` was not created", "ollama serve")
    checkpoint = place / "run" / "best_model.pt"
    verify = ["verify", "--checkpoint", checkpoint, "--export", place / "export", "--model", "x"]
    refused(capsys, verify, 4, "ollama serve")
    refused(capsys, ["models", "ps"], 4, "ollama serve")
    refused(capsys, ["models", "pull", "llama3.2:1b"], 4, "ollama serve")


def test_tags(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = place / "run" / "best_model.pt"
    with FakeOllama(tmp_path / "server", "0.34.1") as server:
        host = ["--host", server.url]
        verify = ["verify", "--checkpoint", checkpoint, "--export", place / "export"]
        refused(capsys, [*verify, "--model", "nothing", *host], 4, "nothing")
        evaluate = ["evaluate", "--checkpoint", checkpoint, "--export", place / "export"]
        refused(capsys, [*evaluate, "--model", "nothing", *host], 2, "--base-model")
        refused(capsys, [*evaluate, "--model", "nothing", "--base-model", "b", *host], 4, "nothing")
        refused(capsys, ["models", "delete", "nothing", "--yes", *host], 4, "nothing")
        refused(capsys, ["models", "copy", "nothing", "other", *host], 4, "nothing")


def test_exports(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = place / "run" / "best_model.pt"
    verify = ["verify", "--checkpoint", checkpoint, "--export"]
    refused(capsys, [*verify, tmp_path], 3, "export.json", "create-modelfile")
    folder = tmp_path / "old"
    folder.mkdir()
    report = {"format": "gguf", "checkpoint": {"run_id": "another", "step": 9}, "tensors": []}
    (folder / "export.json").write_text(json.dumps(report))
    refused(capsys, [*verify, folder], 3, "exported from run another, step 9")
    (folder / "export.json").write_text(json.dumps({**report, "format": "hf"}))
    refused(capsys, [*verify, folder], 2, "for Transformers", "--format gguf")
    evaluate = ["evaluate", "--checkpoint", checkpoint, "--export", place / "export"]
    refused(capsys, [*evaluate, "--require", "exact_match is good"], 2, "cannot be read", ">=")


def test_releases(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_export = ["--export", place / "export"]
    refused(capsys, ["release", *of_export], 2, "name is missing")
    refused(capsys, ["release", "m", "--export", tmp_path], 3, "no complete export")
    refused(capsys, ["release", "m", "--tag", "newest", *of_export], 2, "no version tag")
    refused(capsys, ["release", "m", "--list", "--alias", "x"], 2, "--list and --alias")
    refused(capsys, ["release", "m", "--rollback", "v1"], 2, "no model `m`")
    refused(capsys, ["release", "m", "--push", "m", *of_export], 2, "USER/MODEL:TAG")
    assert not (tmp_path / "registry").exists() or not list((tmp_path / "registry").glob("*/v*"))
