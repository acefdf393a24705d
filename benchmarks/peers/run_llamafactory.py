"""LLaMA-Factory's supervised fine-tuning with LoRA. Run by `speed.py` in an environment of its own.

    python run_llamafactory.py SETTING FOLDER CASE WARMUP STEPS

SETTING is words joined by `-`: `bf16` (weights in bf16, and autocast: its pure_bf16 wants a GPU) or `fp32`; `padded`,
`packed` (its neat_packing: one row, a block-diagonal mask) or `single` (one example at a time, gradients accumulated);
then any of `eager` (attention), `compile` (torch_compile) and `checkpointing`, which is its default. The frozen
examples come to it as a tokenised data set, the way it keeps its own.
"""

from __future__ import annotations

import os
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it refuses releases newer than those it was made with

import torch
from datasets import Dataset, DatasetDict
from frozen import THREADS, Job, report
from llamafactory.train.tuner import run_exp
from run_transformers import StepClock, arguments


def packed(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of a batch, as its neat packing makes it: the mask numbers the examples, positions start again."""
    lengths = [len(example["input_ids"]) for example in batch]
    return {
        "input_ids": list(chain.from_iterable(e["input_ids"] for e in batch)),
        "labels": list(chain.from_iterable([-100, *e["labels"][1:]] for e in batch)),
        "attention_mask": list(chain.from_iterable([i + 1] * n for i, n in enumerate(lengths))),
        "position_ids": list(chain.from_iterable(range(n) for n in lengths)),
    }


def tokenised(job: Job, words: list[str], folder: Path) -> None:
    """Write the examples as its `tokenized_path` holds them."""
    if "packed" in words:
        rows = [packed(batch) for batch in job.batches()]
    else:
        rows = [
            example | {"attention_mask": [1] * len(example["input_ids"])}
            for example in chain.from_iterable(job.batches())
        ]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))


def main() -> None:
    job = Job.from_arguments()
    words = job.setting.split("-")
    torch.set_num_threads(THREADS)
    size = len(job.batches()[0])
    batch_size = 1 if "packed" in words or "single" in words else size
    accumulation = size if "single" in words else 1
    timer = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        tokenised(job, words, Path(folder) / "tokenised")
        settings = arguments(job, str(Path(folder) / "output"), batch_size, accumulation)
        settings |= {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(job.base),
            "adapter_name_or_path": str(job.adapter),
            "finetuning_type": "lora",
            "template": "default",
            "dataset": "frozen",
            "tokenized_path": str(Path(folder) / "tokenised"),
            "bf16": "bf16" in words,
            "flash_attn": "disabled" if "eager" in words else "sdpa",
            "neat_packing": "packed" in words,
            "packing": "packed" in words,
            "disable_gradient_checkpointing": "checkpointing" not in words,
            "disable_shuffling": True,
            "torch_compile": "compile" in words,
            "report_to": "none",
            "overwrite_output_dir": True,
        }
        run_exp(settings, callbacks=[timer])
    report(job, timer.clock)


if __name__ == "__main__":
    main()
