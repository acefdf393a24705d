"""Ctrl-C and SIGTERM outside the training steps: the stated code, a word on how to go on, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ollatune.base.signals import StopSignal, first_signal, handling, raise_stop
from tests.invariant.test_torchrun import SCRIPT, agent, ends_with, free_port
from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    train_command,
)

Capture = pytest.CaptureFixture[str]
BOTH = pytest.mark.parametrize(("action", "code"), [("interrupt", 130), ("terminate", 143)])


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run(train_command(base, data, output)) == 0
    return output


def last(output: Path) -> Path:
    return output / "checkpoints" / "epoch_2.pt"


@BOTH
@pytest.mark.parametrize("point", ["data.record", "train.build"])
def test_before_the_first_step(
    base: Path, data: Path, whole: Path, tmp_path: Path, point: str, action: str, code: int,
    capsys: Capture,
) -> None:  # fmt: skip
    command = train_command(base, data, tmp_path)
    with inject(f"{point}:{action}@1"):
        assert run(command) == code
    name = {"interrupt": "Ctrl-C", "terminate": "SIGTERM"}[action]
    assert f"error: Stopped by {name} before the first step" in capsys.readouterr().err
    assert run(command) == 0, "the same command again"
    assert_same_weights(last(whole), last(tmp_path))


def test_in_the_first_step_there_is_nothing_to_save(
    base: Path, data: Path, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The signal that comes when run.json is there and a checkpoint is not."""
    command = train_command(base, data, tmp_path)
    with inject("train.step:kill@99"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ollatune.training.interrupts.first_signal", lambda: int(signal.SIGTERM)
        )  # as if it had come just before the loop
        assert run(command) == 143
    assert "Run the same command again." in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert run(command) == 0
    assert_same_weights(last(whole), last(tmp_path))


