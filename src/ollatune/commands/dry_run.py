"""`ollatune train --dry-run`: configuration, data counts, parameters, memory and disk, what would be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ollatune.base.files import free_bytes
from ollatune.base.text import format_bytes, format_count
from ollatune.commands.remote import remote_finder
from ollatune.config.load import dump_config
from ollatune.config.schema import Config
from ollatune.modeling.base import check_family, resolve_base
from ollatune.modeling.memory import estimate_memory
from ollatune.modeling.opened import open_base
from ollatune.training.build import context_window, load_data, make_loader, total_steps
from ollatune.training.distributed import Processes
from ollatune.training.environment import choose_device, choose_dtype
from ollatune.training.placement import choose_mode, free_memory_bytes


def plan_training(config: Config, checkpoints: Path) -> dict[str, Any]:
    """Everything that can be known before training, as plain values; nothing is written and no weight is loaded."""
    device = choose_device()
    dtype, _ = choose_dtype(config.model.dtype, device)
    source = resolve_base(
        config.model.base_model,
        models_folder=config.ollama.models,
        find_remote=remote_finder(config),
    )
    base = open_base(source)
    check_family(source, config.model.model_family, base.architecture)
    splits = load_data(config, base)
    mode = choose_mode(config, base, dtype, device)
    loader = make_loader(config, splits, Processes(device=device))
    longest = int(splits.train.lengths.max())
    estimate = estimate_memory(
        base.gguf,
        config,
        mode=mode,
        dtype=dtype,
        row_tokens=_row_tokens(config, splits.train.lengths, longest),
        row_targets=int(splits.train.num_targets.max()) * loader.settings.batch_size,
    )
    disk = estimate.checkpoint_bytes * (config.training.keep_checkpoints + 2)
    return {
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "config_yaml": dump_config(config),
        "base": {"name": source.name, "architecture": base.architecture, "digest": source.digest},
        "data": splits.report.as_dict(),
        "steps": total_steps(config, loader),
        "context_window": context_window(config, base),
        "mode": mode,
        "dtype": dtype,
        "device": str(device),
        "total_parameters": estimate.total_parameters,
        "trainable_parameters": estimate.trainable_parameters,
        "memory": estimate.as_dict(),
        "memory_free_bytes": free_memory_bytes(device),
        "disk_bytes": disk,
        "disk_free_bytes": free_bytes(config.output.folder),
        "would_write": _would_write(config, checkpoints),
    }


def _row_tokens(config: Config, lengths: Any, longest: int) -> int:
    """Tokens of a heavy micro-batch: the longest examples together."""
    size = config.training.batch_size
    count = size if isinstance(size, int) else 1
    heaviest = torch.as_tensor(lengths).topk(min(count, len(lengths))).values
    return max(longest, int(heaviest.sum()))


def _would_write(config: Config, checkpoints: Path) -> list[str]:
    folder = config.output.folder
    names = ["config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "best_model.pt"]
    if config.advanced.lora_enabled:
        names += ["adapter_model.safetensors", "adapter_config.json"]
    return [
        *(str(folder / name) for name in names),
        *(str(checkpoints / f"epoch_{n}.pt") for n in range(1, config.training.epochs + 1)),
        str(config.output.logs / "<run id>.log"),
    ]


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for a terminal."""
    memory = plan["memory"]
    splits = ", ".join(
        f"{name} {values['num_records']} records ({format_count(values['num_tokens'])} tokens)"
        for name, values in plan["data"]["splits"].items()
    )
    parts = "\n".join(
        f"    {name.removesuffix('_bytes').replace('_', ' ')}: {format_bytes(value)}"
        for name, value in memory["parts"].items()
    )
    written = "\n".join(f"  {path}" for path in plan["would_write"])
    fits = "fits" if memory["total_bytes"] <= plan["memory_free_bytes"] else "DOES NOT FIT"
    return (
        f"{plan['config_yaml']}\n"
        f"Base model: {plan['base']['name']} ({plan['base']['architecture']}), "
        f"{plan['mode']}, {plan['dtype']} on {plan['device']}\n"
        f"Data: {splits}\n"
        f"Steps: {plan['steps']}\n"
        f"Parameters: {format_count(plan['trainable_parameters'])} trained of "
        f"{format_count(plan['total_parameters'])}\n"
        f"Memory (estimate): {format_bytes(memory['total_bytes'])} of "
        f"{format_bytes(plan['memory_free_bytes'])} free: {fits}\n{parts}\n"
        f"Disk: {format_bytes(plan['disk_bytes'])} of {format_bytes(plan['disk_free_bytes'])} free\n"
        f"Would write:\n{written}\nNothing was written."
    )
