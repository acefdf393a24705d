"""The cache on disk: equal to reading into memory, built in pieces, resumable, keyed by all it depends on."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ollatune.base.errors import InputError
from ollatune.base.locks import try_lock
from ollatune.base.log import get_logger
from ollatune.data.cache import load_cached
from ollatune.data.chunks import iter_chunk, plan_chunks, scan_file
from ollatune.data.load import DatasetSplits, load_examples
from ollatune.data.position import RecordError
from ollatune.data.progress import BuildBar
from ollatune.data.rejects import Rejections
from ollatune.data.sources import DataFile, find_files, iter_records
from tests.data_fakes import ByteTokenizer, ChatMLTemplate, Terminal, make_config
from tests.unit.test_data_loading import exchanges, write_jsonl


def make_parts(counter: Path | None = None) -> tuple[ByteTokenizer, ChatMLTemplate]:
    """Module-level, so that worker processes can import it."""
    if counter:
        with counter.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
    return ByteTokenizer(), ChatMLTemplate()


def cached(path: Path, folder: Path, **settings: Any) -> DatasetSplits:
    options = {"max_length": 512, "num_workers": 1, "chunk_bytes": 1000, **settings}
    known = {
        k: options.pop(k)
        for k in ("max_length", "num_workers", "chunk_bytes", "method")
        if k in options
    }
    parts = options.pop("parts", make_parts)
    return load_cached(
        make_config(**options), *parts(), make_parts=parts, cache_folder=folder, path=path, **known
    )


def in_memory(path: Path, **settings: Any) -> DatasetSplits:
    method = settings.pop("method", "fine-tuning")
    return load_examples(
        make_config(**settings), *make_parts(), max_length=512, path=path, method=method
    )


def assert_equal(one: DatasetSplits, other: DatasetSplits) -> None:
    assert one.report == other.report
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(one, split), getattr(other, split)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.lengths.tolist() == theirs.lengths.tolist()
            assert ours.num_targets.tolist() == theirs.num_targets.tolist()
            for i in range(len(ours)):
                assert np.array_equal(ours[i].token_ids, theirs[i].token_ids)
                assert np.array_equal(ours[i].is_target, theirs[i].is_target)
        assert list(one.samples[split]) == list(other.samples[split])


def mixed_folder(folder: Path) -> Path:
    """JSON Lines longer than a piece, Parquet of several row groups, CSV, a JSON array and named splits."""
    write_jsonl(folder / "a.jsonl", exchanges(60))
    (folder / "b.json").write_text(json.dumps(exchanges(5, 100), indent=1))
    rows = exchanges(40, 200)
    columns = {key: [row[key] for row in rows] for key in ("instruction", "response")}
    pq.write_table(pa.table(columns), folder / "c.parquet", row_group_size=7)
    lines = ["instruction,response", *(f'"q, {i}","a\n{i}"' for i in range(10))]
    (folder / "d.csv").write_text("\n".join(lines))
    write_jsonl(folder / "test" / "e.jsonl", exchanges(4, 300))
    return folder


def test_the_cache_equals_reading_into_memory(tmp_path: Path) -> None:
    data = mixed_folder(tmp_path / "data")
    settings = {"validation_fraction": 0.1}
    assert_equal(cached(data, tmp_path / "cache", **settings), in_memory(data, **settings))
    assert_equal(cached(data, tmp_path / "cache", **settings), in_memory(data, **settings))


def test_documents_and_windows_are_equal_too(tmp_path: Path) -> None:
    rows = [{"text": f"Document {i}. " * (i % 9 + 1), "page": i} for i in range(80)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    settings: dict[str, Any] = {"method": "continued-pretraining", "window_overlap": 16}
    one = cached(data, tmp_path / "cache", **settings)
    assert_equal(one, in_memory(data, **settings))
    assert len(os.listdir(next((tmp_path / "cache").glob("?" * 32)))) > 6


@pytest.mark.slow
def test_worker_processes_make_the_same_cache(tmp_path: Path) -> None:
    data = mixed_folder(tmp_path / "data")
    counter = tmp_path / "calls"
    parts = functools.partial(make_parts, counter)
    assert_equal(cached(data, tmp_path / "cache", num_workers=2, parts=parts), in_memory(data))
    assert len(set(counter.read_text().split())) >= 2  # the parent and at least one worker


def test_a_finished_piece_is_not_made_again(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(100))
    cached(data, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("?" * 32)
    pieces = sorted(folder.glob("*.tokens"))
    assert len(pieces) > 3
    before = {path: path.stat().st_mtime_ns for path in pieces}
    pieces[1].write_bytes(b"cut off")
    (folder / "chunk-000002.json").unlink()
    assert_equal(cached(data, tmp_path / "cache"), in_memory(data))
    again = [i for i, path in enumerate(pieces) if path.stat().st_mtime_ns != before[path]]
    assert again == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 30},
        {"targets": "last"},
        {"system": "S"},
        {"truncation": "left"},
        {"data": True},
    ],
)
def test_everything_that_matters_changes_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(10))
    cached(data, tmp_path / "cache")
    if change.pop("data", False):
        write_jsonl(data, exchanges(11))
    cached(data, tmp_path / "cache", **change)
    assert len(list((tmp_path / "cache").glob("?" * 32))) == 2


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_errors_keep_the_line_of_the_whole_file(tmp_path: Path, num_workers: int) -> None:
    rows: list[Any] = exchanges(200)
    rows[120] = {"instruction": "x"}
    rows[130] = {"instruction": "y"}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(
        RecordError, match=r"data\.jsonl:121: the field `response` is missing as in"
    ) as caught:
        cached(data, tmp_path / "cache", num_workers=num_workers)
    assert "data.jsonl:1)" in str(caught.value)
    splits = cached(data, tmp_path / "cache", skip_bad=True, num_workers=num_workers)
    assert [row["line"] for row in splits.rejections.rows()] == [121, 131]
    assert_equal(splits, in_memory(data, skip_bad=True))


def test_too_many_bad_records_over_all_pieces_are_refused(tmp_path: Path) -> None:
    rows: list[Any] = exchanges(100)
    for i in range(0, 100, 10):
        rows[i + 5] = {"instruction": "x"}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(InputError, match="10 of 100 records are bad"):
        cached(data, tmp_path / "cache", skip_bad=True)


def test_pieces_hold_every_line_once_with_its_number(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.jsonl"
    ends = ["\n", "\r\n", "\n\n"]
    path.write_text(
        "".join(
            json.dumps({"text": "x" * rng.randrange(300)}) + rng.choice(ends) for _ in range(300)
        ),
        newline="",
    )
    for chunk_bytes in (1, 50, 777, 10_000, 10**9):
        facts = scan_file(path, None, chunk_bytes)
        chunks = list(plan_chunks([DataFile(path)], 0, [facts]))
        found = [record for chunk in chunks for record in iter_chunk(chunk, Rejections())]
        assert found == list(iter_records(path))
        assert sum(chunk.num_bytes for chunk in chunks) == path.stat().st_size


SLOW_BUILD = """
import functools, sys, time
from pathlib import Path
from ollatune.data.cache import load_cached
from tests.data_fakes import make_config
from tests.unit.test_data_cache import make_parts, slow_parts

