"""Memory, time and disk of a run said before it begins; what to change where it will not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.estimates import measure

from ollatune.base.text import format_bytes
from ollatune.config.schema import Config
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
from ollatune.modeling.memory import Rows, estimate_memory, model_sizes, weights_bytes
from ollatune.training import advice, disk, durations
from ollatune.training import estimate as estimate_module
from tests.run_helpers import run, train_command
from tests.tiny_models import tiny_gguf

ROWS = Rows(1000, 400, 500, 200)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3", "phi3", "mixtral"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_counts_are_those_of_the_model(family: str, dora: bool, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"advanced": {"lora_rank": 5, "lora_layers": 1, "use_dora": dora}}
    )
    with GGUFFile.open(tiny_gguf(family, tmp_path)) as gguf:
        sizes = model_sizes(gguf, config)
        model = load_base_model(gguf)
        assert sizes.total == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
        inject_lora(model, LoRASettings(5, 8.0, 0.0, layers=1, use_dora=dora), seed=0)
        assert sizes.trained == sum(p.numel() for _, p in trainable_parameters(model))
        assert (sizes.layers, sizes.width) == (
            model.config.num_hidden_layers,
            model.config.hidden_size,
        )
        assert sizes.vocabulary == model.config.vocab_size


def test_nf4_weights_take_what_is_said(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with GGUFFile.open(tiny_gguf("llama", tmp_path, hidden_size=256)) as gguf:
        model = load_base_model(gguf, mode="nf4")
        dense = sum(p.numel() * p.element_size() for p in model.parameters())
        packed = sum(getattr(m, "size_bytes", 0) for m in model.modules())
        said = weights_bytes(model_sizes(gguf, Config()), mode="nf4", dtype="fp32")
    assert said == pytest.approx(dense + packed, rel=0.02)


def test_phases_and_what_makes_them_smaller(tmp_path: Path) -> None:
    with GGUFFile.open(tiny_gguf("llama", tmp_path)) as gguf:

        def peak(
            rows: Rows = ROWS, mode: str = "dense", fused: bool = True, **training: object
        ) -> int:
            config = Config.model_validate({"training": training})
            found = estimate_memory(
                gguf, config, mode=mode, dtype="fp32", rows=rows, is_fused=fused
            )
            assert set(found.phases) == {"load", "step", "validation", "checkpoint", "finish"}
            assert found.total_bytes == found.phases[found.heaviest_phase]
            return found.phases["step"]

        assert peak(Rows(2000, 400, 500, 200)) > peak()
        assert peak(fused=False) > peak()
        assert peak(activation_checkpointing=True) < peak()
        assert peak(optimizer="sgd") < peak()
        assert peak(optimizer="adamw_8bit") < peak()


def test_the_dry_run_shows_every_phase(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train_command(base, data, tmp_path / "out", "--dry-run")) == 0
    shown = capsys.readouterr().out
    for phase in ("load", "step", "validation", "checkpoint", "finish", "export"):
        assert f"\n    {phase} " in shown
    assert ": fits" in shown
    assert "To make it fit" not in shown


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so long that activations are the most of it, also of a tiny model."""
    monkeypatch.setattr(estimate_module, "_already_resident", lambda device: 0)
    monkeypatch.setattr(
        estimate_module,
        "heaviest_rows",
        lambda config, splits, size: Rows(size * 500_000, 99, 9, 9),
    )


@pytest.mark.usefixtures("long_rows")
def test_advice_where_it_will_not_fit(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each line is worth something, and the last of them fits - or a model that does is named."""
    command = train_command(base, data, tmp_path / "out", "--dry-run", "--json")

    def plan(free: int) -> dict[str, object]:
        monkeypatch.setattr(estimate_module, "free_memory_bytes", lambda device: free)
        assert run(command) == 0
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    needed = plan(1 << 40)["memory"]["total_bytes"]  # type: ignore[index]
    tight = plan(needed - 1)
    assert not tight["fits_memory"]
    assert "packed" in tight["advice"][0] or "batch-size 1" in tight["advice"][0]  # type: ignore[index]
    nothing = plan(1 << 20)
    assert not nothing["fits_memory"]
    assert any("activation_checkpointing" in line for line in nothing["advice"])  # type: ignore[attr-defined]


def test_a_smaller_model_of_the_catalog(base: Path) -> None:
    from ollatune.modeling.base import resolve_base
    from ollatune.modeling.opened import open_base

    opened = open_base(resolve_base(str(base)))
    assert advice.smaller_model(opened, 1 << 20, 8) is None
    small, large = (advice.smaller_model(opened, n << 30, 8) for n in (4, 64))
    assert small is not None
    assert large is not None
    assert small != large
    assert small.startswith(("llama", "smollm", "tinyllama", "mistral"))


@pytest.mark.usefixtures("long_rows")
def test_training_says_beforehand_that_it_will_not_fit(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(estimate_module, "free_memory_bytes", lambda device: 1 << 20)
    assert run(train_command(base, data, tmp_path / "out", "--max-steps", "1")) == 0
    shown = capsys.readouterr().err
    assert "will probably not fit" in shown
    assert "activation_checkpointing" in shown


@pytest.mark.parametrize("in_one_place", [True, False])
def test_a_run_without_room_for_its_checkpoints_and_export_does_not_begin(
    base: Path, data: Path, tmp_path: Path, in_one_place: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both are counted, together where they lie on one file system, and both are named."""
    with GGUFFile.open(base) as gguf:
        needs = disk.disk_bytes(Config(), model_sizes(gguf, Config()))
        assert needs["export"] >= sum(t.size_bytes for t in gguf.tensors.values())
    assert needs["checkpoints"] > needs["export"] > 0
    room = sum(needs.values()) if in_one_place else needs["checkpoints"]
    if not in_one_place:
        monkeypatch.setattr(disk, "_on_one_device", lambda *folders: False)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: room - 1)
    assert run(train_command(base, data, tmp_path / "out")) == 5
    said = capsys.readouterr().err
    assert "checkpoints" in said
    assert ("model.gguf" in said) == in_one_place
    assert f"{format_bytes(room)} there" in said
    assert not (tmp_path / "out" / "run.json").exists()
    monkeypatch.setattr(disk, "free_bytes", lambda folder: room)
    assert run(train_command(base, data, tmp_path / "out", "--max-steps", "1")) == 0


def test_checkpoints_that_are_there_are_room_for_a_resumed_run(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(base) as gguf:
        needs = disk.disk_bytes(Config(), model_sizes(gguf, Config()))
    command = train_command(base, data, tmp_path / "out", "--resume", "auto")
    assert run(train_command(base, data, tmp_path / "out", "--max-steps", "1")) == 0
    monkeypatch.setattr(disk, "free_bytes", lambda folder: sum(needs.values()) - 1)
    assert run(command) == 0


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("case", ["adapter fp32", "all weights fp32"])
def test_the_estimate_is_near_the_peak_of_a_real_run(case: str) -> None:
    """Of the embedded model: what was said before the run is within 20 % of what its process came to hold."""
    row = measure(case, words=60, batch_size=4)
    assert row["measured_mb"] > 500
    assert 0.8 < row["memory_ratio"] < 1.2, row


def test_speeds_are_measured() -> None:
    from ollatune.training.placement import Placement

    flops = durations.measured_flops(Placement(torch.device("cpu"), "fp32", "dense"))
    assert 1e8 < flops < 1e15
