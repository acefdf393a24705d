"""`preprocess`: what is written is what was read, once, in one form, split so that nothing leaks."""

from __future__ import annotations

import datetime
import gzip
import io
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ollatune.base.errors import InputError, UsageError
from ollatune.commands.preprocess import PreprocessOptions, preprocess_text, run_preprocess
from ollatune.config.schema import DataSource
from ollatune.data.load import data_sources
from ollatune.data.position import RecordError
from ollatune.data.prepare import PreparedData, prepare
from tests.data_fakes import Terminal, make_config
from tests.unit.test_data_loading import exchanges, load, write_jsonl


def prepared(raw: Path, output: Path, *, overwrite: bool = False, **settings: Any) -> PreparedData:
    config = make_config(**settings)
    return prepare(config, data_sources(config, raw), output, seed=1, overwrite=overwrite)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_split_and_written_once(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", exchanges(50) + exchanges(20))
    report = prepared(raw, tmp_path / "out", validation_fraction=0.2, test_fraction=0.1)
    assert report.num_records == {"train": 35, "validation": 10, "test": 5}
    assert (report.num_read, report.num_duplicates_removed, report.form) == (70, 20, "instruction")
    written = [
        row for name in report.num_records for row in rows(tmp_path / "out" / f"{name}.jsonl")
    ]
    assert sorted(row["instruction"] for row in written) == sorted(
        row["instruction"] for row in exchanges(50)
    )
    assert written[0].keys() == {"instruction", "context", "response"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(
        json.dumps(report.as_dict())
    )


def test_a_record_that_is_tested_on_is_not_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "train.jsonl", exchanges(20))
    write_jsonl(tmp_path / "raw" / "dev.jsonl", exchanges(5, 8))
    write_jsonl(tmp_path / "raw" / "test.jsonl", exchanges(5, 10))
    report = prepared(tmp_path / "raw", tmp_path / "out")
    assert report.num_records == {"train": 13, "validation": 2, "test": 5}
    splits = load(tmp_path / "out")
    assert all(leak.num_same_record == 0 for leak in splits.report.leakage)


def test_training_on_the_output_is_training_on_the_input(tmp_path: Path) -> None:
    raw = [
        {"instruction": "Sum.", "input": "1 2", "output": "3", "lang": "en", "score": 2},
        {"instruction": "Say.", "input": "", "output": 'é\n"x"', "system": "Be brief."},
    ]
    write_jsonl(tmp_path / "raw.jsonl", raw)
    prepared(tmp_path / "raw.jsonl", tmp_path / "out", validation_fraction=0, system="unused here")
    assert rows(tmp_path / "out" / "train.jsonl")[0] == {
        "instruction": "Sum.", "context": "1 2", "response": "3", "lang": "en", "score": 2.0,
    }  # fmt: skip
    before, after = (
        load(tmp_path / "raw.jsonl", validation_fraction=0),
        load(tmp_path / "out", validation_fraction=0),
    )
    assert [s.messages for s in before.samples["train"]] == [
        s.messages for s in after.samples["train"]
    ]


def test_chats_and_mixed_forms_become_messages(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chats = [
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "f", "content": "r"},
                {"role": "assistant", "content": "a", "thinking": "t"},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "x", "weight": 0},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "y"},
            ]
        },
    ]
    write_jsonl(tmp_path / "raw" / "chats.jsonl", chats)
    (tmp_path / "raw" / "more.csv").write_text('prompt,completion\n"a, b",c\n')
    report = prepared(tmp_path / "raw", tmp_path / "out", validation_fraction=0)
    assert report.form == "messages"
    assert report.source_forms == {str(tmp_path / "raw"): "messages, prompt-completion"}
    assert rows(tmp_path / "out" / "train.jsonl") == [
        *chats,
        {"messages": [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}]},
    ]


