"""FSDP2 with gloo processes is one process: losses, norms, checkpoints at any number of processes, one export."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ollatune.base.errors import InputError
from ollatune.checkpoint.format import read_checkpoint
from ollatune.checkpoint.store import load_checkpoint, newest_checkpoint
from tests.process_helpers import (
    METHODS,
    assert_same_losses,
    launch,
    method_command,
    single_runs,
    started,
)
from tests.run_helpers import (
    assert_same_weights,
    run,
    steps_of,
)

pytestmark = pytest.mark.slow
FSDP = ("--set", "distributed.backend=fsdp")


@pytest.fixture(scope="module")
def single(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return single_runs(METHODS, base, data, tmp_path_factory)


def start(
    count: int, arguments: list[str], *, code: int = 0, faults: dict[int, str] | None = None
) -> None:
    errors = started(count, arguments, code=code, faults=faults)
    assert errors[1:] == [""] * (count - 1), errors  # only the first one speaks
    assert errors[0].count("error: ") == bool(code), errors


def assert_same_weights_nearly(left: Path, right: Path) -> None:
    first, second = read_checkpoint(left).model_state_dict, read_checkpoint(right).model_state_dict
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("method", "count"),
    [("lora", 4), ("full", 2), ("packed", 2), ("dora", 2)],
)
def test_processes_with_parts_are_one_with_the_whole(
    base: Path, data: Path, single: dict[str, Path], tmp_path: Path, method: str, count: int
) -> None:
    start(count, method_command(base, data, tmp_path / "out", method, count, *FSDP))
    assert_same_losses(steps_of(single[method]), steps_of(tmp_path / "out"))
    assert_same_weights_nearly(single[method] / "best_model.pt", tmp_path / "out" / "best_model.pt")
    samples = [
        (folder / "samples.jsonl").read_text() for folder in (single[method], tmp_path / "out")
    ]
    assert samples[0] == samples[1]
    shards = tmp_path / "out" / "checkpoints" / "epoch_2.shards"
    parts = sorted(path.stat().st_size for path in shards.glob("*.distcp"))
    assert len(parts) == count
    assert parts[0] > parts[-1] / 3, "every process keeps its share of weights and optimiser state"
    assert not (shards / ".metadata").exists()


def test_sharded_checkpoints_go_on_with_another_number_of_processes(
    base: Path, data: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    """Two processes, then four, then two again: parts are split and joined."""
    arguments = method_command(base, data, tmp_path / "out", "full", 2, *FSDP)
    start(2, arguments, code=143, faults={0: "train.step:terminate@2"})
    start(4, [*arguments, "--resume", "auto"], code=143, faults={0: "train.step:terminate@2"})
    start(2, [*arguments, "--resume", "auto"])
    assert_same_losses(steps_of(single["full"]), steps_of(tmp_path / "out"))


def test_one_process_and_other_backends_go_on_from_shards_and_back(
    base: Path, data: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    arguments = method_command(base, data, tmp_path / "out", "lora", 2, *FSDP)
    start(2, arguments, code=143, faults={1: "train.step:terminate@2"})
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "out", copy)
    checkpoints = ["--resume", str(next((copy / "checkpoints").glob("step_*.shards")))]
    alone = method_command(base, data, copy, "lora", 2)
    assert run([*alone, *checkpoints]) == 0
    assert_same_losses(steps_of(single["lora"]), steps_of(copy))
    start(2, [*alone, "--resume", str(copy / "checkpoints" / "epoch_1.pt"), *FSDP])
    assert_same_losses(steps_of(single["lora"]), steps_of(copy))


@pytest.fixture(scope="module")
def sharded(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded")
    start(2, method_command(base, data, output, "lora", 2, *FSDP))
    return output


def test_the_same_number_of_processes_goes_on_bit_by_bit(
    base: Path, data: Path, sharded: Path, tmp_path: Path
) -> None:
    arguments = method_command(base, data, tmp_path / "out", "lora", 2, *FSDP)
    start(2, arguments, code=143, faults={1: "train.step:terminate@4"})
    start(2, [*arguments, "--resume", "auto"])
    assert steps_of(sharded) == steps_of(tmp_path / "out")
    assert_same_weights(sharded / "best_model.pt", tmp_path / "out" / "best_model.pt")


def test_both_kinds_of_checkpoint_are_exported_unchanged(
    sharded: Path, single: dict[str, Path], tmp_path: Path
) -> None:
    for number, checkpoint in enumerate(
        (sharded / "best_model.pt", sharded / "checkpoints" / "epoch_2.shards")
    ):
        output = tmp_path / str(number)
        assert run(["create-modelfile", "--checkpoint", checkpoint, "--output", output]) == 0
        assert (output / "model.gguf").is_file()
    first, second = ((tmp_path / n / "model.gguf").read_bytes() for n in "01")
    assert first == second, "the last epoch is the best one here"
    assert (sharded / "adapter_model.safetensors").stat().st_size == (
        single["lora"] / "adapter_model.safetensors"
    ).stat().st_size


def test_every_damaged_file_is_noticed_and_the_one_before_is_taken(
    sharded: Path, tmp_path: Path
) -> None:
    names = [path.name for path in (sharded / "checkpoints" / "epoch_2.shards").iterdir()]
    assert len(names) == 5
    for name in names:
        folder = tmp_path / name
        shutil.copytree(sharded / "checkpoints", folder)
        path = folder / "epoch_2.shards" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(bytes(content))
        said: list[str] = []
        found, checkpoint = newest_checkpoint(folder, report=said.append)
        assert (found.name, checkpoint.epoch, len(said)) == ("epoch_1.shards", 1, 1), name
        assert (folder / "corrupt-epoch_2.shards").is_dir()


def test_nothing_in_a_sharded_checkpoint_is_unpickled_freely(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plain unpickler gone, a sharded checkpoint still loads: it needs none."""

    def forbidden(*_: object, **__: object) -> object:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    checkpoint = load_checkpoint(sharded / "checkpoints" / "epoch_2.shards")
    assert checkpoint.model_state_dict
    assert checkpoint.optimizer_state_dict["state"][0]["step"] == 6