if __name__ == "__main__":
    load_cached(
        make_config(), *make_parts(), make_parts=slow_parts, cache_folder=Path(sys.argv[2]), path=sys.argv[1],
        max_length=512, num_workers=2, chunk_bytes=1000,
    )
"""


def slow_parts() -> tuple[ByteTokenizer, ChatMLTemplate]:
    class SlowTemplate(ChatMLTemplate):
        def render_training_examples(self, *arguments: Any) -> Any:
            time.sleep(0.05)
            return super().render_training_examples(*arguments)

    return ByteTokenizer(), SlowTemplate()


@pytest.mark.slow
def test_a_killed_build_leaves_no_worker_and_is_continued(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(400))
    script = tmp_path / "build.py"
    script.write_text(SLOW_BUILD)
    process = subprocess.Popen(
        [sys.executable, str(script), str(data), str(tmp_path / "cache")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cache").glob("*/chunk-*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert len(gone) == len(workers)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/chunk-*.json")}
    assert_equal(cached(data, tmp_path / "cache"), in_memory(data))
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())


def test_file_facts_are_kept_until_the_file_changes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", exchanges(3))
    first = scan_file(path, tmp_path / "facts")
    (kept,) = (tmp_path / "facts").iterdir()
    kept.write_text(kept.read_text().replace(first.sha256, "0" * 64))
    assert scan_file(path, tmp_path / "facts").sha256 == "0" * 64
    write_jsonl(path, exchanges(4))
    assert scan_file(path, tmp_path / "facts").sha256 not in (first.sha256, "0" * 64)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(100))
    seen: list[tuple[int, int]] = []
    load_cached(
        make_config(),
        *make_parts(),
        cache_folder=tmp_path / "cache",
        path=data,
        max_length=512,
        num_workers=1,
        chunk_bytes=1000,
        progress=lambda done, total: seen.append((done, total)),
    )
    size = data.stat().st_size
    assert seen[0] == (0, size)
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_find_files_is_ordered_and_skips_what_is_no_data(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/z.csv",
        "README.md",
        ".hidden.jsonl",
        "x.bin",
        "report.json",
        "a/rejected.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [f.path.relative_to(tmp_path).as_posix() for f in find_files(tmp_path)] == [
        "b.jsonl",
        "a/z.csv",
    ]


def test_two_processes_that_want_the_same_cache_build_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(100))
    cached(data, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("?" * 32)
    for path in folder.glob("chunk-*"):
        path.unlink()
    found: list[DatasetSplits] = []
    waiting = threading.Thread(target=lambda: found.append(cached(data, tmp_path / "cache")))
    with (folder / "build.lock").open("a") as stream, caplog.at_level("INFO", "ollatune"):
        assert try_lock(stream.fileno())
        waiting.start()
        deadline = time.monotonic() + 30
        while "waiting for it" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "Another process is tokenising the same data" in caplog.text
        assert not list(folder.glob("chunk-*"))
    waiting.join(30)
    assert_equal(found[0], in_memory(data))


def test_the_bar_starts_from_what_is_there_and_ends_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(100))
    size = data.stat().st_size

    def shown(stream: io.StringIO, **options: Any) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with BuildBar(**options) as bar:
            load_cached(
                make_config(), *make_parts(), cache_folder=tmp_path / "cache", path=data,
                max_length=512, num_workers=1, chunk_bytes=1000, progress=bar,
            )  # fmt: skip
        return stream.getvalue()

    def forget(count: int) -> None:
        for path in sorted((tmp_path / "cache").glob("*/chunk-*.json"))[-count:]:
            path.unlink()

    first = shown(Terminal())
    assert first.startswith("\rTokenising:   0%")
    assert "100%" in first
    assert shown(Terminal()) == ""  # nothing to build
    forget(3)
    begun = re.match(r"\rTokenising: +(\d+)%", shown(Terminal()))
    assert begun is not None
    assert 100 * (1 - 4000 / size) < int(begun[1]) < 100
    for options in ({"stream": io.StringIO()}, {"stream": Terminal(), "is_shown": False}):
        forget(3)
        assert shown(**options) == ""


def test_many_pieces_need_few_open_files(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", exchanges(600))
    splits = cached(data, tmp_path / "cache", chunk_bytes=100)
    assert len(list((tmp_path / "cache").glob("*/*.tokens"))) > 300
    before = psutil.Process().num_fds()
    assert_equal(splits, in_memory(data))
    assert psutil.Process().num_fds() - before < 200


def test_bad_records_that_were_once_skipped_stop_a_run_that_skips_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*exchanges(40), {"instruction": "x", "response": 5}])
    assert cached(path, tmp_path / "cache", skip_bad=True).report.num_rejected == 1
    with pytest.raises(RecordError, match=r"a\.jsonl:41: `response` must be text"):
        cached(path, tmp_path / "cache")


def test_fields_that_are_not_trained_on_are_the_same(tmp_path: Path) -> None:
    rows = [{**row, f"extra{i % 5}": 1, "q": "x"} for i, row in enumerate(exchanges(40))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"instruction": "instruction", "response": "response", "system": "p"}
    report = cached(path, tmp_path / "cache", columns=columns).report
    assert report == in_memory(path, columns=columns).report
    assert report.unused_fields == {str(path): [*(f"extra{i}" for i in range(5)), "q"]}
    assert f"{path}: no record has the column `p` (mapped to `system` in `data.columns`)." in (
        report.warnings
    )
