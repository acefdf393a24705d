"""What breaks during training ends as it should; the great numbers are in benchmarks/faults.py."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ollatune.base.errors import InputError
from ollatune.checkpoint.format import read_checkpoint, write_checkpoint
from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.training.run_folder import MetricsLog, RunFolder
from tests.run_helpers import (
    assert_same_weights,
    inject,
    last,
    run,
    steps_of,
    train_command,
)

ROOT = Path(__file__).resolve().parents[2]


def command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Four steps, a checkpoint at each second one."""
    return train_command(base, data, output, "--set", "validation.samples=0", *more)


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run(command(base, data, output)) == 0
    return output


def test_nan_stops_before_the_update(
    base: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inject("train.loss:nan@3"):
        assert run(command(base, data, tmp_path)) == 6
    assert "Not finite at step 3" in capsys.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "diverged"
    assert newest_checkpoint(tmp_path / "checkpoints")[1].is_finite()
    assert run(command(base, data, tmp_path, "--resume", "auto")) == 0
    assert_same_weights(last(whole), last(tmp_path))
    assert steps_of(tmp_path) == steps_of(whole)


def test_an_infinite_gradient_stops_before_the_update(
    base: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    with inject("train.gradient:nan@2"):
        assert run(command(base, data, tmp_path)) == 6
    assert run(command(base, data, tmp_path, "--overwrite")) == 0
    assert_same_weights(last(whole), last(tmp_path))


def test_nan_is_skipped_and_counted(base: Path, data: Path, tmp_path: Path) -> None:
    with inject("train.loss:nan@2"):
        assert run(command(base, data, tmp_path, "--set", "training.on_non_finite=skip")) == 0
    values = json.loads((tmp_path / "run.json").read_text())
    assert (values["steps"], values["skipped_steps"]) == (4, 1)
    assert [step["step"] for step in steps_of(tmp_path)] == [1, 3, 4]


def test_too_many_skips_in_a_row_stop(base: Path, data: Path, tmp_path: Path) -> None:
    faults = ",".join(f"train.loss:nan@{n}" for n in (1, 2, 3, 4))
    with inject(faults):
        assert run(command(base, data, tmp_path, "--set", "training.on_non_finite=skip")) == 6


def test_nan_rolls_back_leaves_the_batch_out_and_halves_the_rate(
    base: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    with inject("train.loss:nan@4"):
        assert run(command(base, data, tmp_path, "--set", "training.on_non_finite=rollback")) == 0
    values = json.loads((tmp_path / "run.json").read_text())
    assert (values["steps"], values["rollbacks"]) == (4, 1)
    steps, plain = steps_of(tmp_path), steps_of(whole)
    assert [step["step"] for step in steps] == [1, 2, 3]  # nothing twice, the fourth left out
    assert steps[:2] == plain[:2]
    assert steps[2]["learning_rate"] == pytest.approx(plain[2]["learning_rate"] / 2)


def test_nothing_to_roll_back_to(base: Path, data: Path, tmp_path: Path) -> None:
    with inject("train.loss:nan@1"):
        assert run(command(base, data, tmp_path, "--set", "training.on_non_finite=rollback")) == 6


def test_out_of_memory_is_the_run_with_half_the_size(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Dropout and all: bit by bit, and a resume remembers."""
    half = command(
        base, data, tmp_path / "half", "--batch-size", "1", "--gradient-accumulation-steps", "4"
    )
    assert run(half) == 0
    with inject("train.micro_batch:oom@2,train.step:interrupt@3"):
        assert run(command(base, data, tmp_path / "oom")) == 130
    assert run(command(base, data, tmp_path / "oom", "--resume", "auto")) == 0
    assert steps_of(tmp_path / "half") == steps_of(tmp_path / "oom")
    assert_same_weights(last(tmp_path / "half"), last(tmp_path / "oom"))
    assert read_checkpoint(last(tmp_path / "oom")).resume["state"]["split"] == 2


def test_out_of_memory_with_one_example(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inject("train.micro_batch:oom@1,train.micro_batch:oom@2"):
        assert run(command(base, data, tmp_path)) == 7
    message = capsys.readouterr().err
    assert "model.quantization=as-served" in message
    assert re.search(r"Memory: base \d.*, trained \d.*, peak \d", message), message


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("train.build:oom@1", "error: Out of memory. "),
        ("train.update:oom@3", "error: Out of memory in the update. "),
        ("train.validate:oom@2", "error: Out of memory in the validation after step 4. "),
        ("train.answer:oom@2", "error: Out of memory in the validation after step 4. "),
    ],
)
def test_out_of_memory_elsewhere(
    base: Path, data: Path, whole: Path, tmp_path: Path, fault: str, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing can be halved there: the run ends with a word on what to change, and nothing done is lost."""
    samples = ["--set", "validation.samples=1"]
    with inject(fault):
        assert run(command(base, data, tmp_path, *samples)) == 7
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    again = [] if "build" in fault else ["--resume", "auto"]
    if "validation" in said:
        assert read_checkpoint(tmp_path / "checkpoints" / "step_4.pt").step == 4
        again += ["--set", "validation.batch_size=1"]
    assert run(command(base, data, tmp_path, *again)) == 0
    assert steps_of(tmp_path) == steps_of(whole)
    assert_same_weights(last(whole), last(tmp_path))


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the disk fills up in the middle of a line."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    stream = log._stream

    class Full:
        room = 5

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written, self.room = stream.write(content[: self.room]), 0
            return written

    monkeypatch.setattr(log, "_stream", Full())
    for step in (2, 3):
        log.write({"step": step})
    monkeypatch.setattr(log, "_stream", stream)
    for step in (4, 5):
        log.write({"step": step})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1}', '{"ste', '{"step": 4}', '{"step": 5}'
    ]  # fmt: skip
    assert caplog.text.count("Cannot write") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_without_any_room_closes(tmp_path: Path) -> None:
    log = MetricsLog(Path("/dev/full"))
    log.write({"step": 1})
    log.close()


@pytest.mark.parametrize("point", ["save.before_best", "save.before_checkpoint"])
def test_disk_full_in_the_second_save(
    base: Path, data: Path, whole: Path, tmp_path: Path, point: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with inject(f"{point}:enospc@2"):
        assert run(command(base, data, tmp_path)) == 5
    assert "Disk full while writing" in capsys.readouterr().err
    first = (tmp_path / "checkpoints" / "epoch_1.pt").read_bytes()
    assert run(command(base, data, tmp_path, "--resume", "auto")) == 0
    assert (tmp_path / "checkpoints" / "epoch_1.pt").read_bytes() == first
    assert_same_weights(last(whole), last(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="other locks")
def test_the_second_run_in_a_folder_names_the_first(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path).lock():
        assert run(command(base, data, tmp_path)) == 8
    message = capsys.readouterr().err
    assert re.search(rf"is in use by process {os.getpid()} on \S+, started 20\d\d-", message)
    assert run(command(base, data, tmp_path, "--max-steps", "1")) == 0


def test_every_flipped_bit_is_noticed(whole: Path, tmp_path: Path) -> None:
    content = last(whole).read_bytes()
    index = (whole / "checkpoints" / "index.json").read_bytes()
    for place in range(0, len(content), len(content) // 12):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "index.json").write_bytes(index)
        (folder / "epoch_1.pt").write_bytes((whole / "checkpoints" / "epoch_1.pt").read_bytes())
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (folder / "epoch_2.pt").write_bytes(bytes(damaged))
        said: list[str] = []
        path, checkpoint = newest_checkpoint(folder, report=said.append)
        assert (path.name, checkpoint.epoch, len(said)) == ("epoch_1.pt", 1, 1), place
        assert (folder / "corrupt-epoch_2.pt").is_file()


def test_every_flipped_bit_of_the_index_is_noticed(whole: Path, tmp_path: Path) -> None:
    """The step that it gives a checkpoint would otherwise make an older one the newest."""
    source = whole / "checkpoints"
    content = (source / "index.json").read_bytes()
    for name in ("epoch_1.pt", "epoch_2.pt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    entries = CheckpointStore(source, keep_best=1, run_id="").entries
    assert len(entries) == 2
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        (tmp_path / "index.json").write_bytes(bytes(damaged))
        found = CheckpointStore(tmp_path, keep_best=1, run_id="").entries
        assert found == [] or found == entries, bytes(damaged)  # white space may change
        assert newest_checkpoint(tmp_path)[0].name == "epoch_2.pt"


def test_an_index_of_an_earlier_version_has_no_digest(whole: Path, tmp_path: Path) -> None:
    content = json.loads((whole / "checkpoints" / "index.json").read_bytes())
    del content["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert len(CheckpointStore(tmp_path, keep_best=1, run_id="").entries) == 2


def test_verify_lists_every_damaged_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    assert run(["verify", "--checkpoint", folder, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert rows == [
        {"file": "epoch_1.pt", "step": 2, "epoch": 1},
        {"file": "epoch_2.pt", "step": 4, "epoch": 2},
    ]
    for name in ("epoch_1.pt", "epoch_2.pt"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))
    before = sorted(path.name for path in folder.iterdir())
    assert run(["verify", "--checkpoint", folder]) == 3
    message = capsys.readouterr().err
    assert "epoch_1.pt is damaged" in message
    assert "epoch_2.pt is damaged" in message
    assert sorted(path.name for path in folder.iterdir()) == before
    assert run(["verify", "--checkpoint", tmp_path]) == 3
    assert "There is no checkpoint in" in capsys.readouterr().err


def test_a_save_again_after_the_clock_was_set_back_counts(whole: Path, tmp_path: Path) -> None:
    """Killed between the renames of checkpoint and index, the file is whole and its time before the index's."""
    folder = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    later = read_checkpoint(folder / "epoch_2.pt")
    later.timestamp, later.train_loss = "1999-01-01T00:00:00.000000+00:00", 0.125
    with (folder / "epoch_2.pt").open("wb") as stream:
        write_checkpoint(later, stream)
    path, found = newest_checkpoint(folder)
    assert (path.name, found.train_loss) == ("epoch_2.pt", 0.125)


def test_all_checkpoints_damaged(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pt").write_bytes(last(whole).read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path, report=lambda text: None)


def test_a_half_written_line_of_metrics_is_repaired(
    base: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    with inject("train.step:interrupt@3"):
        assert run(command(base, data, tmp_path)) == 130
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"type": "step", "step": 4, "lo')
    assert run(command(base, data, tmp_path, "--resume", "auto")) == 0
    assert steps_of(tmp_path) == steps_of(whole)


@pytest.mark.slow
def test_a_tenth_of_the_faults_benchmark() -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "faults.py")],
        env=os.environ | {"FAULTS": "quick"}, capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip
    results = json.loads(finished.stdout.splitlines()[-1])
    assert {goal: result["failed"] for goal, result in results.items()} == dict.fromkeys(results, 0)
    assert len(results) in (17, 19)  # without and with strace
