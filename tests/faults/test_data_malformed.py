"""Malformed data, file by file: each is refused with its exact place, a one-line cause and a one-line cure,
or - where that is right - read as it was meant. With `skip_bad`, bad records are set aside; damaged files are not."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ollatune.base.errors import InputError
from ollatune.data.load import DatasetSplits, load_examples
from ollatune.data.position import FileError, RecordError
from ollatune.data.sources import find_files, iter_records
from tests.data_fakes import ByteTokenizer, ChatMLTemplate, make_config

GOOD = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(60)]
LINES = [json.dumps(row).encode() for row in GOOD]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(60)
]


def load(path: Path, **settings: Any) -> DatasetSplits:
    method = settings.pop("method", "fine-tuning")
    max_length = settings.pop("max_length", 512)
    config = make_config(validation_fraction=0, **settings)
    return load_examples(
        config, ByteTokenizer(), ChatMLTemplate(), max_length=max_length, path=path, method=method
    )


def lines_with(bad: bytes, at: int = 41) -> bytes:
    """60 lines of which line `at` is `bad`."""
    return b"\n".join([*LINES[: at - 1], bad, *LINES[at:]]) + b"\n"


def chat_lines(messages: Any, at: int = 41) -> bytes:
    rows: list[Any] = list(CHATS)
    rows[at - 1] = {"messages": messages}
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Case:
    """A file, and the error it must give. `where` follows the file's name: ':41:9', or ': row group 0, row 3'."""

    name: str
    content: bytes | Callable[[Path], None]
    where: str
    cause: str
    cure: str
    is_skippable: bool = False
    suffix: str = ".jsonl"


U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}