def test_documents_stay_documents_with_their_metadata(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["one", "two"],
            "day": [datetime.date(2024, 1, 2)] * 2,
            "weight": [float("nan"), 0.5],
        }
    )
    (tmp_path / "raw").mkdir()
    pq.write_table(table, tmp_path / "raw" / "chunks.parquet")
    (tmp_path / "raw" / "notes.md").write_text("# three\n")
    report = prepared(tmp_path / "raw", tmp_path / "out", validation_fraction=0)
    assert report.form == "text"
    assert rows(tmp_path / "out" / "train.jsonl") == [
        {"text": "one", "day": "2024-01-02", "weight": None},
        {"text": "two", "day": "2024-01-02", "weight": 0.5},
        {"text": "# three\n"},
    ]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", exchanges(30))
    prepared(raw, tmp_path / "out", test_fraction=0.2)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"train\.jsonl exists already"):
        prepared(raw, tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    prepared(raw, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_an_error_leaves_no_output(tmp_path: Path) -> None:
    bad: list[Any] = [*exchanges(30), {"instruction": "x"}]
    raw = write_jsonl(tmp_path / "raw.jsonl", bad)
    with pytest.raises(RecordError, match=r"raw\.jsonl:31"):
        prepared(raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = prepared(raw, tmp_path / "out", skip_bad=True)
    assert report.num_rejected == 1
    assert rows(tmp_path / "out" / "rejected.jsonl")[0]["line"] == 31
    assert (
        len(load(tmp_path / "out").train) == report.num_records["train"]
    )  # neither report nor rejects are data


def test_too_few_records_to_split(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "test.jsonl", exchanges(1))
    report = prepared(raw, tmp_path / "out")
    assert report.num_records == {"train": 1, "validation": 0, "test": 0}
    assert any("no validation split" in warning for warning in report.warnings)
    raw = write_jsonl(tmp_path / "two.jsonl", exchanges(2))
    report = prepared(raw, tmp_path / "out3", validation_fraction=0.9)
    assert report.num_records == {"train": 1, "validation": 1, "test": 0}
    (tmp_path / "only").mkdir()
    write_jsonl(tmp_path / "only" / "test.jsonl", exchanges(3))
    with pytest.raises(InputError, match="no record is left to train on"):
        prepared(tmp_path / "only", tmp_path / "out2")


def test_the_command_reports_in_json_and_words(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", exchanges(20) + exchanges(2))
    options = PreprocessOptions(
        raw, tmp_path / "out", assignments=("data.validation_fraction=0.2",)
    )
    result = run_preprocess(options)
    assert json.loads(json.dumps(result))["num_records"] == {
        "train": 16,
        "validation": 4,
        "test": 0,
    }
    text = preprocess_text(result)
    assert (
        f"22 records read, written to {tmp_path / 'out'}: train 16, validation 4 (instruction form)."
        in text
    )
    assert "Warning: 2 exact duplicates were left out." in text
    assert text.endswith(f"Next: ollatune train --data {tmp_path / 'out'}")


def _many_kinds_of_files(folder: Path) -> None:
    """Each larger than a buffer, so that it takes several reads."""
    long_text = "abcdefgh" * 25_000
    records = [{"instruction": f"{i} {long_text}?", "response": f"{i}"} for i in range(12)]
    data = write_jsonl(folder / "a.jsonl", records)
    rng = random.Random(5)
    noisy = [{**r, "response": rng.randbytes(200_000).hex()} for r in records]
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(folder / "b.jsonl", noisy).read_bytes())
    )
    (folder / "b.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(noisy), folder / "c.parquet", row_group_size=3)
    (folder / "d.json").write_text(f"[{','.join(data.read_text().splitlines())}]")


def test_both_readings_are_counted_in_bytes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    _many_kinds_of_files(raw)
    seen: list[tuple[int, int]] = []
    prepare(
        make_config(), data_sources(make_config(), raw), tmp_path / "out", seed=1,
        progress=lambda *numbers: seen.append(numbers),
    )  # fmt: skip
    size = sum(path.stat().st_size for path in raw.iterdir())
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {2 * size}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 2 * size)
    assert size in done
    # no step is larger than a row group or a buffer, so that the bar never stands still for long
    assert max(later - earlier for earlier, later in itertools.pairwise(done)) < size / 5


def test_the_bar_is_for_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", exchanges(50))

    def shown(stream: io.StringIO, *, show_progress: bool = True) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        run_preprocess(
            PreprocessOptions(raw, tmp_path / "out", overwrite=True, show_progress=show_progress)
        )
        return stream.getvalue()

    first = shown(Terminal())
    assert first.startswith("\rPreparing:   0%")
    assert "100%" in first
    assert shown(io.StringIO()) == ""
    assert shown(Terminal(), show_progress=False) == ""


def test_a_folder_without_training_files_says_so(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "test.jsonl", exchanges(4))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.docx").write_bytes(b"PK")
    for folder, cause in (("raw", "named after validation or test"), ("docs", "It holds a.docx.")):
        with pytest.raises(InputError, match=cause):
            prepare(
                make_config(), [DataSource(path=str(tmp_path / folder))], tmp_path / "out", seed=1
            )


def test_raw_data_is_never_overwritten(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "data" / "train.jsonl", exchanges(20))
    before = raw.read_bytes()
    with pytest.raises(UsageError, match="is read, and it lies in the output folder"):
        prepared(tmp_path / "data", tmp_path / "data", overwrite=True)
    assert raw.read_bytes() == before
    write_jsonl(tmp_path / "data" / "out" / "train.jsonl", exchanges(3))
    with pytest.raises(UsageError, match="is read, and it lies in the output folder"):
        prepared(tmp_path / "data", tmp_path / "data" / "out", overwrite=True)


def test_answers_among_documents_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "a.jsonl", [{"text": "once"}, {"text": "twice"}])
    chat = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    write_jsonl(tmp_path / "raw" / "b.jsonl", [{"messages": chat}])
    with pytest.raises(InputError, match=r"b\.jsonl:1: a record with an answer among plain docume"):
        prepared(tmp_path / "raw", tmp_path / "out")


def test_weights_tell_records_apart(tmp_path: Path) -> None:
    def row(weight: int) -> dict[str, Any]:
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in turns]
        messages[1]["weight"] = weight
        return {"messages": messages}

    raw = write_jsonl(tmp_path / "raw.jsonl", [row(0), row(1), row(0)])
    report = prepared(raw, tmp_path / "out", validation_fraction=0.0)
    assert (report.num_records["train"], report.num_duplicates_removed) == (2, 1)


def test_the_next_command_is_the_one_that_works(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", [{"text": f"Once {i}."} for i in range(20)])
    result = run_preprocess(PreprocessOptions(raw=raw, output=tmp_path / "the out"))
    assert preprocess_text(result).endswith(
        f"Next: ollatune train --data '{tmp_path / 'the out'}' "
        "--set training.method=continued-pretraining"
    )


def test_the_ids_of_tool_calls_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "abcdefghi"}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "a"},
    ]
    raw = write_jsonl(tmp_path / "raw.jsonl", [{"messages": messages}])
    prepared(raw, tmp_path / "out", validation_fraction=0.0)
    assert rows(tmp_path / "out" / "train.jsonl") == [{"messages": messages}]
