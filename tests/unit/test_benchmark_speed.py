"""The arithmetic of the side-by-side benchmark: which rows its ratios compare, and what its inputs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.growth_report import exponent, tables
from benchmarks.growth_report import merge as merge_growth
from benchmarks.peers.environments import (
    _cuda_build,
    _digest,
    _take_out_cuda_parts,
    is_ready,
)
from benchmarks.peers.frozen import Clock, Job, grouped, padded, report
from benchmarks.speed import collect, row_of
from benchmarks.speed_data import LENGTHS, batches, read_frozen, tokens_per_batch
from benchmarks.speed_plan import (
    CURVES,
    DEFAULT,
    MORE_SETTINGS,
    OURS,
    PLAN,
    STEPS,
    TRAINER,
    TRL,
    WARMUP,
    Measurement,
)
from benchmarks.speed_report import MARKS, block, merge, ratios, replaced, save


def _row(system: str, setting: str, case: str, speed: float, memory: float) -> dict[str, Any]:
    return {
        "system": system, "setting": setting, "case": case, "tokens_per_second": speed,
        "peak_mb": memory, "loss": 1.5, "spread": [speed, speed], "seconds_per_epoch": 1.0,
        "imports_mb": 300.0, "rounds": 3,
    }  # fmt: skip


ROWS = [
    _row(OURS, "default", "mixed", 900.0, 800.0),
    _row(TRAINER, DEFAULT, "mixed", 90.0, 8000.0),
    _row(TRAINER, "bf16-packed", "mixed", 400.0, 2500.0),
    _row(TRL, "bf16-single-eager", "mixed", 450.0, 1600.0),
    _row(OURS, "default", "shared", 4000.0, 700.0),
    _row(TRAINER, "bf16-single-eager", "shared", 500.0, 1400.0),
]


def test_ratios_take_the_fastest_peer_setting() -> None:
    found = ratios(ROWS)
    assert found["best_peer"] == f"{TRL} bf16-single-eager"
    assert found["ratio_best_peer"] == 2.0
    assert found["memory_ratio"] == 0.5
    assert found["ratio_trainer_default"] == 10.0
    assert found["memory_ratio_trainer_default"] == 0.1
    assert found["ratio_shared_context"] == 8.0
    assert found["memory_ratio_beyond_imports"] == round(500 / 1300, 3)


def test_ratios_without_a_side_are_none() -> None:
    found = ratios(ROWS[:1])
    assert found["ratio_best_peer"] is None
    assert found["ratio_shared_context"] is None


def _length(tokens: int, memory: int, seconds: float = 1.0) -> dict[str, Any]:
    row = {"tokens": tokens, "loaded_mb": 100, "steps_mb": 100 + memory}
    return row | {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}


def test_memory_exponent_is_the_slope() -> None:
    rows = [_length(4000, 16000), _length(128, 1), _length(2000, 4000)]
    assert exponent(rows, "memory") == pytest.approx(2.0, abs=0.001)
    assert exponent(rows[:1], "memory") is None


def test_growth_measured_point_by_point_is_one_result() -> None:
    first = {"date": "2026-01-02", "machine": "x", "length": [_length(2000, 100, 1.0)]}
    second = {"date": "2026-01-02", "machine": "x", "length": [_length(4000, 200, 4.0)]}
    whole = merge_growth(merge_growth(None, second), first)
    assert [row["tokens"] for row in whole["length"]] == [2000, 4000]
    assert (whole["memory_exponent"], whole["time_exponent"]) == (1.0, 2.0)
    again = merge_growth(whole, {"length": [_length(4000, 100, 1.0)]})
    assert (again["memory_exponent"], again["time_exponent"]) == (0.0, 0.0)
    assert "| 4,000 | 1 | 4,000 | 100 | 200 |" in tables(again)


def test_batches_are_the_same_every_time_and_have_their_share_of_targets() -> None:
    text = np.arange(5000)
    first, again = (list(batches(2, text)) for _ in range(2))
    for left, right in zip(first, again, strict=True):
        for (ids, targets), (other_ids, other_targets) in zip(left, right, strict=True):
            assert (ids == other_ids).all()
            assert (targets == other_targets).all()
    assert tuple(len(ids) for ids, _ in first[0]) == LENGTHS
    assert sum(int(t.sum()) for _, t in first[0]) == sum(int(0.4 * n) for n in LENGTHS)
    questions = next(batches(1, text, shared=True))
    beginnings = {tuple(ids[:400]) for ids, _ in questions}
    assert len(questions) == 8
    assert len(beginnings) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    example = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    shorter = {"input_ids": [8, 9], "labels": [-100, 9]}
    content = {"batches": [[example, shorter]]}
    (tmp_path / "mixed.json").write_text(json.dumps(content))
    return tmp_path


def test_figures_leave_out_the_warm_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("any", folder, "mixed", 1, 2)
    report(job, Clock(seconds=[100.0, 1.0, 1.0], losses=[3.0, 2.0, 1.0], graphs=[4, 4, 5]))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] == 5.0
    assert found["loss"] == 2.0
    assert found["compiled_while_measured"] == 1
    with pytest.raises(RuntimeError, match="3 steps were wanted"):
        report(job, Clock(seconds=[1.0], losses=[1.0]))


def test_padding_is_masked_and_no_target(folder: Path) -> None:
    batch = padded(Job("any", folder, "mixed", 0, 1).batches()[0])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_frozen_batches_come_back(folder: Path) -> None:
    ids, is_target = read_frozen(folder, "mixed", 3)[2][0]
    assert ids.tolist() == [5, 6, 7]
    assert is_target.tolist() == [False, True, True]
    assert tokens_per_batch(folder, "mixed") == 2.5


def test_a_peer_that_fails_is_said_and_ours_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(what: Measurement, python: Path, folder: Path) -> dict[str, Any]:
        if what.setting == "broken":
            raise RuntimeError("no kernel")
        figures = {"peak_mb": 10, "imports_mb": 4, "loading_mb": 9, "steps_mb": 10}
        figures |= {"losses": [1.0], "compiled_while_measured": 0}
        return {"tokens_per_second": float(len(said) + 1), "loss": 1.0} | figures

    monkeypatch.setattr("benchmarks.speed.measure", measure)
    said: list[str] = []
    fine = Measurement(OURS, "default", "mixed", "x.py", None)
    broken = Measurement(TRAINER, "broken", "mixed", "x.py", None)
    results, missing = collect((fine, broken), 3, folder, said.append)
    assert missing == {f"{TRAINER} broken mixed": "no kernel"}
    assert [r["tokens_per_second"] for r in results[fine]] == [1.0, 3.0, 4.0]
    row = row_of(fine, results[fine], folder)
    assert (row["tokens_per_second"], row["spread"]) == (3.0, [1.0, 4.0])
    with pytest.raises(RuntimeError, match="no kernel"):
        collect((Measurement(OURS, "broken", "mixed", "x.py", None),), 1, folder, said.append)


def test_an_environment_of_other_pins_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLATUNE_CACHE", str(tmp_path))
    assert not is_ready("trl")
    (tmp_path / "bench" / "trl").mkdir(parents=True)
    stamp = tmp_path / "bench" / "trl" / "pins.sha256"
    stamp.write_text("older")
    assert not is_ready("trl")
    stamp.write_text(_digest("trl"))
    assert is_ready("trl")


def _result(**more: Any) -> dict[str, Any]:
    return {
        "date": "2026-01-02", "machine": "Some CPU, 2 threads", "rows": ROWS, **ratios(ROWS),
        "not_measured": {"X": "why"}, "batches": {"quarter": "4 examples (234 in all)"},
        "ceiling_tokens_per_second": {"bf16": 1800.0, "fp32": 400.0},
    } | more  # fmt: skip


def test_an_environment_that_cannot_be_made_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLATUNE_CACHE", str(tmp_path))
    (tmp_path / "bench").write_text("in the way")
    said: list[str] = []
    results, missing = collect(
        (Measurement(TRL, "a", "mixed", "x.py", "trl"),), 1, tmp_path, said.append
    )
    assert results == {}
    assert "no environment can be made" in missing["trl"]


def test_compiled_parts_of_torchaudio_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLATUNE_CACHE", str(tmp_path))
    packages = tmp_path / "bench" / "x" / "lib" / "python3.11" / "site-packages"
    kept = [packages / "torchaudio" / "lib" / "__init__.py", packages / "numpy" / "core.so"]
    gone = packages / "torchaudio" / "lib" / "libtorchaudio.abi3.so"
    for path in (*kept, gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _take_out_cuda_parts("x")
    assert all(path.exists() for path in kept)
    assert not gone.exists()


def test_saved_result_has_table_and_curves(tmp_path: Path) -> None:
    path, merged = save(_result(losses={"a": [2.0, 1.0], "b": [2.0, 1.1]}), tmp_path)
    assert path.name == "speed-2026-01-02-some-cpu-2-threads.json"
    assert json.loads(path.read_text()) == merged
    assert "| mixed | Ollatune | defaults | 900 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".svg").read_text().count("<path") > 2


def test_a_later_result_of_the_day_is_added(tmp_path: Path) -> None:
    """Curves alone keep the rows; a row measured anew takes the place of its like, and the ratios follow."""
    save(_result(), tmp_path)
    reference = f"{CURVES[0].system} {CURVES[0].setting}"
    losses = {reference: [2.0, 1.0], OURS: [2.001, 0.9]}
    _, with_curves = save(_result(rows=[], losses=losses), tmp_path)
    assert with_curves["rows"] == ROWS
    assert with_curves["loss_differences"] == {OURS: 0.1}
    assert with_curves["ceiling_share"] == 0.5
    faster = _row(OURS, "default", "mixed", 1350.0, 800.0)
    _, merged = save(_result(rows=[faster], not_measured={"Y": "no"}), tmp_path)
    assert merged["rows"] == [faster, *ROWS[1:]]
    assert merged["ratio_best_peer"] == 3.0
    assert merged["losses"] == losses
    assert merged["not_measured"] == {"X": "why", "Y": "no"}


def test_a_row_takes_the_place_of_a_reason() -> None:
    old = _result(rows=[], not_measured={f"{TRL} bf16-single-eager mixed": "no kernel"})
    assert merge(old, _result(not_measured={}))["not_measured"] == {}


def test_readme_block_has_each_system_at_its_best() -> None:
    text = block(merge(None, _result()))
    assert "| Ollatune | defaults | 900 | 800 |  |  |" in text
    assert (
        f"| {TRL} | bf16, one example at a time, eager attention | 450 | 1600 | 2.0 × | 50 % |"
        in text
    )
    assert f"| {TRAINER} | bf16, packed | 400 | 2500 | 2.2 × | 32 % |" in text
    assert f"| {TRAINER} | defaults: fp32, padded | 90 | 8000 | 10.0 × | 10 % |" in text
    assert "4000 tokens/s against 500" in text
    assert "50 % of that is reached" in text


def test_block_takes_its_place_between_the_marks() -> None:
    page = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert replaced(page, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="once each"):
        replaced("nothing", "new")


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_pages_have_the_marks(name: str) -> None:
    page = Path(__file__).resolve().parents[2] / name
    assert "\nnew\n" in replaced(page.read_text(), "new")


def test_everyone_has_the_same_warm_up() -> None:
    """Batches grouped by length need one of each length; then the first four are the warm-up."""
    for what in PLAN + MORE_SETTINGS:
        expected = (4, 4) if "grouped" in what.setting else (WARMUP, STEPS)
        assert (what.warmup, what.steps) == expected
    names = [(what.system, what.setting, what.case) for what in PLAN + MORE_SETTINGS]
    assert len(set(names)) == len(names)


def test_grouped_batches_are_the_same_examples_by_length() -> None:
    lengths = [[3, 1], [1, 3], [2, 2], [5, 4]]
    found = [[{"input_ids": [0] * n} for n in batch] for batch in lengths]
    sizes = [[len(e["input_ids"]) for e in batch] for batch in grouped(found)]
    assert sizes == [[1, 1], [3, 3], [2, 2], [4, 5]]


def test_cuda_builds_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**names: str) -> list[dict[str, Any]]:
        return [{"metadata": {"name": n, "version": v}} for n, v in names.items()]

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert _cuda_build(plan(torch="2.13.0+cpu", numpy="2.0")) is None
    assert "torch 2.13.0" in str(_cuda_build(plan(torch="2.13.0")))
    assert "nvidia-cublas" in str(_cuda_build(plan(**{"nvidia-cublas": "1"})))
    monkeypatch.setattr("sys.platform", "darwin")
    assert _cuda_build(plan(torch="2.13.0")) is None
