"""Split models read as one; what `describe` tells about a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ollatune.base.errors import GGUFError
from ollatune.base.files import sha256_file
from ollatune.gguf.inspect import FILE_TYPES, describe
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.split import SplitGGUF, open_gguf
from ollatune.gguf.types import GGMLType
from ollatune.gguf.writer import TensorToWrite, write_gguf
from tests.gguf_files import ARRAY, STRING, UINT32, Draft, Tensor, record, small_model

NUM_TENSORS = 7


def write_reference(path: Path, **split: Any) -> None:
    """A model by the reference writer, whole or split."""
    writer = gguf.GGUFWriter(path, "llama", **split)
    writer.add_string("general.name", "splittable")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    rng = np.random.default_rng(0)
    for i in range(NUM_TENSORS):
        writer.add_tensor(f"blk.{i}.weight", rng.random((3, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write_reference(tmp_path / "model.gguf", split_max_tensors=3)
    found = sorted(tmp_path.glob("model-*.gguf"))
    assert [path.name for path in found] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_opens_the_whole(parts: list[Path], tmp_path: Path, named: int) -> None:
    write_reference(tmp_path / "whole.gguf")
    whole = GGUFFile.open(tmp_path / "whole.gguf")
    with open_gguf(parts[named]) as file:
        assert isinstance(file, SplitGGUF)
        assert list(file.tensors) == list(whole.tensors)
        for name, info in whole.tensors.items():
            assert file.tensors[name].shape == info.shape
            assert np.array_equal(file.tensor_data(name), whole.tensor_data(name))
            file.release_pages(name)
        assert dict(file.metadata) == dict(whole.metadata)
        assert file.size_bytes == sum(path.stat().st_size for path in parts)
        assert file.paths == tuple(parts)
        assert file.architecture == "llama"


def test_a_copy_of_a_split_model_is_the_whole_one(parts: list[Path], tmp_path: Path) -> None:
    write_reference(tmp_path / "whole.gguf")
    with open_gguf(parts[0]) as file:
        tensors = [
            TensorToWrite(t.name, t.shape, t.type, lambda n=t.name: [file.tensor_data(n)])
            for t in file.tensors.values()
        ]
        records = [file.metadata_record(key) for key in file.metadata]
        digest = write_gguf(tmp_path / "copy.gguf", records, tensors)
    assert digest == sha256_file(tmp_path / "whole.gguf")


def test_a_whole_file_opens_as_itself(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(small_model().build())
    assert type(open_gguf(tmp_path / "m.gguf")) is GGUFFile


def test_missing_parts_are_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(
        GGUFError, match=r"1 of 3 parts are missing, first model-00003-of-00003.gguf"
    ):
        open_gguf(parts[0])


def test_a_part_in_another_parts_place(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(GGUFError, match="part 2 of 3, part 1 of 3 was expected"):
        open_gguf(parts[0])


def test_a_renamed_part(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("sha256-abc"))
    with pytest.raises(GGUFError, match="one of 3 parts, but it is not called"):
        open_gguf(renamed)


def test_a_damaged_part(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    with pytest.raises(GGUFError, match="model-00002-of-00003"):
        open_gguf(parts[0])


def test_an_impossible_number_of_parts(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(Draft([record("split.count", 10**9, UINT32)]).build())
    with pytest.raises(GGUFError, match="is no number of parts"):
        open_gguf(tmp_path / "m.gguf")


def described(tmp_path: Path, draft: Draft, **arguments: Any) -> dict[str, Any]:
    (tmp_path / "m.gguf").write_bytes(draft.build())
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        known = {"known_architectures": {"llama", "qwen2"}, "decodable_types": set(GGMLType)}
        found = describe(file, **{**known, **arguments})
    json.dumps(found, allow_nan=False)
    return found


def test_describe(tmp_path: Path) -> None:
    draft = small_model()
    draft.records += [
        record("general.file_type", 15, UINT32),
        record("tokenizer.ggml.model", "llama", STRING),
        record("llama.block_count", 1, UINT32),
        record("llama.attention.head_count", [4, 8], ARRAY, UINT32),
    ]
    found = described(tmp_path, draft)
    weights = {"Q8_0": 320, "F32": 64, "Q4_0": 192, "Q4_K": 512, "F16": 192}
    sizes = {"Q8_0": 340, "F32": 256, "Q4_0": 108, "Q4_K": 288, "F16": 384}
    assert {row["type"]: row["num_weights"] for row in found["types"]} == weights
    assert [row["type"] for row in found["types"]] == sorted(sizes, key=lambda t: -sizes[t])
    assert sum(row["share"] for row in found["types"]) == pytest.approx(1.0)
    assert found["num_weights"] == sum(weights.values())
    assert found["bits_per_weight"] == 8 * sum(sizes.values()) / sum(weights.values())
    assert found["architecture"] == "llama"
    assert found["file_type"] == "Q4_K_M"
    assert found["context_length"] == 2048
    assert found["num_heads"] == [4, 8]
    assert found["num_kv_heads"] is None
    assert found["tokenizer"] == {
        "model": "llama",
        "pre": None,
        "vocab_size": 5,
        "add_bos": None,
        "add_eos": None,
    }
    assert found["has_chat_template"] is False
    assert (found["trainable"], found["why_not"]) == (True, "")


ONE_TENSOR = Tensor("t", (32,), 0)


@pytest.mark.parametrize(
    ("draft", "arguments", "expected"),
    [
        (Draft([record("general.type", "adapter", STRING)]), {}, "this is an adapter"),
        (Draft([record("general.type", "mmproj", STRING)]), {}, "the vision part"),
        (Draft([record("general.architecture", "llama", STRING)]), {}, "no weights"),
        (
            Draft([record("general.architecture", "rwkv\x1b", STRING)], [ONE_TENSOR]),
            {},
            r"`rwkv\x1b`; architectures that can be trained: llama, qwen2",
        ),
        (Draft([], [ONE_TENSOR]), {}, "states no architecture"),
        (small_model(), {"decodable_types": {GGMLType.F32, GGMLType.F16}}, "Q4_0, Q4_K, Q8_0"),
        (
            Draft([record("general.architecture", "llama", STRING)], [ONE_TENSOR]),
            {},
            "the file holds no tokenizer",
        ),
    ],
)
def test_why_not(tmp_path: Path, draft: Draft, arguments: dict[str, Any], expected: str) -> None:
    found = described(tmp_path, draft, **arguments)
    assert found["trainable"] is False
    assert expected in found["why_not"]


def test_hostile_metadata_are_harmless(tmp_path: Path) -> None:
    records = [
        record("general.architecture", "llama", STRING),
        record("general.name", "\x1b[2Jname", STRING),
        record("general.type", ["a"], ARRAY, STRING),
        record("general.file_type", 4242, UINT32),
        record("llama.context_length", "many", STRING),
        record("tokenizer.ggml.model", ["x"], ARRAY, STRING),
        record("tokenizer.ggml.tokens", "none", STRING),
    ]
    found = described(tmp_path, Draft(records, [ONE_TENSOR]))
    assert found["name"] == "\\x1b[2Jname"
    assert found["file_type"] == "unknown (4242)"
    assert found["context_length"] is None
    assert found["tokenizer"]["vocab_size"] is None


def test_file_types_are_the_references() -> None:
    for kind in gguf.LlamaFileType:
        name = kind.name.removeprefix("ALL_").removeprefix("MOSTLY_")
        if kind.name != "GUESSED":
            assert FILE_TYPES[int(kind)] == name, kind
