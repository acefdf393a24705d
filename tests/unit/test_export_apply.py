"""Applying an export: untouched bytes stay, touched tensors hold W + Δ, nothing is left where something fails."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ollatune.base.errors import DivergedError, InputError, VerificationError
from ollatune.base.files import sha256_file
from ollatune.base.memory import forget_peak, recent_peak_bytes
from ollatune.export.apply import ExportResult, apply_export
from ollatune.export.metadata_edits import DropKey, SetKey
from ollatune.export.plan import TensorUpdate, plan_export
from ollatune.export.settle import settle_types
from ollatune.gguf.codecs import quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf
from tests.export_cases import (
    Update,
    random_update,
    reference_weights,
    shapes,
    write_small_base,
    write_wide_base,
)

TUNED = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.1.ffn_gate_exps.weight")


@pytest.fixture
def base(tmp_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(write_small_base(tmp_path / "base.gguf")) as file:
        yield file


def small_updates(relative_size: float = 0.02) -> list[Update]:
    return [random_update(name, shapes()[name], relative_size=relative_size) for name in TUNED]


def assert_export_is_right(
    base: GGUFFile, result: ExportResult, updates: Sequence[TensorUpdate]
) -> None:
    """Against the reference reader: every byte that was not tuned is the base's, every tuned tensor is W + Δ."""
    by_name = {update.name: update for update in updates}
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(base.path).tensors}
    after = gguf.GGUFReader(result.path).tensors
    assert [tensor.name for tensor in after] == list(before)
    with GGUFFile.open(result.path) as written:
        for tensor in after:
            original = before[tensor.name]
            assert list(tensor.shape) == list(original.shape)
            if tensor.name not in by_name:
                assert tensor.tensor_type == original.tensor_type
                assert np.array_equal(tensor.data, original.data)
                continue
            expected = by_name[tensor.name].apply(reference_weights(base, tensor.name))
            largest = expected.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
            error = (reference_weights(written, tensor.name) - expected).abs().reshape(-1, 32)
            # Half a step of Q8_0 (the block's largest over 127), and the half-precision scale's own rounding.
            assert (error <= largest * (0.5 / 127 + 2**-11) + 1e-7).all(), tensor.name
    assert result.sha256 == sha256_file(result.path)


def test_an_export_against_the_reference(base: GGUFFile, tmp_path: Path) -> None:
    updates = small_updates()
    plan = plan_export(base, updates)
    result = apply_export(plan, tmp_path / "out" / "model.gguf")
    assert_export_is_right(base, result, updates)
    with GGUFFile.open(result.path) as written:
        assert [written.metadata_record(key) for key in written.metadata] == [
            base.metadata_record(key) for key in base.metadata
        ]
    recoveries = {t.name: t.recovery for t in result.tensors}
    assert all(recoveries[name] == pytest.approx(1.0, abs=0.05) for name in TUNED)
    assert all(value is None for name, value in recoveries.items() if name not in TUNED)


def test_export_json_tells_what_was_done(base: GGUFFile, tmp_path: Path) -> None:
    result = apply_export(plan_export(base, small_updates()), tmp_path / "out" / "model.gguf")
    content = json.loads((tmp_path / "out" / "export.json").read_text())
    assert content == json.loads(json.dumps(result.to_json()))
    assert content["sha256"] == sha256_file(result.path)
    assert content["size_bytes"] == result.path.stat().st_size
    assert content["accepted_recovery"] == [0.9, 1.1]
    assert content["smallest_recovery"] == min(
        t["recovery"] for t in content["tensors"] if t["recovery"] is not None
    )
    row = next(t for t in content["tensors"] if t["name"] == TUNED[0])
    assert (row["type_before"], row["type_after"]) == ("Q4_1", "Q8_0")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "export.json",
        "model.gguf",
    ]


def test_recovery_is_the_formula(base: GGUFFile, tmp_path: Path) -> None:
    updates = small_updates()
    result = apply_export(plan_export(base, updates), tmp_path / "model.gguf")
    with GGUFFile.open(result.path) as written:
        for update in updates:
            weights = reference_weights(base, update.name).double()
            delta = update.apply(weights.float()).double() - weights
            kept = reference_weights(written, update.name).double() - weights
            expected = float((kept * delta).sum() / (delta * delta).sum())
            measured = next(t.recovery for t in result.tensors if t.name == update.name)
            assert measured == pytest.approx(expected, rel=1e-6)


