"""One reference system on the benchmark's batches: Transformers + PEFT, padded or packed by hand. Run by `speed.py`.

    python benchmarks/peers_reference.py SETTING FILE STEPS

SETTING: `trainer-default` (what Trainer does by default: fp32, padded), `bf16` (the same in bf16), `packed` (rows
packed by hand with position ids and a block-diagonal mask, fp32), `packed-bf16`, or `shared-packed`
(questions about one context). Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    setting, file, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import torch
    from benchmarks.speed_data import batches, summary
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    dtype = torch.bfloat16 if "bf16" in setting else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True),
        attn_implementation="sdpa",
    )  # fmt: skip
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() if dtype == torch.float32 else parameter.data
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds, losses, tokens = [], [], 0
    for examples in batches(steps, shared=setting.startswith("shared")):
        inputs = _packed(examples, dtype) if "packed" in setting else _padded(examples)
        started = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
        tokens = sum(len(ids) for ids, _ in examples)
    print(json.dumps(summary(seconds, losses, tokens)))


def _padded(examples: Any) -> dict[str, Any]:
    import torch

    width = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, (tokens, is_target) in enumerate(examples):
        count = len(tokens)
        ids[row, :count] = torch.from_numpy(tokens)
        labels[row, :count] = torch.where(torch.from_numpy(is_target), ids[row, :count], -100)
        mask[row, :count] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _packed(examples: Any, dtype: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    ids = np.concatenate([tokens for tokens, _ in examples])
    labels = np.concatenate(
        [np.where(is_target & (np.arange(len(t)) > 0), t, -100) for t, is_target in examples]
    )
    positions = np.concatenate([np.arange(len(tokens)) for tokens, _ in examples])
    owner = np.concatenate([np.full(len(t), i) for i, (t, _) in enumerate(examples)])
    allowed = torch.from_numpy((owner[:, None] == owner[None]) & np.tri(len(ids), dtype=bool))
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": mask[None, None],
    }


if __name__ == "__main__":
    main()
