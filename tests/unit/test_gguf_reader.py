"""The GGUF reader: every value exact, every damage named."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from ollatune.base.errors import GGUFError, UsageError
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from tests.gguf_files import (
    ARRAY,
    BOOL,
    F16,
    F32,
    FLOAT32,
    INT32,
    Q4_0,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Draft,
    Tensor,
    record,
    small_model,
    text,
)


def opened(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GGUFFile.open(path)


def reference_values(path: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_is_read_exactly(tmp_path: Path, version: int) -> None:
    with opened(tmp_path, small_model(version).build()) as file:
        values = dict(file.metadata)
        assert file.version == version
    assert values["general.name"] == "kleines Modell · 小"
    assert values["test.u64"] == 2**63 + 1
    assert values["test.i64"] == -(2**62)
    assert values["test.f64"] == 1e-300
    assert values["test.bool"] is True
    assert values["test.empty_list"] == []
    assert values["test.u8s"] == [1, 2, 255]
    assert values["test.bools"] == [True, False, True]
    assert values["test.u64s"] == [0, 2**64 - 1]
    assert values["tokenizer.ggml.tokens"] == ["<s>", "▁the", "é", "", "x" * 40]
    assert values == reference_values(tmp_path / "model.gguf")


def test_keys_keep_their_order_and_types(tmp_path: Path) -> None:
    draft = small_model()
    file = opened(tmp_path, draft.build())
    assert len(file.metadata) == len(draft.records)
    assert list(file.metadata)[:2] == ["general.architecture", "general.name"]
    assert [file.metadata_record(key) for key in file.metadata] == draft.records
    assert file.metadata_type("test.u64s") is ValueType.ARRAY
    assert file.metadata_element_type("test.u64s") is ValueType.UINT64
    assert file.metadata_type("test.i8") is ValueType.INT8
    assert file.metadata_element_type("test.i8") is None
    assert file.architecture == "llama"


def test_tensors_are_where_the_reference_finds_them(tmp_path: Path) -> None:
    draft = small_model()
    file = opened(tmp_path, draft.build())
    reference = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert list(file.tensors) == [tensor.name for tensor in draft.tensors]
    for drafted in draft.tensors:
        info, expected = file.tensors[str(drafted.name)], reference[str(drafted.name)]
        assert info.shape == tuple(reversed(drafted.dimensions))
        assert int(info.type) == int(expected.tensor_type)
        assert info.offset == expected.data_offset
        assert info.size_bytes == expected.n_bytes
        assert info.num_weights == expected.n_elements
        assert file.tensor_data(info.name).tobytes() == drafted.data


def test_tensor_data_is_a_read_only_view_that_outlives_the_file(tmp_path: Path) -> None:
    with opened(tmp_path, small_model().build()) as file:
        view = file.tensor_data("token_embd.weight")
    assert view.dtype == np.uint8
    assert view.ndim == 1
    assert not view.flags.writeable
    assert view[1] == 7
    assert file.metadata["test.u8"] == 200  # metadata too


def test_reading_tensors_of_a_closed_file_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path, small_model().build()) as file:
        pass
    with pytest.raises(GGUFError, match="closed"):
        file.tensor_data("token_embd.weight")


def test_other_alignment(tmp_path: Path) -> None:
    draft = small_model()
    draft.records.append(record("general.alignment", 256, UINT32))
    draft.alignment = 256
    file = opened(tmp_path, draft.build())
    assert file.alignment == 256
    assert all(info.offset % 256 == 0 for info in file.tensors.values())
    assert file.tensor_data("blk.0.attn_q.weight").tobytes() == draft.tensors[2].data


def test_a_file_without_tensors(tmp_path: Path) -> None:
    file = opened(tmp_path, Draft([record("general.architecture", "x", STRING)]).header())
    assert file.tensors == {}


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    file = opened(tmp_path, small_model().build())
    with pytest.raises(GGUFError, match=r"no such tensor.*`token_embd.weight`"):
        file.tensor_data("token_embed.weight")
    with pytest.raises(GGUFError, match=r"no such metadata key.*`general.name`"):
        file.metadata_record("general.nam")
    with pytest.raises(KeyError):
        file.metadata["nothing"]


def test_a_text_that_is_not_utf8_is_named_when_it_is_read(tmp_path: Path) -> None:
    tokens = [b"good", b"\xff\xfe", b"good"]
    records = [record("a", tokens, ARRAY, STRING), record("b", b"\xc3", STRING)]
    file = opened(tmp_path, Draft(records).build())
    with pytest.raises(GGUFError, match=r"a\[1\]: a text that is not UTF-8"):
        file.metadata["a"]
    with pytest.raises(GGUFError, match="b: a text that is not UTF-8"):
        file.metadata["b"]


def raw_record(key: str, value_type: int, rest: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + rest


def with_record(content: bytes) -> bytes:
    return Draft([content]).build()


def with_tensors(*tensors: Tensor) -> bytes:
    return Draft([], list(tensors)).build()


HUGE = 2**64 - 1
DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "magic only": (b"GGUF", "the file ends here"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "the file ends here"),
    "zeros": (bytes(64), "begins with zeros"),
    "wrong magic": (b"ABCD" + bytes(64), "41 42 43 44"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs pointer"),
    "safetensors": (struct.pack("<Q", 40) + b'{"__metadata__":{}}', "safetensors"),
    "web page": (b"\n<!DOCTYPE html><html><head>", "web page"),
    "json": (b'{"error":"not found"}', "JSON"),
    "zip": (b"PK\x03\x04" + bytes(40), "PyTorch checkpoint"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "old ggml": (b"tjgg\x03\x00\x00\x00", "old ggjt"),
    "version 1": (Draft(version=1).build(), "version 1, 2 and 3 can be read"),
    "version 4": (Draft(version=4).build(), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "big endian 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0) + bytes(32), "big-endian"),
    "huge tensor count": (Draft(num_tensors=HUGE).build(), "at most 65536"),
    "huge record count": (Draft(num_records=HUGE).build(), "at most 65536"),
    "too many records for the file": (Draft(num_records=60_000).build(), "cannot fit into"),
    "too many tensors for the file": (Draft(num_tensors=60_000).build(), "cannot fit into"),
    "one record too few": (
        Draft([record("a", 1, UINT32)], num_records=2).header(),
        "key of metadata record 1",
    ),
    "key length": (with_record(struct.pack("<Q", 2**40)), "at most 16777216"),
    "key beyond the file": (with_record(struct.pack("<Q", 5000)), "are left in the file"),
    "key not utf-8": (with_record(record(b"\xff", 1, UINT32)), "not UTF-8"),
    "value type": (with_record(raw_record("a", 13, bytes(8))), "unknown value type 13"),
    "text beyond the file": (
        with_record(raw_record("a", STRING, struct.pack("<Q", 4000))),
        "its text ends at byte",
    ),
    "text length overflow": (
        with_record(raw_record("a", STRING, struct.pack("<Q", HUGE - 3))),
        "at most 16777216",
    ),
    "array of arrays": (
        with_record(raw_record("a", ARRAY, struct.pack("<IQ", ARRAY, 1))),
        "array of arrays",
    ),
    "array count overflow": (
        with_record(raw_record("a", ARRAY, struct.pack("<IQ", UINT64, HUGE))),
        "elements, at most",
    ),
    "array beyond the file": (
        with_record(raw_record("a", ARRAY, struct.pack("<IQ", INT32, 100_000))),
        "are left in the file",
    ),
    "texts beyond the file": (
        Draft(
            [raw_record("a", ARRAY, struct.pack("<IQ", STRING, 1) + text("abcdefgh")[:-4])]
        ).header(),
        "its text ends at byte",
    ),
    "texts stop between two": (
        Draft([raw_record("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("abcdefgh"))]).header(),
        "the file ends here",
    ),
    "array element type": (
        with_record(raw_record("a", ARRAY, struct.pack("<IQ", 77, 1))),
        "unknown value type 77",
    ),
    "same key twice": (
        Draft([record("a", 1, UINT32), record("a", 2, UINT32)]).build(),
        "a: this metadata key occurs twice",
    ),
    "alignment zero": (with_record(record("general.alignment", 0, UINT32)), "power of two"),
    "alignment odd": (with_record(record("general.alignment", 24, UINT32)), "power of two"),
    "alignment huge": (with_record(record("general.alignment", 1 << 21, UINT32)), "power of two"),
    "alignment a text": (with_record(record("general.alignment", "32", STRING)), "power of two"),
    "alignment a bool": (with_record(record("general.alignment", True, BOOL)), "power of two"),
    "alignment a float": (
        with_record(record("general.alignment", 32.0, FLOAT32)),
        "power of two",
    ),
    "alignment an array": (
        with_record(record("general.alignment", [32], ARRAY, UINT8)),
        "power of two",
    ),
    "five dimensions": (
        with_tensors(Tensor("t", (1, 1, 1, 1, 1), F32)),
        "5 dimensions, at most 4",
    ),
    "dimension zero": (with_tensors(Tensor("t", (0, 2), F32)), "impossible dimensions"),
    "product overflow": (
        with_tensors(Tensor("t", (2**32, 2**32), F32, content=bytes(32))),
        "impossible dimensions",
    ),
    "row no whole blocks": (
        with_tensors(Tensor("t", (48, 2), Q8_0, content=bytes(96))),
        "needs a multiple of 32",
    ),
    "unknown tensor type": (
        with_tensors(Tensor("t", (32,), 999, content=bytes(32))),
        "tensor type 999 is unknown",
    ),
    "removed tensor type": (
        with_tensors(Tensor("t", (32,), 31, content=bytes(32))),
        "Q4_0_4_4, which llama.cpp no longer reads",
    ),
    "tensor beyond the file": (
        with_tensors(Tensor("t", (4096, 4096), F16, content=bytes(64))),
        "its data end at byte",
    ),
    "offset beyond the file": (
        with_tensors(Tensor("t", (32,), F32, offset=2**63)),
        "its data end at byte",
    ),
    "offset not aligned": (
        with_tensors(Tensor("t", (32,), F32, offset=8)),
        "not a multiple of the alignment 32",
    ),
    "overlap": (
        with_tensors(Tensor("one", (32,), F32), Tensor("two", (32,), F32, offset=96)),
        "two: its data overlap those of one",
    ),
    "same tensor twice": (
        with_tensors(Tensor("t", (32,), Q4_0), Tensor("t", (32,), Q4_0)),
        "t: this tensor name occurs twice",
    ),
    "cut inside the tensors": (small_model().build()[:-600], "its data end at byte"),
    "cut inside the vocabulary": (
        small_model().build()[:800],
        "its text ends at byte 820, the file at 800",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    content, expected = DAMAGE[name]
    with pytest.raises(GGUFError, match=expected) as caught:
        opened(tmp_path, content)
    assert caught.value.path == str(tmp_path / "model.gguf")


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "this is a folder"),
    "pipe": (named_pipe, "no regular file"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    prepare, expected = PLACES[name]
    prepare(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match=expected):
        GGUFFile.open(tmp_path / "model.gguf")


def test_a_path_that_no_system_takes() -> None:
    with pytest.raises(GGUFError, match="cannot be read"):
        GGUFFile.open("bad\0name.gguf")


def test_messages_hold_no_control_characters(tmp_path: Path) -> None:
    draft = Draft([record("\x1b[2Jkey", 1, UINT32), record("\x1b[2Jkey", 2, UINT32)])
    with pytest.raises(GGUFError) as caught:
        opened(tmp_path, draft.build())
    assert "\x1b" not in str(caught.value)


def test_block_sizes_are_those_of_the_reference() -> None:
    for kind, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if (
            kind.name == "Q8_1"
        ):  # the reference counts a field that the block lost; no file holds the type
            continue
        ours = GGMLType(int(kind))
        assert (ours.name, ours.block_size, ours.block_bytes) == (
            kind.name,
            block_size,
            block_bytes,
        )


def test_types_by_name() -> None:
    assert GGMLType.from_name("q6_k") is GGMLType.Q6_K
    assert GGMLType.Q6_K.row_bytes(512) == 420
    with pytest.raises(UsageError, match=r"'q8_2'.*Did you mean `q8_"):
        GGMLType.from_name("q8_2")
    with pytest.raises(UsageError, match="256 weights"):
        GGMLType.Q4_K.row_bytes(576)


@pytest.mark.slow  # the reference takes seconds
@pytest.mark.weights
def test_the_real_model_reads_as_the_reference_does(smollm2_path: Path) -> None:
    reference = gguf.GGUFReader(smollm2_path)
    with GGUFFile.open(smollm2_path) as file:
        for key, field in reference.fields.items():
            if not key.startswith("GGUF."):
                assert file.metadata[key] == field.contents(), key
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.offset, info.size_bytes) == (tensor.data_offset, tensor.n_bytes)
            assert np.array_equal(file.tensor_data(tensor.name), tensor.data.view(np.uint8).ravel())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "nomic-bert-moe", "aquila"])
def test_real_vocabularies_read_as_the_reference_does(name: str) -> None:
    from tests.assets import ggml_vocab

    path = ggml_vocab(name)
    assert dict(GGUFFile.open(path).metadata) == reference_values(path)
