"""The real torchrun: the specification's command, two nodes, and one message when something fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.process_helpers import NO_DROPOUT, assert_same_losses, with_sizes
from tests.run_helpers import run, steps_of, train_command

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "src" / "models" / "train.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def agent(
    arguments: Sequence[str], output: Path, *, cwd: Path | None = None, fault: str = ""
) -> subprocess.Popen[bytes]:
    """One torchrun; what it and its processes say goes into the file `output`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OLLATUNE_FAULT": fault}
    with output.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip


def ends_with(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=600)
    finally:
        process.kill()
        process.wait()


def test_the_specifications_command(base: Path, data: Path, tmp_path: Path) -> None:
    """Word for word, in a folder as a user has it, but for the port: the default one may be taken here."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "processed").symlink_to(data)
    (tmp_path / "configs" / "model_config.yaml").write_text(
        f"model:\n  base_model: {base}\n  dtype: fp32\n"
        "training:\n  epochs: 1\n  batch_size: 2\n  gradient_accumulation_steps: 1\n"
    )
    command = (
        "--nproc_per_node=4 src/models/train.py --config configs/model_config.yaml "
        "--distributed --output models/trained/"
    )
    arguments = [f"--master_port={free_port()}", *command.split()]
    code = ends_with(agent(arguments, tmp_path / "log", cwd=tmp_path))
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    values = json.loads((tmp_path / "models" / "trained" / "run.json").read_text())
    assert (values["status"], values["processes"]) == ("finished", 4)
    assert log.count("Best model:") == 1
    assert log.count("Done: ") == 1
    assert (tmp_path / "checkpoints" / "epoch_1.pt").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--distributed", "--epochs", "0"], "--epochs: `training.epochs` should be greater than 0"),
        (["--distributed", "--resume", "none.pt"], "There is no checkpoint none.pt"),
        (["--distributed", "--set", "distributed.backend=fsdp", "--set", "training.optimizer=adafactor"],
         "adafactor does not work on sharded weights"),
        ([], "2 processes were started together, but --distributed was not given"),
    ],
)  # fmt: skip
def test_a_mistake_that_all_processes_see_is_told_once(
    base: Path, data: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    command = [*train_command(base, data, tmp_path / "out")[1:], *more]
    arguments = ["--nproc_per_node=2", f"--master_port={free_port()}", SCRIPT, *command]
    code = ends_with(agent(arguments, tmp_path / "log"))
    text = (tmp_path / "log").read_text()
    assert code == 1, text
    errors = re.findall(r"^error: .*$", text.split("Root Cause")[0], flags=re.MULTILINE)
    assert len(errors) == 1, text
    assert said in errors[0]


def two_nodes(
    arguments: list[str], folder: Path, *, faults: tuple[str, str] = ("", "")
) -> list[tuple[int, str]]:
    """Exit code and words of two torchruns on this machine, each with two processes."""
    port = free_port()
    launcher = [
        "--nnodes=2",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    agents = [
        agent(
            [*launcher, f"--node_rank={node}", SCRIPT, *arguments[1:], "--distributed"],
            folder / f"node-{node}",
            fault=faults[node],
        )
        for node in range(2)
    ]
    codes = [ends_with(process) for process in agents]
    return [(code, (folder / f"node-{node}").read_text()) for node, code in enumerate(codes)]


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_two_nodes_are_one_process(base: Path, data: Path, tmp_path: Path, backend: str) -> None:
    single = with_sizes(train_command(base, data, tmp_path / "single", *NO_DROPOUT), 2, 4)
    assert run(single) == 0
    command = with_sizes(train_command(base, data, tmp_path / "out", *NO_DROPOUT), 2, 1)
    results = two_nodes([*command, "--set", f"distributed.backend={backend}"], tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    assert_same_losses(steps_of(tmp_path / "single"), steps_of(tmp_path / "out"))
    assert "Best model" in results[0][1]
    assert "Training" not in results[1][1], "the second node says nothing"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 4


def test_an_error_on_the_second_node_ends_both_with_one_message(
    base: Path, data: Path, tmp_path: Path
) -> None:
    command = train_command(base, data, tmp_path / "out", *NO_DROPOUT)
    results = two_nodes(command, tmp_path, faults=("", "train.micro_batch:enospc@2"))
    assert all(code != 0 for code, _ in results), results
    text = "".join(words for _, words in results)
    said = re.findall(r"^error: .*$", text, flags=re.MULTILINE)
    assert len(said) == 1, text
    assert "No space left on device" in said[0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_message(
    base: Path, data: Path, tmp_path: Path, rank: int
) -> None:
    """A process that is killed says nothing; another one says that it is gone."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import os, runpy, sys\n"
        f"os.environ['OLLATUNE_FAULT'] = 'train.step:kill@3' if os.environ['RANK'] == '{rank}' else ''\n"
        f"sys.argv[0] = {SCRIPT!r}\n"
        f"sys.path[0] = {str(ROOT / 'src')!r}\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    )
    command = train_command(base, data, tmp_path / "out", *NO_DROPOUT)
    arguments = ["--nproc_per_node=3", f"--master_port={free_port()}", str(wrapper), *command[1:]]
    code = ends_with(agent([*arguments, "--distributed"], tmp_path / "log"))
    text = (tmp_path / "log").read_text()
    assert code == 1, text
    own = text.split("Root Cause")[0]
    assert len(re.findall(r"^error: .*$", own, flags=re.MULTILINE)) == 1, text
    assert "another process of this run" in text
