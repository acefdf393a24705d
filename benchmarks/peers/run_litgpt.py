"""LitGPT's LoRA model and loss, in the order of its `finetune_lora` loop. Run by `speed.py` in its own environment.

    python run_litgpt.py SETTING FOLDER CASE WARMUP STEPS

SETTING: `bf16` or `fp32` (its bf16-true, 32-true), `padded` or `single` (micro-batches of one, accumulated), with
`compile` through torch.compile; it has no packing. Its adapter starts from its own random values, so its losses differ
a little from the others'.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from frozen import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK, THREADS, Clock, Job, padded, report
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import chunked_cross_entropy

NAME = "SmolLM2-135M-Instruct"


def converted(job: Job) -> Path:
    """The base in LitGPT's format, made on first use."""
    folder = job.folder / "litgpt" / NAME
    if not (folder / "lit_model.pth").is_file():
        shutil.copytree(job.base, folder, dirs_exist_ok=True)
        convert_hf_checkpoint(folder, model_name=NAME, dtype="float32")
    return folder


def load(job: Job) -> GPT:
    """The model with adapters on all linear layers but the head, as `finetune_lora` builds it."""
    config = Config.from_name(
        NAME, lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, lora_query=True, lora_key=True,
        lora_value=True, lora_projection=True, lora_mlp=True, lora_head=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if "bf16" in job.setting else torch.float32
    model = GPT(config)
    state = torch.load(converted(job) / "lit_model.pth", mmap=True, weights_only=True)
    model.load_state_dict(state, strict=False)
    mark_only_lora_as_trainable(model)
    return model.to(dtype).train()


def main() -> None:
    job = Job.from_arguments()
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    model = load(job)
    batches = job.batches()
    model.max_seq_length = max(len(e["input_ids"]) for batch in batches for e in batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "compile" in job.setting:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    clock = Clock()
    clock.start()
    for batch in batches:
        micro_batches = [[e] for e in batch] if "single" in job.setting else [batch]
        total, num_targets = 0.0, 0
        for examples in micro_batches:
            inputs = padded(examples)
            logits = model(inputs["input_ids"], lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            targets = inputs["labels"][..., 1:]
            loss = chunked_cross_entropy(logits, targets)
            (loss / len(micro_batches)).backward()
            count = int((targets != -100).sum())
            total, num_targets = total + float(loss.detach()) * count, num_targets + count
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(total / num_targets)
        clock.lap()
    report(job, clock)


if __name__ == "__main__":
    main()