@BOTH
@pytest.mark.parametrize("point", ["train.validate", "train.answer"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_validation_is_left_and_done_again(
    base: Path, data: Path, whole: Path, tmp_path: Path, point: str, at: int, action: str, code: int,
) -> None:  # fmt: skip
    with inject(f"{point}:{action}@{at}"):
        assert run(train_command(base, data, tmp_path)) == code
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line["type"] == "validation"] == [2, 4][: at - 1]
    assert (tmp_path / "checkpoints" / f"step_{2 * at}.pt").is_file()
    assert run(train_command(base, data, tmp_path, "--resume", "auto")) == 0
    assert_same_weights(last(whole), last(tmp_path))
    assert steps_of(tmp_path) == steps_of(whole)
    for name in ("samples.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@BOTH
def test_during_export(
    whole: Path, tmp_path: Path, action: str, code: int, capsys: Capture
) -> None:
    command = ["create-modelfile", "--checkpoint", whole / "best_model.pt", "--output", tmp_path]
    (tmp_path / ".staging-model.gguf.999999999.ab").write_bytes(b"of a killed export")
    with inject(f"export.tensor:{action}@3"):
        assert run(command) == code
    assert "Run the same command again." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(command) == 0
    assert (tmp_path / "model.gguf").is_file()


@BOTH
def test_during_preprocess(data: Path, tmp_path: Path, action: str, code: int) -> None:
    command = ["preprocess", data / "train.jsonl", "--output", tmp_path / "out"]
    with inject(f"data.record:{action}@10"):  # in the second reading
        assert run(command) == code
    assert list((tmp_path / "out").iterdir()) == []
    assert run(command) == 0


@BOTH
@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_one_tells(
    data: Path, tmp_path: Path, rank: str, action: str, code: int, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A launcher ends the others with a signal when one has said what is wrong."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with inject(f"data.record:{action}@1"):
        assert run(["preprocess", data / "train.jsonl", "--output", tmp_path / "out"]) == code
    assert ("Stopped by" in capsys.readouterr().err) == (rank == "0")


def test_one_that_is_swallowed_stops_the_loop_all_the_same(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """A library may let no exception out, such as in a destructor: the loop sees that a signal has come."""

    class Swallowing:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        from ollatune.training import session

        def build_run(*arguments: object) -> object:
            item = Swallowing()
            del item
            return original(*arguments)

        original = session.build_run
        patch.setattr(session, "build_run", build_run)
        patch.setattr(sys, "unraisablehook", lambda unraisable: None)
        assert run(train_command(base, data, tmp_path)) == 143


def test_handlers_are_put_back_and_count_signals_together() -> None:
    before = signal.getsignal(signal.SIGTERM)
    noted: list[int] = []
    with handling(raise_stop):
        with handling(noted.append):
            signal.raise_signal(signal.SIGTERM)
            assert noted == [signal.SIGTERM]
        assert first_signal() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert first_signal() is None
    with pytest.raises(StopSignal) as found, handling(raise_stop):
        signal.raise_signal(signal.SIGINT)
    assert found.value.exit_code == 130
    ran: list[bool] = []

    def elsewhere() -> None:
        with handling(raise_stop):
            ran.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ran == [True], "signals never arrive in other threads"


@pytest.fixture
def many_records(tmp_path: Path) -> Path:
    """Enough for the cache on disk and its workers."""
    folder = tmp_path / "many"
    folder.mkdir()
    record = json.dumps({"instruction": "Count.", "response": "one two three " * 400}) + "\n"
    (folder / "train.jsonl").write_text(record * (70_000_000 // len(record)))
    return folder


def wait_for(condition: object, process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + 240
    assert callable(condition)
    while not condition():
        assert process.poll() is None, f"it ended before {what}"
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_workers_of_a_cache_end_with_it(
    base: Path, many_records: Path, tmp_path: Path, number: signal.Signals
) -> None:
    cache = tmp_path / "cache"
    command = train_command(base, many_records, tmp_path / "out", "--max-steps", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "ollatune", *command],
        env=os.environ | {"OLLATUNE_CACHE": str(cache)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(lambda: list(cache.rglob(".staging-chunk-*")), process, "workers write")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, errors.decode()
    assert b"before the first step" in errors
    assert b"Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    for manifest in cache.rglob("chunk-*.json"):
        assert manifest.with_suffix(".tokens").is_file()


@pytest.fixture
def orphans() -> Iterator[list[psutil.Process]]:
    found: list[psutil.Process] = []
    yield found
    for process in found:
        if process.is_running():
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the first step", "in training"])
def test_sigterm_to_the_launcher_of_two(
    base: Path, data: Path, tmp_path: Path, moment: str, orphans: list[psutil.Process]
) -> None:
    """One checkpoint, one word, no process left, and it goes on."""
    output = tmp_path / "out"
    command = train_command(
        base, data, output, "--epochs", "100000", "--set", "validation.samples=0",
        "--set", "training.keep_checkpoints=1",
    )  # fmt: skip
    launcher = ["--nproc_per_node=2", f"--master_port={free_port()}", SCRIPT]
    process = agent([*launcher, *command[1:], "--distributed"], tmp_path / "log")
    log, metrics = tmp_path / "log", output / "metrics.jsonl"
    if moment == "in training":
        wait_for(
            lambda: metrics.exists() and metrics.read_text().count('"step"') > 5, process, "steps"
        )
    else:
        wait_for(lambda: "Base model" in log.read_text(), process, "the base is read")
    orphans += psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert ends_with(process) != 0
    _, alive = psutil.wait_procs(orphans, timeout=20)
    assert not alive
    text = log.read_text()
    said = [line for line in text.splitlines() if "error: Stopped " in line]
    assert len(said) == 1, text
    # torchrun shows its own traceback for the signal; ours have our files in them
    assert "src/ollatune/" not in text
    if moment == "in training":
        step = int(said[0].split("after step ")[1].split()[0])
        # An epoch's checkpoint or a step's: the signal may come while either is due.
        index = json.loads((output / "checkpoints" / "index.json").read_text())["checkpoints"]
        assert [entry["step"] for entry in index if entry["step"] >= step] == [step], text
        more = ["--resume", "auto", "--max-steps", str(step + 2), "--set", "training.epochs=100000"]
        assert run([*command, *more]) == 0
