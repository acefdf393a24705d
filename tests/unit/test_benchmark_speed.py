"""The arithmetic of the side-by-side benchmark: which rows its ratios compare, and what its inputs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.growth import memory_exponent
from benchmarks.peers.environments import _digest, is_ready
from benchmarks.peers.frozen import Clock, Job, padded, report
from benchmarks.speed import DEFAULT, OURS, TRAINER, TRL, Measurement, collect, ratios, row_of
from benchmarks.speed_data import LENGTHS, batches, read_frozen, tokens_per_batch
from benchmarks.speed_report import save


def _row(system: str, setting: str, case: str, speed: float, memory: float) -> dict[str, Any]:
    return {
        "system": system, "setting": setting, "case": case, "tokens_per_second": speed,
        "peak_mb": memory, "loss": 1.5, "spread": [speed, speed], "seconds_per_epoch": 1.0,
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


def test_ratios_without_a_side_are_none() -> None:
    found = ratios(ROWS[:1])
    assert found["ratio_best_peer"] is None
    assert found["ratio_shared_context"] is None


def test_memory_exponent_is_the_slope() -> None:
    rows = [{"tokens": n, "loaded_mb": 100, "peak_mb": 100 + n * n // 1000} for n in (2000, 4000)]
    assert memory_exponent(rows) == pytest.approx(2.0, abs=0.001)


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
    report(job, Clock(seconds=[100.0, 1.0, 1.0], losses=[3.0, 2.0, 1.0]))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_second"] == 5.0
    assert found["loss"] == 1.0
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
        return {"tokens_per_second": float(len(said) + 1), "peak_mb": 10, "loss": 1.0}

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


def test_saved_result_has_table_and_curves(tmp_path: Path) -> None:
    result = {
        "date": "2026-01-02", "machine": "Some CPU, 2 threads", "rows": ROWS, **ratios(ROWS),
        "not_measured": {"X": "why"}, "losses": {"a": [2.0, 1.0], "b": [2.0, 1.1]},
    }  # fmt: skip
    path = save(result, tmp_path)
    assert path.name == "speed-2026-01-02-some-cpu-2-threads.json"
    assert json.loads(path.read_text()) == result
    assert "| mixed | Ollatune | default | 900 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".svg").read_text().count("<path") > 2
