"""`ollatune train --dry-run`: configuration, data counts, parameters, memory and disk, what would be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollatune.base.text import format_bytes, format_count
from ollatune.commands.remote import remote_finder
from ollatune.config.load import dump_config
from ollatune.config.schema import Config
from ollatune.modeling.base import check_family, resolve_base
from ollatune.modeling.opened import open_base
from ollatune.training.build import context_window, load_data, make_loader
from ollatune.training.distributed import Processes
from ollatune.training.environment import choose_device, choose_dtype
from ollatune.training.estimate import plan_estimate
from ollatune.training.length import total_steps
from ollatune.training.placement import Placement, choose_mode
from ollatune.training.teaching import open_teacher


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
    teacher = open_teacher(config, base, remote_finder(config))
    steps = total_steps(config, loader)
    estimate = plan_estimate(
        config, base, splits, Placement(device, dtype, mode), loader, steps, teacher
    )
    return {
        "dry_run": True,
        "config": config.model_dump(mode="json"),
        "config_yaml": dump_config(config),
        "base": {"name": source.name, "architecture": base.architecture, "digest": source.digest},
        "data": splits.report.as_dict(),
        "steps": steps,
        "context_window": context_window(config, base),
        "mode": mode,
        "dtype": dtype,
        "device": str(device),
        "total_parameters": estimate.memory.sizes.total,
        "trainable_parameters": estimate.memory.sizes.trained,
        **estimate.as_dict(),
        "would_write": _would_write(config, checkpoints),
    }


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
    splits = ", ".join(
        f"{name} {values['num_records']} records ({format_count(values['num_tokens'])} tokens)"
        for name, values in plan["data"]["splits"].items()
    )
    written = "\n".join(f"  {path}" for path in plan["would_write"])
    return (
        f"{plan['config_yaml']}\n"
        f"Base model: {plan['base']['name']} ({plan['base']['architecture']}), "
        f"{plan['mode']}, {plan['dtype']} on {plan['device']}\n"
        f"Data: {splits}\n"
        f"Steps: {plan['steps']}\n"
        f"Parameters: {format_count(plan['trainable_parameters'])} trained of "
        f"{format_count(plan['total_parameters'])}\n"
        f"{estimate_text(plan)}\n"
        f"Would write:\n{written}\nNothing was written."
    )


def estimate_text(plan: dict[str, Any]) -> str:
    """Memory, time and disk by phase, against what there is; what to change where memory will not do."""
    memory, seconds = plan["memory"], plan["seconds"]
    fits = "fits" if plan["fits_memory"] else "DOES NOT FIT"
    lines = [
        f"Memory (estimate): {format_bytes(memory['total_bytes'])} of "
        f"{format_bytes(plan['memory_free_bytes'])}: {fits}",
        *(f"    {name}: {format_bytes(value)}" for name, value in memory["parts"].items() if value),
        "Phases (estimate):     memory      time",
    ]
    for phase in dict.fromkeys((*memory["phases"], *seconds)):
        size = memory["phases"].get(phase)
        shown = "" if size is None else format_bytes(size)
        taken = f"{seconds[phase]:.0f} s" if phase in seconds else ""
        lines.append(f"    {phase:12} {shown:>12} {taken:>9}")
    lines.append(
        f"Disk (estimate): {format_bytes(plan['disk_bytes'])} of "
        f"{format_bytes(plan['disk_free_bytes'])} free"
    )
    lines += [f"    {n.replace('_', ' ')}: {format_bytes(v)}" for n, v in plan["disk"].items() if v]
    if plan["disk_bytes"] > plan["disk_free_bytes"]:
        lines.append("    DOES NOT FIT: free some space, or lower training.keep_checkpoints")
    if plan["advice"]:
        lines += [
            "To make it fit, one after the other:",
            *(f"    {line}" for line in plan["advice"]),
        ]
    return "\n".join(lines)
