"""The committed demo task: what the script writes, and a test split that training cannot have seen."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "scripts/make_demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(split: str) -> list[dict[str, str]]:
    lines = (ROOT / f"data/processed/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def layout_of(record: dict[str, str], clauses: list[str]) -> str:
    """The e-mail with what varies blanked out: two e-mails of one layout give the same text."""
    fields: dict[str, Any] = json.loads(record["response"])
    text = record["context"]
    for key in ("name", "order", "product"):
        assert text.count(fields[key]) == 1, f"{key} of {record}"
        text = text.replace(fields[key], f"<{key}>")
    for clause in clauses:
        text = re.sub(re.escape(clause), "<issue>", text, flags=re.IGNORECASE)
    assert text.count("<issue>") == 1, record
    return text


def test_the_committed_files_are_what_the_script_writes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["make_demo_data.py", "--output", str(tmp_path)])
    script.main()
    for split in SPLITS:
        committed = (ROOT / f"data/processed/{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed


def test_no_test_layout_surname_or_email_occurs_in_training(script: ModuleType) -> None:
    clauses = [c for group in script.CLAUSES_BY_ISSUE.values() for c in group]
    layouts = {split: {layout_of(r, clauses) for r in records(split)} for split in SPLITS}
    assert len(layouts["train"]) == len(script.TRAIN_LAYOUTS) >= 14
    assert len(layouts["test"]) == len(script.TEST_LAYOUTS) == 4
    assert not layouts["test"] & (layouts["train"] | layouts["validation"])
    names = {s: {json.loads(r["response"])["name"].split()[-1] for r in records(s)} for s in SPLITS}
    assert not names["test"] & (names["train"] | names["validation"])
    emails = [r["context"] for split in SPLITS for r in records(split)]
    assert len(set(emails)) == len(emails) == sum(script.NUM_RECORDS.values())


def test_every_response_is_the_four_fields_in_order(script: ModuleType) -> None:
    for split in SPLITS:
        for record in records(split):
            assert list(record) == ["instruction", "context", "response"]
            fields = json.loads(record["response"])
            assert list(fields) == ["name", "order", "product", "issue"]
            assert fields["issue"] in script.CLAUSES_BY_ISSUE
            assert len(record["context"]) < 250  # short, so that training is cheap


def test_every_clause_tells_exactly_one_issue(script: ModuleType) -> None:
    clauses = [c for group in script.CLAUSES_BY_ISSUE.values() for c in group]
    assert len(set(clauses)) == len(clauses)
    assert not [(a, b) for a in clauses for b in clauses if a != b and a in b]
