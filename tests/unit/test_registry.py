"""The local model registry: versions, parents, notes, aliases, going back, and what a killed release leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollatune.base.errors import InputError, UsageError
from ollatune.export import registry as registry_module
from ollatune.export.registry import ModelRegistry, default_registry_folder
from ollatune.export.release_tags import next_tag, version_key


def make_run(folder: Path, *, loss: float = 0.5, rank: int = 16, data: str = "d1") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "run_id": f"run-{data}", "status": "completed", "data_digest": data * 20,
        "base": {"name": "llama3.2", "digest": "b" * 64}, "val_loss": loss, "train_loss": None,
        "versions": {"torch": "2.13.0"}, "data": {"train": 300},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "config.yaml").write_text(f"lora:\n  rank: {rank}\ntraining:\n  epochs: 3\n")
    return folder


def make_export(folder: Path, content: str = "one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.gguf").unlink(missing_ok=True)  # as the exporter: a new file under the name
    (folder / "model.gguf").write_bytes(content.encode() * 100)
    (folder / "Modelfile").write_text(f"FROM ./model.gguf\n# {content}\n")
    report = {"base_name": "llama3.2", "base_digest": "b" * 64}
    (folder / "export.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "registry")


@pytest.fixture
def two_versions(registry: ModelRegistry, tmp_path: Path) -> ModelRegistry:
    export, run = tmp_path / "export", tmp_path / "run"
    registry.release("mail", "v1", make_export(export), make_run(run), metrics={"exact_match": 0.7})
    registry.release(
        "mail", "v2", make_export(export, "two"), make_run(run, loss=0.25, rank=32, data="d2"),
        metrics={"exact_match": 0.9}, summary="More data.",
    )  # fmt: skip
    return registry


def test_notes_tell_how_the_data_changed(registry: ModelRegistry, tmp_path: Path) -> None:
    export, run = tmp_path / "export", make_run(tmp_path / "run")
    report = {
        "forms": {"data/": "instruction"}, "num_duplicates": 0, "num_rejected": 0, "warnings": ["w"],
        "splits": {"train": {"num_examples": 300, "num_tokens": 9000, "percentiles": {"p50": 30}}},
    }  # fmt: skip
    for number, examples in ((1, 300), (2, 450)):
        report["splits"]["train"]["num_examples"] = examples  # type: ignore[index]
        facts = json.loads((run / "run.json").read_bytes())
        (run / "run.json").write_text(json.dumps({**facts, "data": report}))
        registry.release("mail", f"v{number}", make_export(export, str(number)), run)
    first, second = registry.notes("mail", "v1"), registry.notes("mail", "v2")
    assert "## Data\n\n| count | value |" in first
    assert "| splits.train.num_tokens | 9000 |" in first
    assert "| count | v1 | this version |" in second
    assert "| splits.train.num_examples | 300 | 450 |" in second
    assert "num_tokens" not in second  # unchanged
    assert "warnings" not in first


def test_a_release_holds_where_it_came_from(two_versions: ModelRegistry) -> None:
    first, second = two_versions.releases("mail")
    assert (first.tag, first.parent, second.tag, second.parent) == ("v1", None, "v2", "v1")
    assert second.base == {"name": "llama3.2", "digest": "b" * 64}
    assert second.data == {"digest": "d2" * 20, "report": {"train": 300}}
    assert second.config == {"lora": {"rank": 32}, "training": {"epochs": 3}}
    assert second.metrics == {"val_loss": 0.25, "exact_match": 0.9}
    assert second.run_id == "run-d2"
    assert set(second.files) == {
        "model.gguf",
        "Modelfile",
        "export.json",
        "config.yaml",
        "run.json",
    }
    assert two_versions.names() == ["mail"]
    assert two_versions.get("mail") == two_versions.get("mail", "v2") == second
    assert two_versions.aliases("mail") == {"latest": "v2"}


def test_notes_tell_what_changed(two_versions: ModelRegistry) -> None:
    notes = two_versions.notes("mail")
    assert notes.startswith("# mail v2\n\nMore data.\n")
    assert "- Base model: llama3.2 `bbbbbbbbbbbb` (unchanged)" in notes
    assert "- Training data: `d2d2d2d2d2d2` (was `d1d1d1d1d1d1`)" in notes
    assert "| exact_match | 0.7 | 0.9 | +0.2 |" in notes
    assert "| val_loss | 0.5 | 0.25 | -0.25 |" in notes
    assert "| lora.rank | 16 | 32 |" in notes
    assert "training.epochs" not in notes
    first = two_versions.notes("mail", "v1")
    assert "First version." in first
    assert "| exact_match | 0.7 |" in first


def test_versions_are_kept_when_the_export_is_made_anew(
    two_versions: ModelRegistry, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    paths = two_versions.restore("mail", "v1", target)
    assert {path.name for path in paths} == set(two_versions.get("mail", "v1").files)
    assert (target / "model.gguf").read_bytes() == b"one" * 100
    assert (target / "Modelfile").read_text() == "FROM ./model.gguf\n# one\n"
    two_versions.restore("mail", "v2", target)
    assert (target / "model.gguf").read_bytes() == b"two" * 100
    two_versions.restore("mail", "v2", target)  # over itself: the same link
    assert sorted(path.name for path in target.iterdir()) == sorted(two_versions.get("mail").files)
    (tmp_path / "export" / "Modelfile").write_text("changed by hand")
    assert (two_versions.folder / "mail/v2/Modelfile").read_text() == "FROM ./model.gguf\n# two\n"


def test_a_changed_file_is_not_restored(two_versions: ModelRegistry, tmp_path: Path) -> None:
    (two_versions.folder / "mail/v1/Modelfile").write_text("FROM evil")
    with pytest.raises(InputError, match="Modelfile is missing or not what was released"):
        two_versions.restore("mail", "v1", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_rollback_goes_to_the_parent_and_the_next_release_follows_it(
    two_versions: ModelRegistry, tmp_path: Path
) -> None:
    assert two_versions.rollback("mail").tag == "v1"
    assert two_versions.get("mail").tag == "v1"
    third = two_versions.release("mail", "v3", make_export(tmp_path / "export", "three"))
    assert third.parent == "v1"
    assert "Follows v1." in two_versions.notes("mail", "v3")
    assert two_versions.rollback("mail", "v2").tag == "v2"
    reasons = [
        (event["tag"], event["was"], event["reason"]) for event in two_versions.history("mail")
    ]
    assert reasons == [
        ("v1", "", "release"), ("v2", "v1", "release"), ("v1", "v2", "rollback"),
        ("v3", "v1", "release"), ("v2", "v3", "rollback"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="at v2 already"):
        two_versions.rollback("mail", "v2")
    two_versions.rollback("mail", "v1")
    with pytest.raises(UsageError, match="first version"):
        two_versions.rollback("mail")


def test_aliases_name_versions(two_versions: ModelRegistry) -> None:
    two_versions.set_alias("mail", "stable", "v1")
    two_versions.set_alias("mail", "candidate", "latest")
    assert two_versions.aliases("mail") == {"latest": "v2", "candidate": "v2", "stable": "v1"}
    assert two_versions.get("mail", "stable").tag == "v1"
    for alias, message in (
        ("v9", "cannot be an alias"),
        ("a/b", "cannot be"),
        ("latest", "moved by"),
    ):
        with pytest.raises(UsageError, match=message):
            two_versions.set_alias("mail", alias, "v1")


def test_a_tag_is_never_taken_twice(two_versions: ModelRegistry, tmp_path: Path) -> None:
    changed = make_export(tmp_path / "export", "other")
    for tag in ("v2", "2", "v2.0.0"):
        with pytest.raises(UsageError, match=r"v2 was released .* with other files") as caught:
            two_versions.release("mail", tag, changed)
        assert "such as v3" in caught.value.hint
    assert [release.tag for release in two_versions.releases("mail")] == ["v1", "v2"]


def test_the_same_release_again_changes_nothing(registry: ModelRegistry, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export")
    first = registry.release("mail", "v1", export)
    assert registry.release("mail", "v1", export) == first
    assert len(registry.history("mail")) == 1


@pytest.mark.parametrize("step", ["place_file", "write_json", "os.rename", "_point"])
def test_killed_at_any_step_and_run_again_is_as_if_run_once(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    export = make_export(tmp_path / "export")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "_point":
            patch.setattr(ModelRegistry, "_point", killed)
        else:
            patch.setattr(f"ollatune.export.registry.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.release("mail", "v1", export)
    if step != "_point":
        assert registry.releases("mail") == []
    released = registry.release("mail", "v1", export)
    assert registry.get("mail") == released
    assert sorted(path.name for path in (registry.folder / "mail").iterdir()) == [
        "state.json",
        "v1",
    ]


def test_what_is_missing_is_named(two_versions: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model `mial`. Did you mean `mail`"):
        two_versions.get("mial")
    with pytest.raises(UsageError, match="no version `v7`") as caught:
        two_versions.get("mail", "v7")
    assert "v1, v2" in caught.value.hint
    with pytest.raises(InputError, match=r"no complete export: .* found none of them"):
        two_versions.release("mail", "v3", tmp_path / "absent")
    for name in ("", "..", "a/../b", "/etc", "a/b/c", "a b", "a\\b", "./a"):
        with pytest.raises(UsageError, match="cannot be the name"):
            two_versions.get(name)
    with pytest.raises(UsageError, match="no version tag"):
        two_versions.release("mail", "latest", make_export(tmp_path / "export"))


def test_a_damaged_entry_is_named(two_versions: ModelRegistry) -> None:
    (two_versions.folder / "mail/v1/release.json").write_text('{"name": "mail"')
    with pytest.raises(InputError, match=r"v1/release.json is damaged"):
        two_versions.get("mail", "v1")


def test_namespaces_and_other_file_systems(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    registry.release("team/mail", "v1", make_export(tmp_path / "export"))
    assert registry.names() == ["team/mail"]
    stored = registry.folder / "team/mail/v1/model.gguf"
    assert stored.read_bytes() == b"one" * 100
    assert stored.stat().st_nlink == 1


def test_notes_cannot_be_broken_by_what_is_in_them(registry: ModelRegistry, tmp_path: Path) -> None:
    export, run = make_export(tmp_path / "export"), make_run(tmp_path / "run")
    registry.release("mail", "v1", export, run)
    (run / "config.yaml").write_text('data:\n  system: "a | b\\nc"\n')
    registry.release("mail", "v2", make_export(export, "two"), run)
    assert "| data.system | – | a \\| b c |" in registry.notes("mail")


def test_versions_are_in_semantic_order() -> None:
    tags = ["v0.9", "v1-rc1", "v1-rc2", "v1", "v1.2", "v1.10", "2.0.0", "v10"]
    assert sorted(sorted(tags), key=version_key) == tags
    assert version_key("v1") == version_key("1.0") == version_key("v1.0.0")
    assert [next_tag(tag) for tag in ("v1", "1.2", "v1.2.9", "v2-rc1")] == [
        "v2",
        "1.3",
        "v1.2.10",
        "v3",
    ]


@given(st.text(max_size=12))
def test_any_text_is_a_version_or_refused(text: str) -> None:
    try:
        key = version_key(text)
    except UsageError:
        return
    assert version_key(next_tag(text)) > key


def test_the_registry_is_the_users_unless_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OLLATUNE_REGISTRY", str(tmp_path))
    assert default_registry_folder() == tmp_path == ModelRegistry().folder
    monkeypatch.delenv("OLLATUNE_REGISTRY")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    if os.name != "nt":
        assert registry_module.default_registry_folder() == Path("/data/ollatune/registry")
