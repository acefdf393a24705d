"""Planning an export: types, exact use of every update, every problem named before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from ollatune.base.errors import InputError, UsageError
from ollatune.export.metadata_edits import DropKey, SetKey
from ollatune.export.plan import ExportPlan, plan_export
from ollatune.export.target_types import WHOLE_FILE_TYPES, next_larger_type, tuned_type
from ollatune.gguf.header import TensorInfo
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import encode_metadata
from tests.export_cases import Update, shapes, write_small_base, write_wide_base


@pytest.fixture
def base(tmp_path: Path) -> Iterator[GGUFFile]:
    with GGUFFile.open(write_small_base(tmp_path / "base.gguf")) as file:
        yield file


def never(weights: Tensor) -> Tensor:
    raise AssertionError("planning reads no weights")


def update(name: str, shape: tuple[int, ...] | None = None) -> Update:
    return Update(name, shape or shapes()[name], never)


def planned(plan: ExportPlan, name: str) -> tuple[str, str]:
    tensor = next(tensor for tensor in plan.tensors if tensor.name == name)
    return tensor.action, tensor.type.name


def test_only_tuned_tensors_change(base: GGUFFile) -> None:
    plan = plan_export(base, [update("blk.0.attn_q.weight"), update("blk.1.ffn_down.weight")])
    changed = {t.name: t.type for t in plan.tensors if t.action != "copy"}
    assert changed == {
        "blk.0.attn_q.weight": GGMLType.Q8_0,
        "blk.1.ffn_down.weight": GGMLType.Q8_0,
    }
    assert [t.name for t in plan.tensors] == list(base.tensors)
    assert all(t.type is t.base.type for t in plan.tensors if t.action == "copy")
    assert list(plan.records) == [base.metadata_record(key) for key in base.metadata]
    assert plan.num_updates == 2
    q4_1, q8_0 = 20, 34
    assert plan.size_bytes - plan.size_bytes_before == (64 * 64 + 64 * 96) // 32 * (q8_0 - q4_1)


@pytest.mark.parametrize(
    ("shape", "stored", "requested", "expected"),
    [
        ((64, 512), "Q4_K", "q8_0", "Q8_0"),
        ((64, 512), "Q4_K", "q6_K", "Q6_K"),
        ((64, 576), "Q4_1", "q6_K", "Q8_0"),  # 576 is no multiple of 256
        ((64, 100), "F32", "q8_0", "F32"),
        ((64, 100), "BF16", "q8_0", "BF16"),
        ((64, 80), "F16", "f32", "F32"),
        ((64, 512), "Q8_0", "q6_K", "Q8_0"),  # not made coarser
        ((64, 512), "F16", "q8_0", "F16"),
        ((64, 512), "F16", "bf16", "BF16"),
        ((64, 512), "Q6_K", "q5_0", "Q5_0"),  # below 8 bits the request counts
        ((64,), "F32", "q8_0", "F32"),
        ((64,), "F16", "q8_0", "F16"),
        ((3, 64, 512), "Q4_K", "q8_0", "Q8_0"),
    ],
)
def test_the_type_of_a_tuned_tensor(
    shape: tuple[int, ...], stored: str, requested: str, expected: str
) -> None:
    info = TensorInfo("blk.0.x.weight", shape, GGMLType[stored], 0, 0)
    assert tuned_type(info, GGMLType.from_name(requested)).type.name == expected


def test_rows_that_fit_no_block_fall_back_to_f16() -> None:
    info = TensorInfo("blk.0.x.weight", (4, 100), GGMLType.Q4_1, 0, 0)
    choice = tuned_type(info, GGMLType.Q8_0)
    assert choice.type is GGMLType.F16
    assert choice.note == "100 columns do not fit Q8_0"


def test_base_keeps_every_type(base: GGUFFile) -> None:
    plan = plan_export(base, [update("blk.0.attn_q.weight")], tensor_type="base")
    assert planned(plan, "blk.0.attn_q.weight") == ("update", "Q4_1")


def test_auto_starts_at_the_first_type_and_may_grow(base: GGUFFile) -> None:
    plan = plan_export(base, [update("blk.0.attn_q.weight")], tensor_type="auto")
    assert planned(plan, "blk.0.attn_q.weight") == ("update", "Q8_0")
    assert not plan.is_settled
    assert plan_export(base, [update("blk.0.attn_q.weight")]).is_settled


def test_the_next_larger_type() -> None:
    order = [GGMLType.Q4_K]
    while (larger := next_larger_type(order[-1])) is not None:
        order.append(larger)
    assert [kind.name for kind in order] == ["Q4_K", "Q6_K", "Q8_0", "F16", "F32"]
    assert next_larger_type(GGMLType.BF16) is GGMLType.F16


def test_a_mix_for_the_whole_file(tmp_path: Path) -> None:
    with GGUFFile.open(write_wide_base(tmp_path / "wide.gguf")) as base:
        tuned = update("blk.3.ffn_down.weight", (8, 256))
        plan = plan_export(base, [tuned], tensor_type="Q4_K_M")
    found = {t.name: (t.action, t.type.name) for t in plan.tensors}
    assert found["output_norm.weight"] == ("copy", "F32")
    assert found["output.weight"] == ("requantize", "Q6_K")
    assert found["token_embd.weight"] == ("requantize", "Q4_K")
    # llama.cpp gives Q6_K to the first and last eighth of the layers and to every third between them.
    finer = [i for i in range(8) if found[f"blk.{i}.attn_v.weight"][1] == "Q6_K"]
    assert finer == [0, 3, 6, 7]
    assert found["blk.3.ffn_down.weight"] == ("update", "Q6_K")
    assert found["blk.2.ffn_down.weight"] == ("requantize", "Q4_K")
    assert plan.edited_keys == ("general.file_type", "general.quantization_version")
    assert plan.records[-2] == encode_metadata("general.file_type", 15, ValueType.UINT32)


def test_whole_file_types_leave_small_tensors_alone(base: GGUFFile) -> None:
    plan = plan_export(base, [update("blk.0.attn_q.weight")], tensor_type="all_q8_0")
    assert planned(plan, "blk.0.attn_q.weight") == ("update", "Q8_0")
    assert {t.action for t in plan.tensors} == {"copy", "update"}  # Q4_1 is smaller than Q8_0


def test_whole_file_names_are_not_those_of_tensor_types() -> None:
    assert {"q4_K_M", "q5_K_M", "q4_K_S", "all_q8_0", "all_q6_K"} <= set(WHOLE_FILE_TYPES)
    assert not {name.casefold() for name in WHOLE_FILE_TYPES} & {
        t.name.casefold() for t in GGMLType
    }


def test_unknown_types_are_refused_with_the_choices(base: GGUFFile) -> None:
    with pytest.raises(
        UsageError, match=r"'q8_1'.*Did you mean `q8_0`.*q8_0, q6_K, f16, bf16, f32"
    ):
        plan_export(base, [], tensor_type="q8_1")


def test_every_misfit_is_named_at_once(base: GGUFFile) -> None:
    updates = [
        update("blk.0.attn_q.weight", (64, 65)),
        update("blk.7.attn_q.weight", (64, 64)),
        update("blk.0.attn_v.weight"),
        update("blk.0.attn_v.weight"),
    ]
    with pytest.raises(InputError) as caught:
        plan_export(base, updates)
    message = str(caught.value)
    assert "`blk.0.attn_q.weight` has shape (64, 65), the base has (64, 64)" in message
    assert "`blk.7.attn_q.weight` is not in the base. Did you mean `blk." in message
    assert "`blk.0.attn_v.weight` is updated twice" in message


def test_a_long_list_of_misfits_is_cut(base: GGUFFile) -> None:
    with pytest.raises(InputError, match="And 3 more"):
        plan_export(base, [update(f"other.{i}", (1,)) for i in range(8)])


def test_metadata_edits(base: GGUFFile) -> None:
    edits = [
        SetKey("general.name", "tuned"),
        DropKey("tokenizer.chat_template"),
        DropKey("not.there"),
        SetKey("tokenizer.ggml.add_bos_token", False, ValueType.BOOL),
    ]
    plan = plan_export(base, [], metadata_edits=edits)
    before = [base.metadata_record(key) for key in base.metadata]
    kept = [record for record in plan.records if record in before]
    assert [i for i, record in enumerate(before) if record not in kept] == [1, 4]
    assert len(plan.records) == len(before)
    assert plan.edited_keys == tuple(edit.key for edit in edits)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([SetKey("new.key", 1)], "`new.key` is new"),
        ([SetKey("general.name", "a"), DropKey("general.name")], "`general.name` is edited twice"),
        ([SetKey("general.file_type", "text")], r"general\.file_type.*UINT32"),
    ],
)
def test_edits_that_cannot_be_made(
    base: GGUFFile, edits: list[SetKey | DropKey], expected: str
) -> None:
    with pytest.raises((InputError, UsageError), match=expected):
        plan_export(base, [], metadata_edits=edits)


def test_the_plan_prints_as_table_and_json(base: GGUFFile) -> None:
    edits = [SetKey("general.name", "tuned")]
    plan = plan_export(base, [update("blk.0.ffn_up.weight")], metadata_edits=edits)
    table = plan.table().splitlines()
    assert table[0].split() == ["tensor", "shape", "action", "type", "size"]
    assert table[1].split("  ")[0] == "blk.0.ffn_up.weight"
    assert "96×64" in table[1]
    assert "Q4_1 → Q8_0" in table[1]
    assert "1 tensors updated, 0 stored anew, 17 copied byte for byte" in table[2]
    assert table[3] == "Metadata changed: general.name."
    content = json.loads(json.dumps(plan.to_json()))
    assert content["num_updates"] == 1
    row = next(t for t in content["tensors"] if t["action"] == "update")
    assert row == {
        "name": "blk.0.ffn_up.weight",
        "shape": [96, 64],
        "action": "update",
        "kind": "lora",
        "type_before": "Q4_1",
        "type_after": "Q8_0",
        "size_bytes_before": 96 * 64 // 32 * 20,
        "size_bytes": 96 * 64 // 32 * 34,
        "note": "",
    }
