"""From files to examples: splits, reports, skipping, and the order that a configuration asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ollatune.base.errors import InputError, UsageError
from ollatune.config.schema import DataSource
from ollatune.data.load import DatasetSplits, data_sources, load_examples, make_order
from ollatune.data.position import RecordError
from ollatune.data.store import ExampleSet, WindowSet
from tests.data_fakes import ByteTokenizer, ChatMLTemplate, make_config


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exchanges(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"question {i}", "response": f"answer {i}"}
        for i in range(start, start + count)
    ]


def load(
    path: Path, *, max_length: int = 512, method: Any = "fine-tuning", **data: Any
) -> DatasetSplits:
    config = make_config(**data)
    tokenizer = ByteTokenizer()
    return load_examples(
        config, tokenizer, ChatMLTemplate(), max_length=max_length, method=method, path=path
    )


def texts(examples: Any) -> list[str]:
    return [ByteTokenizer().decode(example.token_ids) for example in examples]


def test_files_named_after_splits_are_used_as_they_stand(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", exchanges(6))
    write_jsonl(tmp_path / "validation.jsonl", exchanges(2, 10))
    write_jsonl(tmp_path / "test.jsonl", exchanges(3, 20))
    splits = load(tmp_path)
    assert len(splits.train) == 6
    assert splits.validation is not None
    assert splits.test is not None
    assert texts(splits.validation)[0] == (
        "<|im_start|>user\nquestion 10<|im_end|>\n<|im_start|>assistant\nanswer 10<|im_end|>\n"
    )
    assert [s.messages[0].content for s in splits.samples["test"]] == [
        "question 20",
        "question 21",
        "question 22",
    ]
    assert splits.report.forms == {str(tmp_path): "instruction"}
    assert splits.report.warnings == []


def test_fractions_are_split_off_and_duplicates_stay_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", exchanges(40) * 3)
    splits = load(path, validation_fraction=0.2, test_fraction=0.1)
    assert splits.validation is not None
    assert splits.test is not None
    parts = [set(texts(part)) for part in (splits.train, splits.validation, splits.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [84, 24, 12]
    assert splits.report.num_duplicates == 80
    assert any("More than half" in w for w in splits.report.warnings)


def test_the_split_does_not_depend_on_the_order_of_records(tmp_path: Path) -> None:
    rows = exchanges(50)
    forward = load(write_jsonl(tmp_path / "a.jsonl", rows), validation_fraction=0.2)
    backward = load(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), validation_fraction=0.2)
    assert set(texts(forward.validation)) == set(texts(backward.validation))


def test_several_examples_of_one_record_are_no_duplicates(tmp_path: Path) -> None:
    class EachAnswer(ChatMLTemplate):
        def render_training_examples(
            self, messages: Any, tools: Any = None, targets: str = "all"
        ) -> Any:
            ends = [i + 1 for i, m in enumerate(messages) if m.role == "assistant"]
            found = super().render_training_examples
            return [
                p
                for end in (ends if targets == "all" else ends[-1:])
                for p in found(messages[:end], tools, "last")
            ]

    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": r, "content": f"{c}{i}"} for r, c in turns]} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = make_config(validation_fraction=0.25)
    splits = load_examples(config, ByteTokenizer(), EachAnswer(), max_length=200, path=path)
    assert (len(splits.train), len(splits.validation or ())) == (6, 2)
    assert (len(splits.samples["train"]), len(splits.samples["validation"])) == (3, 1)
    assert splits.report.num_duplicates == 0


def test_leakage_between_named_splits_is_reported(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", exchanges(10))
    same_question = {"instruction": "question 3", "response": "another answer"}
    write_jsonl(tmp_path / "test.jsonl", [*exchanges(2), *exchanges(1, 50)])
    write_jsonl(tmp_path / "dev.jsonl", [same_question, *exchanges(1, 60)])
    report = load(tmp_path).report
    found = {
        leak.split: (leak.num_rows, leak.num_same_record, leak.num_same_prompt)
        for leak in report.leakage
    }
    assert found == {"test": (3, 2, 2), "validation": (2, 0, 1)}
    assert any("2 of 3 test records are also in the training data" in w for w in report.warnings)
    assert any("1 of 2 validation questions" in w for w in report.warnings)


def test_statistics_count_tokens_and_targets(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "ab", "response": "xyz"}] * 2)
    splits = load(path, validation_fraction=0)
    statistics = splits.report.splits["train"]
    # <|im_start|> user \n ab <|im_end|> \n | <|im_start|> assistant \n | xyz <|im_end|> | \n
    assert statistics.num_tokens == 2 * (1 + 5 + 2 + 1 + 1 + 1 + 10 + 4 + 1)
    assert statistics.num_target_tokens == 2 * 4
    assert statistics.length_percentiles["p100"] == 26
    assert json.loads(json.dumps(splits.report.as_dict()))["splits"]["train"]["num_records"] == 2


def test_a_bad_record_stops_with_its_line_or_is_set_aside(tmp_path: Path) -> None:
    rows: list[Any] = exchanges(60)
    rows[40] = {"instruction": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(RecordError, match=r"a\.jsonl:41: the field `response` is missing"):
        load(path)
    splits = load(path, skip_bad=True, validation_fraction=0)
    assert len(splits.train) == 59
    assert splits.rejections.rows()[0]["line"] == 41
    first = splits.rejections.errors[0].message
    assert f"1 bad records were set aside, the first: {first}" in splits.report.warnings


def test_more_than_five_percent_bad_records_are_refused(tmp_path: Path) -> None:
    rows: list[Any] = exchanges(40)
    rows[3] = rows[30] = {"instruction": "x"}
    splits = load(write_jsonl(tmp_path / "a.jsonl", rows), skip_bad=True)
    assert len(splits.rejections.errors) == 2
    rows[7] = {"instruction": "x"}
    with pytest.raises(InputError, match=r"3 of 40 records are bad \(7.5%, at most 5%") as caught:
        load(write_jsonl(tmp_path / "b.jsonl", rows), skip_bad=True)
    assert "b.jsonl:4" in str(caught.value)


def test_plain_text_needs_continued_pretraining(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: this is plain text") as caught:
        load(path)
    assert "continued-pretraining" in str(caught.value)


def test_texts_beside_records_are_left_out_of_fine_tuning(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", exchanges(4))
    (tmp_path / "notes.md").write_text("# Notes\n")
    assert len(load(tmp_path, validation_fraction=0).train) == 4


def test_documents_are_joined_with_eos_and_cut_into_windows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdef"}, {"text": "ghi"}, {"text": "jklmnopq"}])
    splits = load(tmp_path, max_length=8, method="continued-pretraining", validation_fraction=0)
    assert isinstance(splits.train, WindowSet)
    windows = [splits.train[i] for i in range(len(splits.train))]
    assert texts(windows) == ["abcdef</s>g", "hi</s>jklmn", "opq</s>"]
    assert [w.num_targets for w in windows] == [7, 7, 3] == splits.train.num_targets.tolist()


def test_overlapping_windows_learn_no_token_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghij"}, {"text": "klm"}])
    splits = load(
        tmp_path,
        max_length=6,
        method="continued-pretraining",
        validation_fraction=0,
        window_overlap=2,
    )
    windows = [splits.train[i] for i in range(len(splits.train))]
    assert texts(windows) == ["abcdef", "efghij", "ij</s>klm", "lm</s>"]
    learned = [
        int(token)
        for w in windows
        for token, target in zip(w.token_ids[1:], w.is_target[1:], strict=True)
        if target
    ]
    assert ByteTokenizer().decode(learned) == "bcdefghij</s>klm</s>"
    assert [w.num_targets for w in windows] == splits.train.num_targets.tolist()


def test_sources_are_weighted_and_no_source_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", exchanges(4))
    write_jsonl(tmp_path / "b.jsonl", exchanges(6, 10))
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 2.0},
        {"path": str(tmp_path / "b.jsonl"), "weight": 0.5},
    ]
    config = make_config(sources=sources, validation_fraction=0)
    splits = load_examples(config, ByteTokenizer(), ChatMLTemplate(), max_length=99)
    order = make_order(splits.train, config, seed=1, sources=data_sources(config))
    assert order.epoch_size == 8 + 3
    for epoch in range(4):
        drawn = np.bincount(order.of_epoch(epoch, 0, 11), minlength=10)
        assert drawn[:4].tolist() == [2] * 4
        assert drawn[4:].sum() == 3
    two_epochs = np.bincount(order.samples(0, 22), minlength=10)
    assert two_epochs[4:].tolist() == [1] * 6
    with pytest.raises(UsageError, match="No data was named"):
        data_sources(make_config())
    assert data_sources(config, tmp_path) == [DataSource(path=str(tmp_path))]


def test_a_curriculum_by_score_needs_scores(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", exchanges(8))
    config = make_config(curriculum="score")
    splits = load(path, curriculum="score")
    with pytest.raises(UsageError, match="`score`, which no record has"):
        make_order(splits.train, config, seed=1, sources=[DataSource(path=str(path))])


def test_curriculum_begins_with_the_shortest_or_the_lowest_score(tmp_path: Path) -> None:
    rows = [
        {"instruction": "q", "response": "a" * (1 + (7 * i) % 13), "score": -i} for i in range(12)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for kind in ("length", "score"):
        config = make_config(curriculum=kind, validation_fraction=0)
        splits = load_examples(config, ByteTokenizer(), ChatMLTemplate(), max_length=99, path=path)
        assert isinstance(splits.train, ExampleSet)
        order = make_order(splits.train, config, seed=3, sources=data_sources(config, path))
        first = order.of_epoch(0, 0, 12)
        values = splits.train.lengths if kind == "length" else splits.train.scores
        assert values[first].tolist() == sorted(values.tolist())
        later = order.of_epoch(1, 0, 12)
        assert sorted(later.tolist()) == list(range(12))
        assert values[later].tolist() != sorted(values.tolist())


def test_copies_of_one_record_do_not_become_the_validation_set(tmp_path: Path) -> None:
    for seed in range(20):
        rows = exchanges(1) * 40 + exchanges(60, 1)
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        splits = load_examples(
            make_config(), ByteTokenizer(), ChatMLTemplate(), max_length=512, path=path, seed=seed
        )
        assert splits.validation is not None
        assert len(splits.validation) == 10


def test_where_every_record_has_many_copies_the_fewest_are_taken(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", exchanges(1) * 30 + exchanges(1, 1) * 20)
    splits = load(path)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation)) == (30, 20)


def test_windows_have_no_scores_and_must_hold_something_to_learn(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"doc {i}", "score": i} for i in range(9)])
    splits = load(path, method="continued-pretraining", max_length=8)
    with pytest.raises(UsageError, match="continued pre-training joins them into windows"):
        make_order(
            splits.train,
            make_config(curriculum="score"),
            seed=1,
            sources=[DataSource(path=str(path))],
        )
    with pytest.raises(InputError, match="No record is left to train on"):
        load(path, method="continued-pretraining", max_length=1)
