"""`ollatune release` and the commands on models that a server has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollatune.cli import main
from ollatune.export.apply import apply_export
from ollatune.export.identity import IDENTITY_KEY
from ollatune.export.metadata_edits import SetKey
from ollatune.export.plan import plan_export
from ollatune.export.registry import ModelRegistry
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import ValueType
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.publish import ModelToPublish, publish
from tests.fake_ollama import FakeOllama
from tests.fake_ollama.store import FakeStore
from tests.parity.test_ollama_recordings import write_stand_in
from tests.round_trip_place import dies_at_request


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLATUNE_REGISTRY", str(tmp_path / "registry"))
    folder = tmp_path / "models" / "ollama"
    write(folder, "one")
    return folder


def write(folder: Path, content: str, **values: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").unlink(missing_ok=True)
    (folder / "model.gguf").write_bytes(content.encode())
    (folder / "Modelfile").write_text("FROM ./model.gguf\n")
    report = {"base_name": "llama3.2", "base_digest": "b" * 64, "identity": content,
              "checkpoint": {"run_id": "r1"}}  # fmt: skip
    (folder / "export.json").write_text(json.dumps(report))
    if values:
        (folder / "evaluation.json").write_text(json.dumps({"values": values}))


def ollatune(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out)
    return result


def test_versions_notes_aliases_and_the_way_back(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ollatune(capsys, "release", "mail")
    assert (first["tag"], first["parent"]) == ("v1", None)
    write(export, "two", exact_match=0.75)
    run = Path("models/trained")
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run_id": "r1", "val_loss": 0.5}))
    second = ollatune(capsys, "release", "mail", "--summary", "More data.")
    assert (second["tag"], second["parent"]) == ("v2", "v1")
    assert second["metrics"] == {"exact_match": 0.75, "val_loss": 0.5}
    assert "More data." in second["notes"]
    assert ollatune(capsys, "release", "mail", "--notes", "latest")["notes"] == second["notes"]
    assert ollatune(capsys, "release", "mail", "--alias", "stable", "--tag", "v1")["tag"] == "v1"
    listed = ollatune(capsys, "release", "--list")["models"]
    assert [version["tag"] for version in listed[0]["versions"]] == ["v1", "v2"]
    assert listed[0]["aliases"] == {"latest": "v2", "stable": "v1"}
    assert ollatune(capsys, "release", "mail", "--rollback", "parent")["tag"] == "v1"
    restored = export.parent / "restored"
    ollatune(capsys, "release", "mail", "--restore", "v1", "--export", restored)
    assert (restored / "model.gguf").read_bytes() == b"one"
    assert main(["release", "--list"]) == 0
    assert "  v2" in capsys.readouterr().out


def test_another_run_in_the_default_folder_is_not_taken(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("models/trained")
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run_id": "r2", "val_loss": 0.5}))
    assert ollatune(capsys, "release", "mail")["metrics"] == {}


def test_only_the_very_export_is_pushed(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = FakeStore(tmp_path / "remote")
    with FakeOllama(tmp_path / "store", "0.24.0", registry=registry) as server:
        put(server, "mine", tmp_path)
        host = ["--host", server.url]
        push = ["release", "mail", "--push", "me/mail:v1", "--from", "mine", *host]
        assert main(push) == 3
        assert "is not the export in" in capsys.readouterr().err
        assert "POST /api/push" not in server.paths()
        put(server, "ours", tmp_path, identity="one")
        result = ollatune(capsys, *push[:-3], "ours", *host)
        assert result["pushed"] == {"name": "me/mail:v1", "from": "ours"}
        assert server.paths()[-1] == "POST /api/push"
        names = [model.name.short for model in server.store.models()]
        assert sorted(names) == ["mail:v1", "me/mail:v1", "mine:latest", "ours:latest"]


def test_a_release_names_the_served_model_too(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeOllama(tmp_path / "store", "0.34.1") as server:
        put(server, "ours", tmp_path, identity="one")
        put(server, "mine", tmp_path)
        host = ["--host", server.url]
        assert main(["release", "mail", "--from", "mine", *host]) == 3
        assert "nothing was released" in capsys.readouterr().err
        assert not ollatune(capsys, "release", "--list")["models"]
        assert (
            ollatune(capsys, "release", "mail", "--from", "ours", *host)["served_as"] == "mail:v1"
        )
        assert (
            ollatune(capsys, "release", "mail", "--tag", "v1", "--from", "ours", *host)["tag"]
            == "v1"
        )
        with OllamaClient(server.url) as client:
            client.delete("mail:v1")
            client.copy("mine", "mail:v1")
        assert main(["release", "mail", "--tag", "v1", "--from", "ours", *host]) == 2
        assert "the server has another model mail:v1 already" in capsys.readouterr().err
        assert main(["release", "mail", "--tag", "v2", "--from", "none", *host]) == 4


def test_a_release_killed_at_any_request_is_finished_by_the_next(
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["release", "mail", "--tag", "v1", "--push", "me/mail:v1", "--from", "ours"]
    whole: tuple[list[str], list[str], str] | None = None
    for number in range(1, 20):
        monkeypatch.setenv("OLLATUNE_REGISTRY", str(tmp_path / f"registry{number}"))
        remote = FakeStore(tmp_path / f"remote{number}")
        with FakeOllama(tmp_path / f"store{number}", "0.24.0", registry=remote) as server:
            put(server, "ours", tmp_path, identity="one")
            host = ["--host", server.url]
            is_killed = dies_at_request(monkeypatch, number, lambda h=host: main([*command, *h]))
            assert main([*command, *host]) == 0
            names = [
                sorted(m.name.short for m in store.models()) for store in (server.store, remote)
            ]
            notes = ollatune(capsys, "release", "mail", "--notes", "v1")["notes"]
            found = (names[0], names[1], notes.split("## Origin")[1])
            assert whole in (None, found)
            whole = found
            history = ModelRegistry(tmp_path / f"registry{number}").history("mail")
            assert [event["reason"] for event in history] == ["release"]
        if not is_killed:
            break
    assert number > 5
    assert whole is not None
    assert whole[:2] == (["mail:v1", "me/mail:v1", "ours:latest"], ["me/mail:v1"])


def put(server: FakeOllama, name: str, folder: Path, identity: str = "") -> None:
    weights = write_stand_in(folder / f"{name}.gguf")
    if identity:
        edit = SetKey(IDENTITY_KEY, identity, ValueType.STRING)
        with GGUFFile.open(weights) as file:
            apply_export(plan_export(file, [], metadata_edits=[edit]), folder / "named.gguf")
        weights = folder / "named.gguf"
    with OllamaClient(server.url) as client:
        publish(client, name, ModelToPublish(gguf=weights, template="{{ .Prompt }}"))


def test_models_of_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeOllama(tmp_path / "store", "0.34.1") as server:
        put(server, "mine", tmp_path)
        host = ["--host", server.url]
        with OllamaClient(server.url) as client:
            client.load("mine")
        listed = ollatune(capsys, "models", "list", "--models", tmp_path / "store", *host)
        assert [row["name"] for row in listed["local"]] == ["mine:latest"]
        assert listed["server"]["models"][0]["name"] == "mine:latest"
        unseen = ["models", "list", "--models", str(tmp_path / "none")]
        assert main([*unseen, *host]) == 0
        assert f"On the server at {server.url}:\n  mine:latest" in capsys.readouterr().out
        assert main([*unseen, "--host", "127.0.0.1:9"]) == 4
        running = ollatune(capsys, "models", "ps", *host)["running"]
        assert [row["name"] for row in running] == ["mine:latest"]
        assert main(["models", "copy", "mine", "second", *host]) == 0
        assert main(["models", "copy", "mine", "second", *host]) == 2
        assert "--force" in capsys.readouterr().err
        assert main(["models", "copy", "mine", "second", "--force", *host]) == 0
        assert main(["models", "delete", "second", *host]) == 2
        assert "nothing was done. Say --yes" in capsys.readouterr().err
        assert main(["models", "delete", "second", "--yes", *host]) == 0
        assert [model.name.short for model in server.store.models()] == ["mine:latest"]
