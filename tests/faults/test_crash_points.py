"""One save broken at each of its system calls; the order of its calls; what a full disk under torch says."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

import pytest
from benchmarks.faulting.crash_points import SaveUnderTrace, can_trace

from ollatune.base.errors import StorageError
from ollatune.checkpoint.format import Checkpoint, read_checkpoint, write_checkpoint
from ollatune.checkpoint.store import CheckpointStore
from ollatune.training import checkpointing
from tests.run_helpers import run, tiny_base, train_command, write_records

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run")
    data = write_records(folder / "data", train=8, validation=2, test=0)
    assert run(train_command(tiny_base(folder), data, folder / "out")) == 0
    return [read_checkpoint(folder / "out" / "checkpoints" / f"epoch_{n}.pt") for n in (1, 2)]


@pytest.fixture
def traced(
    saved: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SaveUnderTrace:
    monkeypatch.setattr(checkpointing, "make_checkpoint", checkpointing.make_checkpoint)
    if not can_trace():
        pytest.skip("no strace, or no right to trace")
    return SaveUnderTrace(tmp_path, *saved)


@linux_only
def test_a_full_disk_is_an_error_of_the_disk(saved: list[Checkpoint]) -> None:
    """torch.save alone says `unexpected pos 64 vs 0`."""
    with Path("/dev/full").open("wb", buffering=0) as stream, pytest.raises(OSError) as found:
        write_checkpoint(saved[0], stream)
    assert found.value.errno == errno.ENOSPC


def test_digest_and_size_are_those_of_the_file(saved: list[Checkpoint], tmp_path: Path) -> None:
    from ollatune.base.files import sha256_file

    store = CheckpointStore(tmp_path, keep_best=1, run_id="r")
    path = store.save(saved[0], "epoch_1.pt")
    assert store.entries[0].sha256 == sha256_file(path)
    assert store.entries[0].size_bytes == path.stat().st_size


def test_a_failed_save_leaves_nothing(
    saved: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(checkpoint: Checkpoint, stream: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("ollatune.checkpoint.store.write_checkpoint", full)
    with pytest.raises(StorageError, match="Disk full while writing"):
        CheckpointStore(tmp_path, keep_best=1, run_id="r").save(saved[0], "epoch_1.pt")
    assert list(tmp_path.iterdir()) == []


def test_files_are_durable_before_their_names_and_names_before_the_index(
    traced: SaveUnderTrace,
) -> None:
    """Each file: fsync, rename, fsync of the folder; checkpoint before index, rotation last."""
    pattern = (
        r"(fsync)\(\d+<([^>]+)>\)|(rename)\(\"([^\"]+)\", \"([^\"]+)\"\)|(unlink)\(\"([^\"]+)\"\)"
    )
    calls = [tuple(filter(None, found)) for found in re.findall(pattern, traced.log())]
    finals = []
    for at, call in enumerate(calls):
        if call[0] != "rename":
            continue
        assert calls[at - 1] == ("fsync", call[1]), "renamed before it was durable"
        assert calls[at + 1] == ("fsync", str(Path(call[2]).parent)), "the name is not durable"
        finals.append(Path(call[2]).name)
    assert finals == ["best_model.pt", "epoch_2.pt", "index.json", "index.json"]
    assert calls[-1][0] == "unlink"
    assert calls[-1][1].endswith("epoch_1.pt")


def test_some_crash_points(traced: SaveUnderTrace) -> None:
    points = traced.crash_points()
    renames = [p for p in points if p.call in ("rename", "unlink")]
    assert len(points) > 50
    assert [traced.attempt(p) for p in renames] == [""] * len(renames)


@pytest.mark.slow
def test_every_crash_point_and_every_full_disk(traced: SaveUnderTrace) -> None:
    points = [*traced.crash_points(), *traced.full_disks()]
    assert [problem for p in points if (problem := traced.attempt(p))] == []
