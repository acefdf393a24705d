"""The GGUF writer: the same bytes back, durable, and no file at all where something is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base import files
from ollatune.base.errors import GGUFError, StorageError, UsageError
from ollatune.base.files import sha256_file
from ollatune.gguf import writer
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, record_key, write_gguf
from tests.gguf_files import Draft, small_model


def copy_of(file: GGUFFile, path: Path) -> str:
    records = [file.metadata_record(key) for key in file.metadata]
    tensors = [
        TensorToWrite(info.name, info.shape, info.type, lambda n=info.name: [file.tensor_data(n)])
        for info in file.tensors.values()
    ]
    return write_gguf(path, records, tensors, alignment=file.alignment)


def zeros(name: str, size_bytes: int, shape: tuple[int, ...] = (32,)) -> TensorToWrite:
    return TensorToWrite(name, shape, GGMLType.F32, lambda: [bytes(size_bytes)])


def test_a_copy_has_the_same_bytes(tmp_path: Path) -> None:
    original = tmp_path / "original.gguf"
    original.write_bytes(small_model().build())
    with GGUFFile.open(original) as file:
        digest = copy_of(file, tmp_path / "deep" / "copy.gguf")
    written = (tmp_path / "deep" / "copy.gguf").read_bytes()
    assert written == original.read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()


@pytest.mark.weights
def test_the_real_model_comes_back_byte_for_byte(smollm2_path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        digest = copy_of(file, tmp_path / "copy.gguf")
    assert digest == sha256_file(smollm2_path) == sha256_file(tmp_path / "copy.gguf")


def test_version_2_becomes_version_3(tmp_path: Path) -> None:
    (tmp_path / "two.gguf").write_bytes(small_model(2).build())
    with GGUFFile.open(tmp_path / "two.gguf") as file:
        copy_of(file, tmp_path / "three.gguf")
    assert (tmp_path / "three.gguf").read_bytes() == small_model(3).build()


def test_chunks_and_arrays_are_written_in_order(tmp_path: Path) -> None:
    def produce() -> Iterator[Any]:
        yield b"\1" * 40
        yield bytearray(b"\2" * 40)
        yield memoryview(b"\3" * 8)
        yield np.full(40, 4, np.uint8)

    tensors = [zeros("a", 4, (1,)), TensorToWrite("b", (2, 16), GGMLType.F32, produce)]
    write_gguf(tmp_path / "x.gguf", [], tensors)
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        expected = b"\1" * 40 + b"\2" * 40 + b"\3" * 8 + b"\4" * 40
        assert file.tensor_data("b").tobytes() == expected
    assert (tmp_path / "x.gguf").stat().st_size % 32 == 0


@pytest.mark.parametrize(
    ("key", "value", "value_type", "element_type"),
    [
        ("general.name", "Ünïcode · 小", ValueType.STRING, None),
        ("x.u8", 255, ValueType.UINT8, None),
        ("x.i64", -(2**63), ValueType.INT64, None),
        ("x.u64", 2**64 - 1, ValueType.UINT64, None),
        ("x.f32", 0.1, ValueType.FLOAT32, None),
        ("x.f64", 0.1, ValueType.FLOAT64, None),
        ("x.bool", False, ValueType.BOOL, None),
        ("x.texts", ["a", "", "ß"], ValueType.ARRAY, ValueType.STRING),
        ("x.floats", [1.5, -2.5], ValueType.ARRAY, ValueType.FLOAT32),
        ("x.none", [], ValueType.ARRAY, ValueType.INT32),
    ],
)
def test_records_equal_the_references(
    tmp_path: Path, key: str, value: Any, value_type: ValueType, element_type: ValueType | None
) -> None:
    record = encode_metadata(key, value, value_type, element_type=element_type)
    assert record_key(record) == key
    write_gguf(tmp_path / "x.gguf", [record], [])
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        ours = file.metadata[key]
        assert ours == (float(np.float32(value)) if key == "x.f32" else value)
        assert file.metadata_type(key) is value_type
        assert file.metadata_element_type(key) is element_type
        assert file.metadata_record(key) == record
    field = gguf.GGUFReader(tmp_path / "x.gguf").fields[key]
    assert field.types[0] == int(value_type)
    if value != []:
        assert field.contents() == ours


SCALARS = st.one_of(
    st.tuples(st.just(ValueType.UINT32), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(ValueType.INT8), st.integers(-128, 127)),
    st.tuples(st.just(ValueType.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(ValueType.BOOL), st.booleans()),
    st.tuples(st.just(ValueType.STRING), st.text(max_size=30)),
)
ARRAYS = st.one_of(
    st.tuples(st.just(ValueType.STRING), st.lists(st.text(max_size=9), max_size=9)),
    st.tuples(st.just(ValueType.INT16), st.lists(st.integers(-(2**15), 2**15 - 1), max_size=9)),
)


@settings(max_examples=50, deadline=None)
@given(
    scalars=st.dictionaries(st.text(min_size=1, max_size=20).map("s.{}".format), SCALARS),
    arrays=st.dictionaries(st.text(min_size=1, max_size=20).map("a.{}".format), ARRAYS),
)
def test_any_metadata_come_back(
    tmp_path_factory: pytest.TempPathFactory, scalars: dict[str, Any], arrays: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    records = [encode_metadata(key, value, kind) for key, (kind, value) in scalars.items()]
    records += [
        encode_metadata(key, value, ValueType.ARRAY, element_type=kind)
        for key, (kind, value) in arrays.items()
    ]
    write_gguf(path, records, [])
    with GGUFFile.open(path) as file:
        expected = {key: value for key, (_, value) in {**scalars, **arrays}.items()}
        assert dict(file.metadata) == expected


@pytest.mark.parametrize(
    ("value", "value_type", "element_type"),
    [
        (256, ValueType.UINT8, None),
        (-1, ValueType.UINT32, None),
        ("text", ValueType.INT32, None),
        (7, ValueType.STRING, None),
        (7, ValueType.ARRAY, ValueType.INT32),
        ([1], ValueType.ARRAY, None),
        ([[1]], ValueType.ARRAY, ValueType.ARRAY),
        (["a"], ValueType.ARRAY, ValueType.FLOAT32),
        (1e39, ValueType.FLOAT32, None),
        (1, ValueType.BOOL, None),
        (True, ValueType.UINT32, None),
    ],
)
def test_values_that_do_not_fit_are_refused(
    value: Any, value_type: ValueType, element_type: ValueType | None
) -> None:
    with pytest.raises(UsageError, match=r"x\.key"):
        encode_metadata("x.key", value, value_type, element_type=element_type)


def test_alignment_must_be_what_the_metadata_say(tmp_path: Path) -> None:
    stated = encode_metadata("general.alignment", 64, ValueType.UINT32)
    write_gguf(
        tmp_path / "x.gguf", [stated], [zeros("a", 4, (1,)), zeros("b", 4, (1,))], alignment=64
    )
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.tensors["b"].offset - file.tensors["a"].offset == 64
    with pytest.raises(GGUFError, match=r"general\.alignment"):
        write_gguf(tmp_path / "y.gguf", [stated], [])
    with pytest.raises(GGUFError, match=r"general\.alignment"):
        write_gguf(tmp_path / "y.gguf", [], [], alignment=64)
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize(
    ("records", "tensors", "expected"),
    [
        ([], [zeros("a", 127)], "127 bytes came, 128 were expected"),
        ([], [zeros("a", 129)], "129 bytes came, 128 were expected"),
        ([], [zeros("a", 128), zeros("a", 128)], "a: this tensor name occurs twice"),
        ([], [zeros("a" * 64, 128)], "longer than 63 bytes"),
        (
            [encode_metadata("k", 1, ValueType.UINT8)] * 2,
            [],
            "k: this metadata key occurs twice",
        ),
    ],
)
def test_nothing_is_written_where_something_is_wrong(
    tmp_path: Path, records: list[bytes], tensors: list[TensorToWrite], expected: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there before")
    with pytest.raises(GGUFError, match=expected):
        write_gguf(path, records, tensors)
    assert path.read_bytes() == b"what was there before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_an_error_while_producing_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(64)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_gguf(tmp_path / "x.gguf", [], [TensorToWrite("a", (32,), GGMLType.F32, broken)])
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_produced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[bytes]:
        raise AssertionError("produced although there is no room")
        yield b""

    monkeypatch.setattr(writer, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    tensor = TensorToWrite("a", (4096,), GGMLType.F32, never)
    with pytest.raises(StorageError, match=r"16\.1 KiB needed, 1000 B free"):
        write_gguf(tmp_path / "x.gguf", [], [tensor])


def test_the_builder_of_these_tests_agrees_with_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "reference.gguf"
    reference = gguf.GGUFWriter(path, "llama")
    reference.add_string("general.name", "n")
    reference.add_tensor("t", np.arange(32, dtype=np.float32))
    reference.write_header_to_file()
    reference.write_kv_data_to_file()
    reference.write_tensors_to_file()
    reference.close()
    with GGUFFile.open(path) as file:
        copy_of(file, tmp_path / "copy.gguf")
        draft = Draft([file.metadata_record(key) for key in file.metadata])
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes()
    assert path.read_bytes()[24:].startswith(draft.records[0])
