"""Who owns a folder: told by the operating system's lock, or by a file where there are no such locks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollatune.base import locks
from ollatune.base.errors import LockedError
from ollatune.base.locks import LocksUnsupportedError, own_folder, refuse_owned, try_lock

fcntl = pytest.importorskip("fcntl")
NAME = ".run.lock"
DEAD = {"pid": 4_194_305, "host": socket.gethostname(), "started": "2020-01-01T00:00:00+00:00"}
"""A process number that Linux never gives."""


@pytest.fixture(params=["system", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Locks of the operating system, or a file system that has none."""
    if request.param == "file":

        def unsupported(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", unsupported)
    return request.param


def holder(kind: str, folder: Path) -> Path:
    return folder / (NAME if kind == "system" else f"{NAME}.owner")


def test_the_second_is_told_who_the_first_is(kind: str, tmp_path: Path) -> None:
    with own_folder(tmp_path, NAME):
        for ask in (own_folder(tmp_path, NAME).__enter__, lambda: refuse_owned(tmp_path, NAME)):
            with pytest.raises(LockedError) as found:
                ask()
            host = re.escape(socket.gethostname())
            assert re.search(
                rf"in use by process {os.getpid()} on {host}, started 20\d\d-.*\+00:00\.",
                found.value.message,
            )
    refuse_owned(tmp_path, NAME)
    with own_folder(tmp_path, NAME):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("boot", ["this", "another"])
def test_what_a_dead_process_held_is_taken_over_with_a_note(
    kind: str, tmp_path: Path, boot: str, caplog: pytest.LogCaptureFixture
) -> None:
    owner = DEAD | {"boot": locks._boot_id()}
    if boot == "another":
        owner |= {"boot": "before the machine started anew", "pid": os.getpid()}
    holder(kind, tmp_path).write_text(json.dumps(owner))
    refuse_owned(tmp_path, NAME)
    with caplog.at_level("WARNING"), own_folder(tmp_path, NAME):
        assert json.loads(holder(kind, tmp_path).read_text())["started"] > "2026"
    assert f"The run before, process {owner['pid']} on" in caplog.text
    caplog.clear()
    with own_folder(tmp_path, NAME):
        pass
    assert caplog.text == "", "one that ended well leaves nothing to take over"


def test_nobody_knows_whether_a_process_of_another_machine_is_alive(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "")))
        owner = DEAD | {"host": "elsewhere", "boot": "b"}
        holder("file", tmp_path).write_text(json.dumps(owner))
        with (
            pytest.raises(LockedError, match="on elsewhere, started 2020"),
            own_folder(tmp_path, NAME),
        ):
            pass


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path: Path) -> None:
    owner = DEAD | {"pid": os.getppid(), "boot": locks._boot_id()}
    (tmp_path / NAME).write_text(json.dumps(owner))
    refuse_owned(tmp_path, NAME)  # the lock itself is free


def test_a_file_system_without_locks_is_not_a_locked_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (tmp_path / "x").open("w") as stream, pytest.raises(LocksUnsupportedError):
        try_lock(stream.fileno())


def _race(folder: Path, start: object, owners: object) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "")

    fcntl.flock = unsupported
    start.wait()  # type: ignore[attr-defined]
    try:
        with own_folder(folder, NAME):
            owners.put(os.getpid())  # type: ignore[attr-defined]
            start.wait()  # type: ignore[attr-defined]
    except LockedError:
        owners.put(0)  # type: ignore[attr-defined]
        start.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("before", ["nobody", "a dead process"])
def test_one_of_six_that_start_together(tmp_path: Path, before: str) -> None:
    """Without locks of the system, whether or not there is something to take over."""
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if before == "a dead process":
            owner = DEAD | {"boot": locks._boot_id()}
            holder("file", folder).write_text(json.dumps(owner))
        start, owners = context.Barrier(6), context.SimpleQueue()
        racers = [context.Process(target=_race, args=(folder, start, owners)) for _ in range(6)]
        for racer in racers:
            racer.start()
        found = [owners.get() for _ in racers]
        for racer in racers:
            racer.join()
        assert sum(pid > 0 for pid in found) == 1, found
