"""Ollatune on the benchmark's batches. Run by `speed.py`.

    python benchmarks/speed_ours.py SETTING FILE STEPS

SETTING: `fast` (the defaults), `plain` (Transformers' own forward pass with our rows), `fast-shared` (questions about
one context). Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    setting, file, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import numpy as np
    import torch
    from benchmarks.speed_data import batches, summary

    from ollatune.gguf.reader import GGUFFile
    from ollatune.modeling.fast.forward import CausalStep, PackedRow
    from ollatune.modeling.fast.segments import lay_out
    from ollatune.modeling.load import load_base_model
    from ollatune.modeling.lora import LoRASettings, inject_lora, trainable_parameters
    from ollatune.training.environment import DTYPES, choose_dtype

    device = torch.device("cpu")
    dtype, _ = choose_dtype("auto", device)
    model = load_base_model(GGUFFile.open(file), dtype=DTYPES[dtype])
    inject_lora(model, LoRASettings(8, 16.0, 0.0), seed=1)
    model.train()
    step = CausalStep(model, use_fast_path=setting.startswith("fast"))
    parameters = [p for _, p in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    seconds, losses, tokens = [], [], 0
    for examples in batches(steps, shared=setting.endswith("shared")):
        started = time.perf_counter()
        kept = [ids[: int(np.flatnonzero(target)[-1])] for ids, target in examples]
        tree = lay_out(kept, share=step.can_share)
        places = [np.flatnonzero(target[1:]) for _, target in examples]
        row = PackedRow(
            torch.from_numpy(tree.token_ids),
            torch.from_numpy(tree.position_ids),
            tree.segments,
            torch.from_numpy(
                np.concatenate([p[w] for p, w in zip(tree.places, places, strict=True)])
            ),
            torch.from_numpy(
                np.concatenate([ids[1:][w] for (ids, _), w in zip(examples, places, strict=True)])
            ),
            sum(map(len, kept)),
        )
        loss = step.loss_sum(row) / row.num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
        tokens = sum(len(ids) for ids, _ in examples)
    print(json.dumps({"dtype": dtype} | summary(seconds, losses, tokens)))


if __name__ == "__main__":
    main()
