"""`ollatune data`: the batch as training sees it, on the real tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ollatune.commands.data import DataOptions, data_text, run_data
from tests.unit.test_data_loading import exchanges, write_jsonl

RESULT = {
    "base": "m",
    "template": {"source": "jinja", "digest": "0123456789abcdef", "text": "…"},
    "report": {
        "forms": {"a.jsonl": "instruction"},
        "unused_fields": {"a.jsonl": ["id", "topic\x1b"]},
        "splits": {
            "train": {
                "num_records": 2, "num_tokens": 10, "num_target_tokens": 4, "target_share": 0.4,
            }
        },
        "warnings": ["Mind."],
    },
    "length_histogram": [{"from": 0, "to": 5, "count": 4}, {"from": 5, "to": 10, "count": 1}],
    "batch": [
        {
            "index": 7,
            "num_tokens": 5,
            "num_target_tokens": 2,
            "pieces": [
                {"text": "Q\x1b[31m: ", "is_target": False, "num_tokens": 3},
                {"text": "A<end>", "is_target": True, "num_tokens": 2},
            ],
        }
    ],
}  # fmt: skip


def test_targets_are_marked_and_escapes_shown() -> None:
    assert data_text(RESULT) == "\n".join(
        [
            "Template: jinja (0123456789ab), of m",
            "--- example 1 (no. 7): 5 tokens, 2 targets",
            "Q\\x1b[31m: ⟦A<end>⟧",
            "--- the whole data",
            "a.jsonl: instruction (not trained on: `id`, `topic\\x1b`)",
            "train: 2 examples, 10 tokens, 4 targets (40%)",
            "tokens per training example:",
            "  0-4       4 ████████████████████████████████████████",
            "  5-9       1 ██████████",
            "Warning: Mind.",
        ]
    )


def test_colour_marks_targets_green_and_the_rest_dim() -> None:
    shown = data_text(RESULT, color=True)
    assert "\x1b[2mQ\\x1b[31m: \x1b[0m\x1b[1;32mA<end>\x1b[0m" in shown


@pytest.mark.weights
def test_the_first_batch_of_the_real_model(tmp_path: Path, smollm2_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", exchanges(20))
    options = DataOptions(
        path,
        assignments=(f"model.base_model={smollm2_path}", "data.shuffle=false"),
        flags={"data.validation_fraction": 0.0},
        num_examples=2,
    )
    result = json.loads(json.dumps(run_data(options)))
    first = result["batch"][0]
    assert [(p["text"], p["is_target"]) for p in first["pieces"]] == [
        (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("answer 0<|im_end|>", True),
        ("\n", False),
    ]
    assert first["num_tokens"] == sum(p["num_tokens"] for p in first["pieces"])
    assert result["num_examples"] == 20
    assert sum(item["count"] for item in result["length_histogram"]) == 20
    assert len(result["batch"]) == 2
