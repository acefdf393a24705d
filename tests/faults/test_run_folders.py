"""Folders that cannot be written, strange paths, and clocks that jump."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollatune.base.errors import StorageError
from ollatune.base.files import require_writable
from ollatune.base.signals import StopSignal
from ollatune.checkpoint.store import newest_checkpoint
from tests.run_helpers import run, train_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and mounts")


@pytest.mark.parametrize("which", ["output", "checkpoints", "logs"])
@pytest.mark.parametrize("place", ["nobody can write here", "a file is here"])
def test_a_folder_that_cannot_be_written_ends_the_run_before_anything_is_loaded(
    base: Path, data: Path, tmp_path: Path, which: str, place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path("/proc/self/ollatune")
    if place == "a file is here":
        folder = tmp_path / "file" / "folder"
        folder.parent.write_text("")
    command = train_command(base, data, tmp_path / "out")
    if which == "output":
        command[command.index("--output") + 1] = str(folder)
        command[command.index(f"output.logs={tmp_path / 'out' / 'logs'}")] = (
            f"output.logs={tmp_path}"
        )
    else:
        command += ["--set", f"output.{which}={folder}"]
    assert run(command) == StorageError.exit_code
    said = capsys.readouterr().err
    assert str(folder.parent) in said
    assert "Base model" not in said


@pytest.mark.parametrize("moment", ["touch", "unlink"])
def test_a_signal_while_a_folder_is_tried_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    original, seen = getattr(Path, moment), []

    def interrupted(path: Path, **arguments: bool) -> None:
        if moment == "touch":
            original(path, **arguments)
        if not seen:
            seen.append(path.name)
            raise StopSignal(signal.SIGTERM)
        original(path, **arguments)

    monkeypatch.setattr(Path, moment, interrupted)
    with pytest.raises(StopSignal):
        require_writable(tmp_path)
    assert seen
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system mounted read-only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system(read_only: Path) -> None:
    with pytest.raises(StorageError, match="Read-only file system"):
        require_writable(read_only)


@pytest.mark.parametrize(
    "name",
    ["with spaces", "trailing.", "-leading", "naïve-é", "naïve-e\u0301", "数据", "a'b\"c", "x" * 200,
     "~tilde", "{brace}"],
)  # fmt: skip
def test_strange_paths(base: Path, data: Path, tmp_path: Path, name: str) -> None:
    """Base, data, output and logs below them; a resume finds its way back."""
    folder = tmp_path / name
    shutil.copytree(data, folder / "data")
    model = shutil.copy(base, folder / "base.gguf")
    command = train_command(Path(model), folder / "data", folder / "out")
    assert run([*command, "--max-steps", "2"]) == 0
    assert run([*command, "--resume", "auto", "--max-steps", "4"]) == 0
    assert (folder / "out" / "checkpoints" / "epoch_2.pt").is_file()


def test_the_newest_is_told_by_its_step_not_by_any_clock(
    base: Path, data: Path, tmp_path: Path
) -> None:
    assert run(train_command(base, data, tmp_path)) == 0
    folder = tmp_path / "checkpoints"
    os.utime(folder / "epoch_1.pt", (4e9, 4e9))  # 2096
    os.utime(folder / "epoch_2.pt", (0, 0))  # 1970
    assert newest_checkpoint(folder)[0].name == "epoch_2.pt"
    (folder / "index.json").unlink()
    assert newest_checkpoint(folder)[0].name == "epoch_2.pt"
