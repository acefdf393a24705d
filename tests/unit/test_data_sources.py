"""Readers against reference parsers, on any cut of the stream, and on damaged bytes."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ollatune.base.errors import InputError
from ollatune.data import sources
from ollatune.data.json_array import read_json
from ollatune.data.jsonl import read_jsonl
from ollatune.data.rejects import Rejections
from ollatune.data.sources import find_files, iter_records, read_text, split_of

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=5,
)
objects = st.dictionaries(texts, json_values, max_size=4)
HERE = Path("a.json")


class Drip(io.BytesIO):
    """Gives at most a few bytes a read, so that every value is cut somewhere."""

    def __init__(self, content: bytes, seed: int) -> None:
        super().__init__(content)
        self._random = random.Random(seed)

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._random.randint(1, 7))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(objects, max_size=6),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_json_lines_are_read_as_json_reads_them(
    rows: list[Any], ascii_only: bool, end: str
) -> None:
    content = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    records = list(read_jsonl(io.BytesIO(content.encode()), HERE, Rejections()))
    assert [record.value for record in records] == rows
    step = end.count("\n")
    assert [record.position.line for record in records] == [1 + step * i for i in range(len(rows))]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(objects, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    seed=st.integers(0, 999),
)
def test_json_arrays_are_read_alike_however_they_arrive(
    rows: list[Any], indent: int | None, ascii_only: bool, seed: int
) -> None:
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    records = list(read_json(Drip(content.encode(), seed), HERE, Rejections()))
    assert [record.value for record in records] == rows
    lines = content.split("\n")
    for record in records:
        assert lines[record.position.line - 1][record.position.column - 1] == "{"


@st.composite
def json_objects_as_text(draw: st.DrawFn, depth: int = 2) -> str:
    """An object with any spacing, colons in texts, and now and then a key that comes twice."""
    space = st.sampled_from(["", "", " ", "\t", " \n"])
    members = []
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(['"a"', '"b"', '"c:d"', '"e\\":"']))
        leaf = st.sampled_from(
            ['"x"', '": "', '" :"', '"\\":"', '"\\u003a"', '"\\u003A\\n"', "1", "[1, {}]", "null"]
        )
        value = draw(json_objects_as_text(depth - 1) | leaf if depth else leaf)
        if draw(st.booleans()):
            value = f"[{value}]"
        members.append(f"{key}{draw(space)}:{draw(space)}{value}")
    return "{" + ",".join(members) + "}"


@settings(max_examples=300, deadline=None)
@given(text=json_objects_as_text())
@example(text='{"a":1,"a":"\\u003a"}')
@example(text='{"a":1,"a":["\\u003A"],"b":[{"a":"\\u003A","a":1}]}')
def test_repeated_keys_are_found_wherever_they_stand(text: str) -> None:
    def repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            found.append(pairs)
        return dict(pairs)

    found: list[Any] = []
    expected = json.loads(text, object_pairs_hook=repeats)
    rejections = Rejections(skip_bad=True)
    records = list(read_jsonl(io.BytesIO(text.replace("\n", " ").encode()), HERE, rejections))
    assert bool(found) == bool(rejections.errors)
    if not found:
        assert [record.value for record in records] == [expected]


def test_a_number_cut_in_the_middle_is_one_bad_record() -> None:
    rejections = Rejections(skip_bad=True)
    records = list(read_json(Drip(b'[123456789012345678, {"text": "a"}]', 0), HERE, rejections))
    assert [record.value for record in records] == [{"text": "a"}]
    assert [str(error.position) for error in rejections.errors] == ["a.json:1:2"]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=6))
def test_csv_is_read_as_the_standard_library_writes_it(rows: list[tuple[str, str]]) -> None:
    rows = [(a.replace("\x00", ""), b.replace("\x00", "x")) for a, b in rows]
    rows = [
        (a.encode("utf-8", "ignore").decode(), b.encode("utf-8", "ignore").decode() or "x")
        for a, b in rows
    ]
    sink = io.StringIO()
    csv.writer(sink).writerows([("one", "two"), *rows])
    from ollatune.data.tables import read_csv

    records = list(read_csv(io.BytesIO(sink.getvalue().encode()), Path("a.csv"), Rejections()))
    assert [tuple(record.value.values()) for record in records] == rows


def test_long_texts_come_in_pieces_that_join_to_the_whole() -> None:
    paragraph = "A line of text.\nAnother line.\n\n"
    content = paragraph * 50_000
    pieces = [record.value for record in read_text(io.BytesIO(content.encode()), Path("a.txt"))]
    assert len(pieces) == 2
    assert "".join(piece.text for piece in pieces) == content
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text) < 3 << 20 for piece in pieces)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"), ("training-00001.parquet", "train"), ("emails_train.csv", "train"),
        ("valid.json", "validation"), ("validation-2.jsonl", "validation"), ("dev.jsonl.gz", "validation"),
        ("eval/a.jsonl", "validation"), ("val/train_notes.jsonl", "train"), ("test/part-1.jsonl", "test"),
        ("my-test.jsonl", "test"), ("TEST.jsonl", "test"), ("testimony.jsonl", None), ("devices.csv", None),
        ("trainer/a.jsonl", None), ("data.jsonl", None), ("123.jsonl", None),
    ],
)  # fmt: skip
def test_splits_are_known_by_whole_words(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def test_glob_patterns_name_several_files(tmp_path: Path) -> None:
    for name in ("a-train.jsonl", "b-test.jsonl", "c.bin"):
        (tmp_path / name).write_text("{}")
    found = find_files(str(tmp_path / "*"))
    assert [(f.path.name, f.split) for f in found] == [
        ("a-train.jsonl", "train"),
        ("b-test.jsonl", "test"),
    ]


def _parquet() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"text {i}" for i in range(50)], "n": list(range(50))})
    pq.write_table(table, sink, row_group_size=20)
    return sink.getvalue()


SEEDS = {
    ".jsonl": b'{"text": "a\\u00e9", "n": [1, {"b": null}]}\n{"text": "b"}\r\n\n{"text": "\xc3\xa9"}',
    ".json": b'[\n {"text": "a", "n": -1.5e3},\n {"text": "b\\n"}, {"text": "c", "x": [true, false]}\n]\n',
    ".csv": b'text,n\n"a, b",1\nc,2\n"d\n""e""",3\n',
    ".txt": b"one\n\ntwo\fthree\r\n\xc3\xa9\n",
    ".parquet": _parquet(),
}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("suffix", SEEDS)
def test_damaged_files_give_records_or_our_error(
    suffix: str, data: st.DataObject, tmp_path: Path
) -> None:
    content = bytearray(SEEDS[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["flip", "insert", "cut", "repeat"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "cut":
            del content[at:]
        else:
            content += content[at:]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(content))
    errors: list[str] = []
    for rejections in (Rejections(), Rejections(skip_bad=True)):
        try:
            for record in iter_records(path, rejections):
                assert str(record.position).startswith(str(path))
        except InputError as error:
            errors.append(str(error))
    assert all(str(path) in error and "\n" not in error for error in errors)


def test_endings_are_known_in_any_case(tmp_path: Path) -> None:
    row = {"instruction": "a, b", "response": "c"}
    (tmp_path / "A.TSV").write_text("instruction\tresponse\na, b\tc\n")
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(json.dumps(row).encode()))
    for file in find_files(tmp_path):
        assert [record.value for record in iter_records(file.path)] == [row]


def test_times_in_nanoseconds_are_no_damage(tmp_path: Path) -> None:
    """Python has no type for them, and no field of a record is one."""
    path = tmp_path / "a.parquet"
    kinds = {
        "when": pa.array([2_000_001, None], pa.timestamp("ns", "UTC")),
        "lasted": pa.array([2_001, None], pa.duration("ns")),
        "at": pa.array([2_001, None], pa.time64("ns")),
    }
    pq.write_table(pa.table({"text": ["a", "b"], **kinds}), path)
    first, second = (record.value for record in iter_records(path))
    assert first == {
        "text": "a",
        "when": datetime.datetime(1970, 1, 1, 0, 0, 0, 2000, datetime.timezone.utc),
        "lasted": datetime.timedelta(microseconds=2),
        "at": datetime.time(0, 0, 0, 2),
    }
    assert second == {"text": "b", "when": None, "lasted": None, "at": None}


TURN, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [{"function": {"name": "f"}}], "messages": [TURN, ANSWER]},
        {"prompt": [TURN], "completion": [ANSWER]},
        {"chat": [TURN, ANSWER]},
        {"dialog": [{"from": "human", "value": "a"}]},
    ],
)
def test_lists_in_a_record_are_not_records(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert [record.value for record in iter_records(path)] == [row, row]


def test_records_under_a_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": [{"text": "a"}]}))
    with pytest.raises(InputError, match="the records stand under the key `data`"):
        list(iter_records(path))


def test_linked_folders_are_read_once_and_never_in_circles(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jsonl").write_text('{"text": "a"}')
    data = tmp_path / "data"
    data.mkdir()
    (data / "b.jsonl").write_text('{"text": "b"}')
    os.symlink(elsewhere, data / "train", target_is_directory=True)
    os.symlink(elsewhere, data / "twice", target_is_directory=True)
    os.symlink(data, elsewhere / "back", target_is_directory=True)
    found = [(str(f.path.relative_to(data)), f.split) for f in find_files(data)]
    assert found == [("b.jsonl", None), (os.path.join("train", "a.jsonl"), "train")]


def test_tables_are_data_whatever_their_name_and_what_is_left_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(sources._log, "warning", lambda text, *values: told.append(text % values))
    for name in ("notices.jsonl", "license-faq.csv", "README.md", "LICENSE.txt", "b.xlsx", "c.png"):
        (tmp_path / name).write_text("x")
    for _ in range(2):
        found = [file.path.name for file in find_files(tmp_path)]
    assert found == ["license-faq.csv", "notices.jsonl"]
    assert told == [
        f"{tmp_path}: 1 files are of no kind that can be read and are left out: b.xlsx."
    ]
