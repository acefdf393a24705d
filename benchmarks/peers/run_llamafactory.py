"""LLaMA-Factory's supervised training. Run by `speed.py` in an environment of its own.

    python run_llamafactory.py SETTING FOLDER CASE WARMUP STEPS

SETTING: `bf16` (pure_bf16) or `fp32`, then `padded`, `packed` (neat_packing: a batch in one row, attention kept
apart) or `single` (one example at a time, gradients accumulated). Data come tokenised, as from its own cache.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from frozen import LEARNING_RATE, MAX_GRAD_NORM, THREADS, Job, report
from llamafactory.train.tuner import run_exp
from run_transformers import StepClock


def packed(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as LLaMA-Factory packs it: the attention mask numbers the examples."""
    row: dict[str, Any] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for index, example in enumerate(batch):
        count = len(example["input_ids"])
        row["input_ids"] += example["input_ids"]
        row["labels"] += [-100, *example["labels"][1:]]
        row["attention_mask"] += [index + 1] * count
        row["position_ids"] += range(count)
    return row


def main() -> None:
    job = Job.from_arguments()
    words = job.setting.split("-")
    torch.set_num_threads(THREADS)
    batches = job.batches()
    size = len(batches[0])
    if "packed" in words:
        records, batch_size, accumulation = [packed(batch) for batch in batches], 1, 1
    else:
        records = [
            e | {"attention_mask": [1] * len(e["input_ids"])} for batch in batches for e in batch
        ]
        batch_size, accumulation = (1, size) if "single" in words else (size, 1)
    timer = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        DatasetDict({"train": Dataset.from_list(records)}).save_to_disk(str(data))
        run_exp(
            {
                "stage": "sft", "do_train": True, "model_name_or_path": str(job.base),
                "adapter_name_or_path": str(job.adapter), "finetuning_type": "lora",
                "create_new_adapter": False, "template": "empty", "dataset": "frozen",
                "tokenized_path": str(data), "cutoff_len": 8192, "neat_packing": "packed" in words,
                "packing": "packed" in words, "flash_attn": "sdpa", "disable_shuffling": True,
                "pure_bf16": "bf16" in words, "disable_gradient_checkpointing": True,
                "output_dir": str(Path(folder) / "out"), "overwrite_output_dir": True,
                "per_device_train_batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "max_steps": job.warmup + job.steps, "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant", "weight_decay": 0.0,
                "max_grad_norm": MAX_GRAD_NORM, "logging_steps": 1, "report_to": "none",
                "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            },
            callbacks=[timer],
        )  # fmt: skip
    report(job, timer.clock)


if __name__ == "__main__":
    main()