def parquet(rows: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def parquet_with_broken_page() -> bytes:
    """60 rows in three groups; the data of the second is damaged."""
    content = parquet(
        GOOD, row_group_size=20, compression="none", use_dictionary=False, write_page_checksum=True
    )
    at = content.index(b"q25")
    return flipped(content, at)


def parquet_with_declared_size() -> bytes:
    """A text whose length is declared as 4 GiB - 1."""
    content = parquet(GOOD, compression="none", use_dictionary=False)
    return content.replace(b"\x02\x00\x00\x00q5", b"\xff\xff\xff\xffq5", 1)


def zst_with_declared_size() -> bytes:
    """A frame that declares 4 GiB of content and a window of 2 GiB."""
    frame_header = b"\x28\xb5\x2f\xfd" + b"\xc0" + bytes([(21 << 3)]) + struct.pack("<Q", 4 << 30)
    return frame_header + b"\x01\x00\x00"


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", b"\n".join(LINES))


def symlink_loop(path: Path) -> None:
    other = path.with_name("other.jsonl")
    path.symlink_to(other)
    other.symlink_to(path)


def csv_of(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


CSV_ROWS = [f"q{i},a{i}" for i in range(60)]

CASES = [
    # JSON Lines: one bad line among good ones
    Case(
        "bad JSON",
        lines_with(b'{"instruction": "a" "response": "b"}'),
        ":41:21",
        "not valid JSON: expecting ',' delimiter",
        "Correct",
        True,
    ),
    Case(
        "truncated last line",
        b"\n".join([*LINES, b'{"instruction": "a", "resp']),
        ":61:22",
        "ends in the middle",
        "again",
        True,
    ),
    Case(
        "missing key",
        lines_with(b'{"instruction": "a"}'),
        ":41",
        "the field `response` is missing as in the first record",
        "Add it",
        True,
    ),
    Case(
        "wrong type",
        lines_with(b'{"instruction": "a", "response": 7}'),
        ":41",
        "`response` must be text, found a number",
        "string",
        True,
    ),
    Case(
        "list instead of text",
        lines_with(b'{"instruction": "a", "response": ["b"]}'),
        ":41",
        "`response` must be text, found a list",
        "string",
        True,
    ),
    Case(
        "null",
        lines_with(b'{"instruction": "a", "response": null}'),
        ":41",
        "`response` must be text, found null",
        "string",
        True,
    ),
    Case("empty messages", chat_lines([]), ":41", "`messages` is an empty list", "remove", True),
    Case(
        "role typo",
        chat_lines([{"role": "usr", "content": "u"}, A]),
        ":41",
        "`messages[0].role` is 'usr'",
        "Did you mean `user`?",
        True,
    ),
    Case(
        "two answers in a row",
        chat_lines([U, A, A]),
        ":41",
        "`messages[2]` is a second assistant message in a row",
        "Join",
        True,
    ),
    Case(
        "system not first",
        chat_lines([U, {"role": "system", "content": "s"}, A]),
        ":41",
        "`messages[1]` is a system message but not the first",
        "front",
        True,
    ),
    Case(
        "empty answer",
        chat_lines([U, {"role": "assistant", "content": ""}]),
        ":41",
        "`messages[1]` is an empty answer",
        "Write",
        True,
    ),
    Case("only prompts", chat_lines([U]), ":41", "no assistant message", "Add the answer", True),
    Case(
        "all labels masked",
        chat_lines([U, {**A, "weight": 0}]),
        ":41",
        "every assistant message has weight 0",
        "weight 1",
        True,
    ),
    Case(
        "Latin-1 byte",
        lines_with('{"instruction": "é", "response": "b"}'.encode("latin-1")),
        ":41:18",
        "byte 0xe9 is not UTF-8",
        "iconv -f LATIN1",
        True,
    ),
    Case(
        "mixed encodings",
        lines_with('{"instruction": "grün", "response": "s'.encode() + b'\xfc\xdf"}'),
        ":41:39",
        "byte 0xfc is not UTF-8",
        "iconv",
        True,
    ),
    Case(
        "NUL bytes",
        lines_with(b'{"instruction": "a\x00b", "response": "c"}'),
        ":41:19",
        "raw NUL byte inside a string",
        "\\u0000",
        True,
    ),
    Case(
        "NUL bytes for a line",
        lines_with(b"\x00" * 20),
        ":41:1",
        "NUL bytes instead of text",
        "Remove",
        True,
    ),
    Case(
        "escaped NUL",
        lines_with(b'{"instruction": "a\\u0000b", "response": "c"}'),
        ":41",
        "`instruction` contains a NUL character",
        "Remove",
        True,
    ),
    Case(
        "lone surrogate",
        lines_with(b'{"instruction": "a", "response": "\\ud83d"}'),
        ":41",
        "lone surrogate \\ud83d",
        "Write the character",
        True,
    ),
    Case(
        "control character",
        lines_with(b'{"instruction": "a\x01", "response": "c"}'),
        ":41:19",
        "raw control character 0x01",
        "\\u0001",
        True,
    ),
    Case(
        "CR only",
        b"\r".join(LINES),
        f":1:{len(LINES[0]) + 2}",
        "second record after a bare carriage return",
        "tr ",
        False,
    ),
    Case(
        "100 k nesting",
        lines_with(b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ":41",
        "nested too deeply",
        "Flatten",
        True,
    ),
    Case(
        "5,000-digit integer",
        lines_with(b'{"id": ' + b"9" * 5000 + b', "instruction": "a", "response": "b"}'),
        ":41:8",
        "thousands of digits",
        "string",
        True,
    ),
    Case(
        "NaN",
        lines_with(b'{"instruction": "NaN", "response": "b", "x": NaN}'),
        ":41:46",
        "NaN is not JSON",
        "null",
        True,
    ),
    Case(
        "Infinity",
        lines_with(b'{"instruction": "a", "response": "b", "x": -Infinity}'),
        ":41:44",
        "-Infinity is not JSON",
        "null",
        True,
    ),
    Case(
        "duplicate keys",
        lines_with(b'{"instruction": "a", "response": "b", "response": "c"}'),
        ":41:39",
        '"response" stands twice',
        "Keep one",
        True,
    ),
    Case(
        "mixed schemas",
        lines_with(json.dumps(CHATS[0]).encode()),
        ":41",
        "a record in the `messages` form among records in the `instruction` form",
        "two files",
        True,
    ),
    Case(
        "two records on a line",
        lines_with(LINES[0] + b" " + LINES[1]),
        f":41:{len(LINES[0]) + 2}",
        "text after the end of the record",
        "own line",
        True,
    ),
    Case(
        "a bare value",
        lines_with(b'"just text"'),
        ":41",
        "expected a JSON object, found a string",
        "record",
        True,
    ),
    Case(
        "line over the limit",
        lines_with(b'{"instruction": "' + b"x" * (33 << 20) + b'", "response": "b"}'),
        ":41",
        "longer than 32.0 MiB",
        "Split",
        True,
    ),
    # JSON Lines: the file as a whole
    Case("empty file", b"", ":1", "no record", "fill it"),
    Case("blank lines only", b"\n \n\r\n", ":1", "no record", "fill it"),
    Case(
        "UTF-16 LE",
        "\ufeff".encode("utf-16-le") + '{"text": "a"}\n'.encode("utf-16-le"),
        ":1",
        "UTF-16",
        "iconv -f UTF-16",
    ),
    Case(
        "UTF-16 BE",
        "\ufeff".encode("utf-16-be") + '{"text": "a"}\n'.encode("utf-16-be"),
        ":1",
        "UTF-16",
        "iconv -f UTF-16",
    ),
    Case(
        "UTF-16 without mark",
        '{"text": "a"}\n'.encode("utf-16-le"),
        ":1",
        "UTF-16",
        "iconv -f UTF-16",
    ),
    Case(
        "JSON array in .jsonl",
        json.dumps(GOOD).encode(),
        ":1",
        "JSON array, not JSON Lines",
        ".json`",
    ),
    Case(
        "indented JSON in .jsonl",
        json.dumps(GOOD[0], indent=1).encode(),
        ":1",
        "goes on in the next line",
        ".json`",
    ),
    Case(
        "single quotes",
        lines_with(b"{'instruction': 'a', 'response': 'b'}"),
        ":41:2",
        "the quote ' is not JSON's",
        "double quotes",
        True,
    ),
    Case(
        "comma before the brace",
        lines_with(b'{"instruction": "a", "response": "b",}'),
        ":41:38" if sys.version_info < (3, 13) else ":41:37",
        "comma before the closing }" if sys.version_info < (3, 13) else "trailing comma",
        "Remove the comma" if sys.version_info < (3, 13) else "Correct",
        True,
    ),
    Case("PDF called .jsonl", b"%PDF-1.7\n%\xe2\xe3\n", ":1", "PDF document", "pdftotext"),
    Case("gzip called .jsonl", gzip.compress(b"\n".join(LINES)), ":1", "gzip-compressed", ".gz`"),
    Case("zip", a_zip, ":1", "zip archive", "unzip"),
    Case(
        "HTML error page",
        b"<!DOCTYPE html>\n<html><body>404</body></html>",
        ":1",
        "HTML page",
        "Download",
    ),
    Case(
        "Git LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        ":1",
        "Git LFS pointer",
        "git lfs pull",
    ),
    Case(
        "gzip cut off",
        gzip.compress(b"\n".join(LINES), mtime=0)[:-60],
        ":",
        "damaged or cut off here",
        "again",
        suffix=".jsonl.gz",
    ),
    Case(
        "zstd cut off",
        zstandard.compress(b"\n".join(LINES))[:-20],
        ":",
        "damaged or cut off here",
        "again",
        suffix=".jsonl.zst",
    ),
    Case(
        "gzip that is none",
        b"\n".join(LINES),
        "",
        "damaged or cut off",
        "again",
        suffix=".jsonl.gz",
    ),
    Case(
        "4 GB declared by zstd",
        zst_with_declared_size(),
        "",
        "damaged or cut off",
        "again",
        suffix=".jsonl.zst",
    ),
    Case(
        "a folder called .jsonl",
        lambda p: p.mkdir(),
        "",
        "no data file in this folder",
        "Expected files ending",
    ),
    Case(
        "FIFO", lambda p: os.mkfifo(p), "", "a pipe or device, not a regular file", "Save the data"
    ),
    Case(
        "symlink loop",
        symlink_loop,
        "",
        "cannot be read: too many levels of symbolic links",
        "symbolic links",
    ),
    Case("missing file", lambda p: None, "", "no such file", ""),
    Case(
        "unknown ending",
        b"x",
        "",
        "does not end like a data file",
        "Expected one of",
        suffix=".xlsx",
    ),
    Case(
        "a record over several lines",
        b'{"instruction": "a",\n "response": "b"}\n',
        ":1",
        "goes on in the next line: this is JSON",
        "`.json`",
    ),
    # JSON arrays
    Case(
        "comma before the bracket",
        b'[{"instruction": "a", "response": "b"},\n]',
        ":2:1",
        "a comma before the closing ]",
        "Remove the comma",
        suffix=".json",
    ),
    Case(
        "array cut off",
        json.dumps(GOOD, indent=0).encode()[:-3],
        ":",
        "ends in the middle|has no end",
        "again",
        suffix=".json",
    ),
    Case(
        "array without comma",
        b'[\n{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": "b"}\n]',
        ":3:1",
        "expected `,` or `]`",
        "Correct",
        suffix=".json",
    ),
    Case(
        "bad value in array",
        b'[\n {"instruction": "a", "response": "b"},\n {"instruction": "a", response": "b"}\n]',
        ":3:23",
        "not valid JSON",
        "Correct",
        suffix=".json",
    ),
    Case(
        "records under a key",
        json.dumps({"data": GOOD}).encode(),
        ":1:1",
        "under the key `data`",
        "jq '.data'",
        suffix=".json",
    ),
    # CSV
    Case(
        "header only", csv_of("instruction,response"), ":1", "no record", "fill it", suffix=".csv"
    ),
    Case(
        "ragged row",
        csv_of("instruction,response", *CSV_ROWS[:30], "a,b,c", *CSV_ROWS),
        ":32",
        "3 fields where the header has 2",
        "Quote",
        True,
        ".csv",
    ),
    Case(
        "unterminated quote",
        csv_of("instruction,response", *CSV_ROWS[:30], 'a,"b', *CSV_ROWS),
        ":32",
        "no closing quote",
        "Close it",
        suffix=".csv",
    ),
    Case(
        "wrong delimiter",
        csv_of("instruction;response", "a;b"),
        ":1",
        "separated by semicolons",
        "commas",
        suffix=".csv",
    ),
    Case(
        "duplicate columns",
        csv_of("instruction,response,response", "a,b,c"),
        ":1",
        "two columns are called `response`",
        "Rename",
        suffix=".csv",
    ),
    Case(
        "Latin-1 in CSV",
        "instruction,response\na,b\né,c\n".encode("latin-1"),
        ":3:1",
        "byte 0xe9 is not UTF-8",
        "iconv",
        suffix=".csv",
    ),
    Case(
        "empty CSV answer",
        csv_of("instruction,response", *CSV_ROWS[:30], "a,", *CSV_ROWS),
        ":32",
        "`response` is empty",
        "Fill",
        True,
        ".csv",
    ),
    # Parquet
    Case("parquet cut off", parquet(GOOD)[:-10], "", "no footer", "again", suffix=".parquet"),
    Case(
        "wrong magic",
        b"PAR2" + parquet(GOOD)[4:],
        "",
        "begins with b'PAR2'",
        "Check",
        suffix=".parquet",
    ),
    Case(
        "bit flip in a page",
        parquet_with_broken_page(),
        ": row group 1, row 0",
        "damaged Parquet data",
        "Write the file again",
        suffix=".parquet",
    ),
    Case(
        "4 GB declared by a field",
        parquet_with_declared_size(),
        ": row group 0, row 0",
        "damaged Parquet data",
        "Write the file again",
        suffix=".parquet",
    ),
    Case(
        "nested struct",
        parquet([{"instruction": {"a": "b"}, "response": "c"}]),
        ": row group 0, row 0",
        "`instruction` must be text, found an object",
        "string",
        suffix=".parquet",
    ),
    Case(
        "null in parquet",
        parquet([*GOOD[:50], {"instruction": "a", "response": None}], row_group_size=20),
        ": row group 2, row 10",
        "`response` must be text, found null",
        "string",
        True,
        ".parquet",
    ),
    Case(
        "zero rows",
        parquet(pa.table({"text": pa.array([], pa.string())})),
        ":1",
        "no record",
        "fill it",
        suffix=".parquet",
    ),
    Case(
        "integer keys",
        parquet(pa.table({"text": pa.array([[(1, "a")]], pa.map_(pa.int64(), pa.string()))})),
        ": row group 0, row 0",
        "`text` must be text, found a list",
        "string",
        suffix=".parquet",
    ),
    Case(
        "encrypted footer",
        b"PARE" + b"\x00" * 40 + b"PARE",
        "",
        "encrypted",
        "Decrypt",
        suffix=".parquet",
    ),
    # Text
    Case(
        "binary called .txt",
        b"\x7fELF\x02\x01\x01\x00\x00",
        ":1:8",
        "NUL byte: this is not a text file",
        "Remove",
        suffix=".txt",
    ),
    Case(
        "Latin-1 text",
        "one\ntwo é\n".encode("latin-1"),
        ":2:5",
        "byte 0xe9 is not UTF-8",
        "iconv",
        suffix=".txt",
    ),
]


def write(case: Case, folder: Path) -> Path:
    path = folder / f"file{case.suffix}"
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


def method_of(case: Case) -> str:
    return "continued-pretraining" if case.suffix == ".txt" else "fine-tuning"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_strict(case: Case, tmp_path: Path) -> None:
    path = write(case, tmp_path)
    with pytest.raises(InputError) as caught:
        load(path, method=method_of(case))
    message, hint = caught.value.message, caught.value.hint
    assert message.startswith(f"{path}{case.where}")
    if case.where and not case.where.endswith(":"):
        rest = message.removeprefix(f"{path}{case.where}")
        assert rest.startswith(": ")  # the place ends here: no column or row more than expected
    assert re.search(case.cause, message) or case.cause in message
    assert case.cure in hint
    assert "\n" not in message + hint


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_skip_bad(case: Case, tmp_path: Path) -> None:
    path = write(case, tmp_path)
    if not case.is_skippable:
        with pytest.raises(InputError):
            load(path, method=method_of(case), skip_bad=True)
        return
    splits = load(path, skip_bad=True)
    splits.rejections.write(tmp_path / "rejected.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert row["position"].startswith(f"{path}{case.where}")
    assert case.cause in row["reason"]
    assert case.cure in row["cure"]
    assert len(splits.train) >= 50
    assert splits.report.warnings[0].startswith("1 bad records were set aside, the first: ")


ACCEPTED: list[tuple[str, bytes, str, int]] = [
    ("BOM", b"\xef\xbb\xbf" + b"\n".join(LINES), ".jsonl", 60),
    ("CRLF", b"\r\n".join(LINES), ".jsonl", 60),
    ("mixed newlines", b"\n".join(LINES[:30]) + b"\r\n" + b"\r\n".join(LINES[30:]), ".jsonl", 60),
    ("no final newline", b"\n".join(LINES), ".jsonl", 60),
    ("blank lines between", b"\n\n".join(LINES) + b"\n\n\n", ".jsonl", 60),
    ("spaces around", b"\n".join(b"  " + line + b" \t" for line in LINES), ".jsonl", 60),
    ("JSON Lines called .json", b"\n".join(LINES), ".json", 60),
    ("JSON array", json.dumps(GOOD, indent=2).encode(), ".json", 60),
    ("one JSON object", LINES[0], ".json", 1),
    ("gzip", gzip.compress(b"\n".join(LINES)), ".jsonl.gz", 60),
    ("gzip members", gzip.compress(LINES[0] + b"\n") + gzip.compress(LINES[1]), ".jsonl.gz", 2),
    ("zstd", zstandard.compress(b"\n".join(LINES)), ".jsonl.zst", 60),
    (
        "zstd frames",
        zstandard.compress(LINES[0] + b"\n") + zstandard.compress(LINES[1]),
        ".jsonl.zst",
        2,
    ),
    (
        "CSV with a BOM and CRLF",
        ("\ufeffinstruction,response\r\n" + "\r\n".join(CSV_ROWS)).encode(),
        ".csv",
        60,
    ),
    ("CSV with quoted newlines", b'instruction,response\n"a\n""b""","c,d"\n', ".csv", 1),
    ("TSV", b"instruction\tresponse\na\tb\n", ".tsv", 1),
    (
        "Parquet dictionary column",
        parquet(GOOD, use_dictionary=True, compression="zstd"),
        ".parquet",
        60,
    ),
    ("Parquet of messages", parquet(CHATS), ".parquet", 60),
    (
        "Parquet large strings",
        parquet(
            pa.Table.from_pylist(GOOD).cast(
                pa.schema([("instruction", pa.large_string()), ("response", pa.large_string())])
            )
        ),
        ".parquet",
        60,
    ),
]


@pytest.mark.parametrize(
    ("content", "suffix", "count"), [c[1:] for c in ACCEPTED], ids=[c[0] for c in ACCEPTED]
)
def test_harmless_oddities_are_read_as_meant(
    content: bytes, suffix: str, count: int, tmp_path: Path
) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    splits = load(path)
    assert len(splits.train) == count
    assert splits.rejections.errors == []
    if count == 60:
        expected = load(write(Case("", b"\n".join(LINES), "", "", ""), tmp_path))
        assert [s.messages for s in splits.samples["train"]] == [
            s.messages for s in expected.samples["train"]
        ]


def test_form_feeds_part_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("page one\fpage two\n")
    (sample,) = load(path, method="continued-pretraining").samples["train"]
    assert sample.text == "page one\n\npage two\n"


def test_long_samples_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*GOOD, {"instruction": "x" * 900, "response": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load(path, max_length=200)
    assert splits.report.rendering.num_truncated == 1
    assert any("longer than 200 tokens (the longest has 9" in w for w in splits.report.warnings)


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\.jsonl: the pattern matches no data file"):
        find_files(tmp_path / "*.jsonl")


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(LINES))
    path.chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="cannot be read: permission denied") as caught:
            load(path)
    finally:
        if is_root:
            os.seteuid(0)
    assert "chmod u+r" in caught.value.hint


def test_a_file_deleted_while_it_is_read_is_still_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(LINES * 500))
    records = iter_records(path)
    next(records)
    path.unlink()
    assert 1 + sum(1 for _ in records) == 60 * 500


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    records = iter_records(path)
    next(records)
    with path.open("ab") as stream:
        stream.write(LINES[0] + b"\n")
    with pytest.raises(
        FileError, match=r"changed while it was being read \(from \d+ to \d+ bytes\)"
    ):
        list(records)


def test_a_pipe_never_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            list(iter_records(path))
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert len(caught) == 1


MEASURE = """
import sys
from ollatune.base.memory import peak_resident_bytes
from ollatune.data.position import RecordError
from ollatune.data.rejects import Rejections
from ollatune.data.sources import iter_records
rejections = Rejections(skip_bad=True)
count = sum(1 for _ in iter_records(sys.argv[1], rejections))
print(count, len(rejections.errors), peak_resident_bytes() >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_line_of_100_mb_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b"\n".join(LINES[:40]) + b'\n{"instruction": "')
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
        stream.write(b'", "response": "b"}\n' + b"\n".join(LINES[40:]))
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    ).stdout
    count, num_rejected, peak_mib = map(int, output.split())
    assert (count, num_rejected) == (60, 1)
    assert peak_mib < 300


def test_one_bad_record_never_hides_behind_another(tmp_path: Path) -> None:
    """Every good record of a file with several kinds of bad ones is read, and every bad one reported, in order."""
    lines = [*LINES]
    for at, bad in (
        (5, b"{"),
        (17, b'{"instruction": "a"}'),
        (30, b"\xff"),
        (31, b"[1]"),
        (50, b'{"a": NaN}'),
    ):
        lines[at - 1] = bad
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines * 3))
    with pytest.raises(InputError, match="15 of 180 records are bad"):
        load(path, skip_bad=True)
    path.write_bytes(b"\n".join(lines + LINES * 2))
    splits = load(path, skip_bad=True)
    assert [row["line"] for row in splits.rejections.rows()] == [5, 17, 30, 31, 50]
    assert len(splits.train) == 175


def test_errors_are_record_errors_with_positions(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_with(b"{"))
    with pytest.raises(RecordError) as caught:
        load(path)
    assert (caught.value.position.line, caught.value.position.path) == (41, str(path))
    assert caught.value.exit_code == 3
