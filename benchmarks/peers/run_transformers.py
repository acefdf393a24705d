"""Transformers' `Trainer` with PEFT. Run by `speed.py` in an environment of its own.

    python run_transformers.py SETTING FOLDER CASE WARMUP STEPS

SETTING is words joined by `-`: `fp32` or `bf16` (weights), `padded`, `packed` (DataCollatorWithFlattening: one row with
position ids, attention kept apart by Transformers) or `single` (one example at a time, gradients accumulated), then
any of `grouped` (batches of like lengths, as `group_by_length` makes them), `eager` or `flex` (attention; else sdpa),
`compile` (torch_compile), `checkpointing`, `lora32` (adapter in fp32 on bf16 weights).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from frozen import LEARNING_RATE, MAX_GRAD_NORM, THREADS, Clock, Job, padded, report
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class StepClock(TrainerCallback):
    """Times whole steps, data loading included."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def load(job: Job, words: list[str]) -> Any:
    """The base with the common initial adapter."""
    dtype = torch.bfloat16 if "bf16" in words else torch.float32
    attention = {"eager": "eager", "flex": "flex_attention"}
    chosen = next((attention[word] for word in words if word in attention), "sdpa")
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype, attn_implementation=chosen)
    cast = dtype == torch.float32 or "lora32" in words
    model = PeftModel.from_pretrained(
        model, job.adapter, is_trainable=True, autocast_adapter_dtype=cast
    )
    if not cast:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def arguments(job: Job, folder: str, batch_size: int, accumulation: int) -> dict[str, Any]:
    """What all settings share. Nothing here costs time but the logging, which ours does too."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": job.warmup + job.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def main() -> None:
    job = Job.from_arguments()
    words = job.setting.split("-")
    torch.set_num_threads(THREADS)
    batches = job.batches()
    examples = [example for batch in batches for example in batch]
    size = len(batches[0])
    batch_size, accumulation = (1, size) if "single" in words else (size, 1)
    timer = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            **arguments(job, folder, batch_size, accumulation),
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            torch_compile="compile" in words,
            gradient_checkpointing="checkpointing" in words,
        )
        Trainer(
            model=load(job, words),
            args=settings,
            train_dataset=examples,
            data_collator=DataCollatorWithFlattening() if "packed" in words else padded,
            callbacks=[timer],
        ).train()
    report(job, timer.clock)


if __name__ == "__main__":
    main()
