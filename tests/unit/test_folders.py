"""Folders of the user's, also for users that have no home."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ollatune.base import folders
from ollatune.base.folders import expanded, home_folder, user_cache_folder
from ollatune.data.sources import find_files
from ollatune.ollama.store import store_roots

pwd = pytest.importorskip("pwd")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user who is in no list of users, as in containers that are given any number; its temporary files' folder."""

    def nobody(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "OLLATUNE_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders._own_temporary_folder.cache_clear()
    yield tmp_path
    folders._own_temporary_folder.cache_clear()


def test_a_user_without_a_home_gets_a_folder_of_their_own(no_home: Path) -> None:
    home = home_folder()
    assert home == no_home / f"ollatune-{os.getuid()}"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert user_cache_folder() == home / ".cache" / "ollatune"
    assert home / ".ollama" / "models" in store_roots()


@pytest.mark.parametrize("trap", ["a link", "open to all", "another's"])
def test_a_folder_that_somebody_else_put_there_is_not_taken(
    no_home: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled programs lie in the cache: whoever can write there could have their own run."""
    path = no_home / f"ollatune-{os.getuid()}"
    if trap == "a link":
        (no_home / "theirs").mkdir()
        path.symlink_to(no_home / "theirs")
    else:
        path.mkdir()
        path.chmod(0o777 if trap == "open to all" else 0o700)
    if trap == "another's":
        uid = os.getuid()
        path = path.rename(no_home / f"ollatune-{uid + 1}")
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    home = home_folder()
    assert home != path
    assert stat.S_IMODE(home.lstat().st_mode) == 0o700
    assert home_folder() == home, "the same for the whole process"


def test_names_that_begin_like_a_home_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~records.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    assert expanded("~records.jsonl") == Path("~records.jsonl")
    assert [file.path.name for file in find_files("~records.jsonl")] == ["~records.jsonl"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x"