def test_the_same_coarse_grid_swallows_the_update(base: GGUFFile, tmp_path: Path) -> None:
    plan = plan_export(base, small_updates(0.003), tensor_type="base")
    with pytest.raises(
        VerificationError, match=r"Q4_1 would hold 0\.\d\d times.*3 tensors.*as q6_k"
    ):
        apply_export(plan, tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    result = apply_export(plan, tmp_path / "out" / "model.gguf", accept_recovery=True)
    assert result.smallest_recovery is not None
    assert result.smallest_recovery < 0.3
    assert result.to_json()["accept_recovery"] is True


def test_overshooting_is_refused_too(base: GGUFFile, tmp_path: Path) -> None:
    plan = plan_export(base, small_updates(0.005), tensor_type="q5_1")
    with pytest.raises(VerificationError, match=r"would hold 1\.\d\d times"):
        apply_export(plan, tmp_path / "model.gguf")


def test_auto_takes_the_smallest_type_that_keeps_the_update(tmp_path: Path) -> None:
    path = write_small_base(tmp_path / "eight.gguf", GGMLType.Q8_0)
    with GGUFFile.open(path) as base:
        small, large = random_update(TUNED[0], (64, 64), relative_size=0.001), None
        large = random_update(TUNED[1], (64, 96), relative_size=0.1)
        with pytest.raises(VerificationError, match="as f16"):
            apply_export(plan_export(base, [small, large]), tmp_path / "model.gguf")
        plan = plan_export(base, [small, large], tensor_type="auto")
        settled = settle_types(plan)
        result = apply_export(plan, tmp_path / "model.gguf")
    types = {t.name: t.planned.type.name for t in result.tensors if t.planned.action == "update"}
    assert types == {TUNED[0]: "F16", TUNED[1]: "Q8_0"}
    assert {t.name: t.type.name for t in settled.tensors if t.action == "update"} == types
    note = next(t.note for t in settled.tensors if t.name == TUNED[0])
    assert note.startswith("Q8_0 would store 0.")


def test_a_mix_stores_untouched_tensors_anew(tmp_path: Path) -> None:
    with GGUFFile.open(write_wide_base(tmp_path / "wide.gguf")) as base:
        update = random_update("blk.1.ffn_down.weight", (8, 256), relative_size=0.3)
        plan = plan_export(base, [update], tensor_type="q4_K_M")
        result = apply_export(plan, tmp_path / "model.gguf")
        with GGUFFile.open(result.path) as written:
            assert written.metadata["general.file_type"] == 15
            stored_bytes = sum(info.size_bytes for info in written.tensors.values())
            assert plan.size_bytes == stored_bytes < plan.size_bytes_before / 2
            for tensor in result.tensors:
                expected = reference_weights(base, tensor.name)
                if tensor.name == update.name:
                    expected = update.apply(expected)
                error = reference_weights(written, tensor.name) - expected
                relative = float(error.norm() / expected.norm()) if expected.any() else 0.0
                limit = {"Q4_K": 0.1, "Q6_K": 0.02}.get(tensor.planned.type.name, 0.0)
                assert relative <= limit, tensor.name
    actions = [tensor.planned.action for tensor in result.tensors]
    assert [actions.count(kind) for kind in ("copy", "requantize", "update")] == [1, 17, 1]


def test_an_update_of_zeros_has_no_recovery(base: GGUFFile, tmp_path: Path) -> None:
    update = Update(TUNED[0], (64, 64), lambda weights: weights.clone())
    result = apply_export(plan_export(base, [update]), tmp_path / "model.gguf")
    assert result.smallest_recovery is None


def test_vectors_and_whole_tensors_are_replaced(base: GGUFFile, tmp_path: Path) -> None:
    norm = torch.linspace(0.5, 1.5, 64)
    matrix = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    updates = [
        Update("output_norm.weight", (64,), lambda weights: norm, "full"),
        Update(TUNED[0], (64, 64), lambda weights: matrix, "full"),
    ]
    result = apply_export(plan_export(base, updates, tensor_type="f32"), tmp_path / "model.gguf")
    with GGUFFile.open(result.path) as written:
        assert torch.equal(reference_weights(written, "output_norm.weight"), norm)
        assert torch.equal(reference_weights(written, TUNED[0]), matrix)


def test_edits_reach_the_file(base: GGUFFile, tmp_path: Path) -> None:
    edits = [SetKey("general.name", "getunt"), DropKey("tokenizer.chat_template")]
    result = apply_export(plan_export(base, [], metadata_edits=edits), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(result.path).fields
    assert fields["general.name"].contents() == "getunt"
    assert "tokenizer.chat_template" not in fields
    assert result.to_json()["edited_keys"] == ["general.name", "tokenizer.chat_template"]


def test_exporting_twice_gives_the_same_bytes(base: GGUFFile, tmp_path: Path) -> None:
    first = apply_export(plan_export(base, small_updates()), tmp_path / "a.gguf")
    second = apply_export(plan_export(base, small_updates()), tmp_path / "b.gguf")
    assert first.sha256 == second.sha256
    nothing = apply_export(plan_export(base, []), tmp_path / "c.gguf")
    assert nothing.sha256 == sha256_file(base.path)


@pytest.mark.parametrize(
    ("update", "error", "expected"),
    [
        (Update(TUNED[0], (64, 64), lambda w: w * float("nan")), DivergedError, "NaN or infinity"),
        (Update(TUNED[0], (64, 64), lambda w: w[:32]), InputError, r"gave shape \(32, 64\)"),
    ],
)
def test_a_bad_update_writes_nothing(
    base: GGUFFile, tmp_path: Path, update: Update, error: type[Exception], expected: str
) -> None:
    output = tmp_path / "out" / "model.gguf"
    output.parent.mkdir()
    output.write_bytes(b"an earlier export")
    with pytest.raises(error, match=expected):
        apply_export(plan_export(base, [update]), output)
    assert output.read_bytes() == b"an earlier export"
    assert [entry.name for entry in output.parent.iterdir()] == ["model.gguf"]


def test_the_base_is_never_replaced(base: GGUFFile, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(base.path)
    digest = sha256_file(base.path)
    for output in (base.path, link):
        with pytest.raises(InputError, match="is the base model itself"):
            apply_export(plan_export(base, []), output)
    assert sha256_file(base.path) == digest


def test_progress_is_told_tensor_by_tensor(base: GGUFFile, tmp_path: Path) -> None:
    seen: list[str] = []
    plan = plan_export(base, small_updates())
    apply_export(plan, tmp_path / "m.gguf", on_tensor=lambda result: seen.append(result.name))
    assert seen == list(base.tensors)


@pytest.mark.slow
@pytest.mark.weights
def test_the_real_model_against_the_reference(smollm2_path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as base:
        updates = [
            random_update(name, info.shape)
            for name, info in base.tensors.items()
            if len(info.shape) == 2 and name.startswith(("blk.0.", "blk.29."))
        ]
        assert len(updates) == 14
        result = apply_export(plan_export(base, updates), tmp_path / "model.gguf")
        assert_export_is_right(base, result, updates)
    assert result.smallest_recovery == pytest.approx(1.0, abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's")
def test_peak_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Sixteen tensors of 8 MiB in float32, all tuned: the export takes less than five of them at any time."""
    shape, names = (1024, 2048), [f"blk.{layer}.ffn_up.weight" for layer in range(16)]
    weights = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = quantize(weights, GGMLType.Q8_0).numpy().tobytes()
    tensors = [TensorToWrite(name, shape, GGMLType.Q8_0, lambda: [stored]) for name in names]
    records = [encode_metadata("general.architecture", "llama", ValueType.STRING)]
    write_gguf(tmp_path / "base.gguf", records, tensors)
    step = 0.002 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    updates = [Update(name, shape, lambda base: base + step) for name in names]
    with GGUFFile.open(tmp_path / "base.gguf") as base:
        plan = plan_export(base, updates, tensor_type="q8_0")
        apply_export(plan, tmp_path / "warm.gguf")  # what the codecs keep for themselves
        before = forget_peak()
        apply_export(plan, tmp_path / "model.gguf")
        grown = recent_peak_bytes() - before
    assert grown < 5 * weights.nbytes, f"{grown / weights.nbytes:.1f} tensors"