def test_a_layout_cannot_lead_out_of_its_folder(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "epoch_2.shards"
    shutil.copytree(sharded / "checkpoints" / "epoch_2.shards", folder)
    layout = folder / "layout.json"
    layout.write_text(layout.read_text().replace("__0_0.distcp", "../__0_0.distcp"))
    from ollatune.checkpoint.shards import write_manifest

    write_manifest(folder)
    with pytest.raises(InputError, match="is not the name of a part"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("rank", "point"),
    [
        (1, "save.part:kill@2"),
        (0, "save.before_rename:kill@2"),
        (0, "save.after_checkpoint:kill@2"),
    ],
)
def test_a_kill_in_a_sharded_save_leaves_a_whole_checkpoint(
    base: Path, data: Path, tmp_path: Path, rank: int, point: str
) -> None:
    arguments = method_command(base, data, tmp_path / "out", "lora", 2, *FSDP)
    results = launch(2, arguments, faults={rank: point})
    assert results[rank][0] == -9, results
    assert results[1 - rank][0] != 0, results
    found, checkpoint = newest_checkpoint(tmp_path / "out" / "checkpoints", with_tensors=False)
    expected = "epoch_2.shards" if "after" in point else "epoch_1.shards"
    assert found.name == expected
    assert checkpoint.resume["state"]["step"] == (6 if "after" in point else 3)
    assert [p.name for p in found.parent.glob(".*")] == [], "no staging is left"


def test_a_full_disk_on_one_process_ends_all_and_keeps_the_earlier(
    base: Path, data: Path, tmp_path: Path
) -> None:
    arguments = method_command(base, data, tmp_path / "out", "lora", 2, *FSDP)
    results = launch(2, arguments, faults={1: "save.part:enospc@2"})
    assert [code for code, _ in results] == [5, 5], results
    messages = [error for _, error in results if "cannot write its part" in error]
    assert len(messages) == 1, results
    assert "Process 1" in messages[0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[0].name == "epoch_1.shards"


def test_a_replaced_folder_is_put_back_after_a_kill(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded / "checkpoints", tmp_path / "c")
    (tmp_path / "c" / "epoch_2.shards").rename(tmp_path / "c" / ".replaced-epoch_2.shards")
    assert newest_checkpoint(tmp_path / "c", with_tensors=False)[0].name == "epoch_2.shards"


def test_out_of_memory_and_not_finite_end_all(base: Path, data: Path, tmp_path: Path) -> None:
    arguments = method_command(base, data, tmp_path / "oom", "lora", 2, *FSDP)
    results = launch(2, arguments, faults={1: "train.micro_batch:oom@2"})
    assert 7 in [code for code, _ in results], results
    assert sum("Out of memory in the middle" in error for _, error in results) == 1
    arguments = method_command(base, data, tmp_path / "nan", "lora", 2, *FSDP)
    results = launch(2, arguments, faults={1: "train.loss:nan@2"})
    assert [code for code, _ in results] == [6, 6], results
