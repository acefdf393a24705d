"""TRL's `SFTTrainer` with PEFT. Run by `speed.py` in an environment of its own.

    python run_trl.py SETTING FOLDER CASE WARMUP STEPS

SETTING is words joined by `-`, as for `run_transformers.py`: `packed` is `padding_free=True`, `single` is one
example at a time, gradients accumulated. TRL computes its loss in chunks, and entropy and accuracy with it.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from frozen import THREADS, Job, report
from run_transformers import StepClock, arguments, load
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = Job.from_arguments()
    words = job.setting.split("-")
    torch.set_num_threads(THREADS)
    batches = job.batches()
    size = len(batches[0])
    batch_size, accumulation = (1, size) if "single" in words else (size, 1)
    examples = Dataset.from_list([example for batch in batches for example in batch])
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    timer = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **arguments(job, folder, batch_size, accumulation),
            train_sampling_strategy="sequential",
            bf16=False,  # the weights are bf16 already: no autocast
            gradient_checkpointing="checkpointing" in words,
            max_length=None,
            padding_free="packed" in words,
            dataset_kwargs={"skip_prepare_dataset": True},
            torch_compile="compile" in words,
        )
        SFTTrainer(
            model=load(job, words),
            args=settings,
            train_dataset=examples,
            processing_class=tokenizer,
            callbacks=[timer],
        ).train()
    report(job, timer.clock)


if __name__ == "__main__":
    main()
