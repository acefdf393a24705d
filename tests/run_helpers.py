"""Whole runs on a tiny random model, through the command line, in seconds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

from ollatune.base import faults as base_faults
from ollatune.checkpoint.format import read_checkpoint
from ollatune.cli import main
from tests.tiny_models import ascii_vocabulary, tiny_gguf

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + ':' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant:' }}{% endif %}"
)


def tiny_base(folder: Path, recipe: str = "llama", **options: Any) -> Path:
    """A tiny model's GGUF with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(ascii_vocabulary())
    tokens, kind = vocabulary["tokenizer.ggml.tokens"]
    vocabulary |= {
        "tokenizer.ggml.tokens": ([*tokens[:-1], "wo"], kind),  # what the one merge makes
        "tokenizer.chat_template": (CHAT_TEMPLATE, gguf.GGUFValueType.STRING),
    }
    return tiny_gguf(recipe, folder, tokenizer=vocabulary, **options)


def write_records(folder: Path, *, train: int = 20, validation: int = 4, test: int = 3) -> Path:
    """Instruction records of different lengths, in train, validation and test files."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        lines = [
            json.dumps(
                {
                    "instruction": f"Add {i} and {i + 3}.",
                    "context": "numbers " * (i % 4),
                    "response": f"The sum is {2 * i + 3}." + "!" * (i % 3),
                }
            )
            for i in range(start, start + count)
        ]
        start += count
        if lines:
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train_command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The command line of a short run: 20 records, 5 steps an epoch; in fp32, whatever the machine would choose."""
    return [
        "train", "--model", str(base), "--data", str(data), "--output", str(output),
        "--epochs", "2", "--batch-size", "2", "--gradient-accumulation-steps", "2",
        "--learning-rate", "1e-2", "--set", "training.warmup_steps=2",
        "--set", f"output.logs={output / 'logs'}", "--set", "validation.samples=1",
        "--set", "validation.max_new_tokens=4", "--set", "model.dtype=fp32", *more,
    ]  # fmt: skip


@contextlib.contextmanager
def inject(faults: str) -> Iterator[None]:
    """Make the named fault points of this process fail (see `ollatune.base.faults`)."""
    before = dict(base_faults._FAULTS)
    base_faults._FAULTS.update(base_faults._parse(faults))
    try:
        yield
    finally:
        base_faults._FAULTS.clear()
        base_faults._FAULTS.update(before)


def run(arguments: Sequence[str]) -> int:
    return main([str(argument) for argument in arguments])


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The step lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "seconds")
    return [
        {k: v for k, v in line.items() if k not in timed}
        for line in lines
        if line["type"] == "step"
    ]


def last(output: Path) -> Path:
    """The checkpoint at the end of the two epochs of `train_command`."""
    return output / "checkpoints" / "epoch_2.pt"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint."""
    return read_checkpoint(path).model_state_dict


def assert_same_weights(left: Path, right: Path) -> None:
    first, second = weights_of(left), weights_of(right)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} tensors differ, such as {different[:2]}"
