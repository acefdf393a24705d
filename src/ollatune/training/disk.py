"""What a run and the export of its result will leave on the disk, and whether there is room for it."""

from __future__ import annotations

from pathlib import Path

from ollatune.base.errors import StorageError
from ollatune.base.files import free_bytes
from ollatune.base.text import format_bytes
from ollatune.config.schema import Config
from ollatune.modeling.memory import ModelSizes, checkpoint_bytes

_NAMES = {
    "checkpoints": "checkpoints",
    "best_model": "the best model",
    "adapter": "the adapter",
    "export": "its export (model.gguf)",
}


def disk_bytes(config: Config, sizes: ModelSizes) -> dict[str, int]:
    """Bytes that the run and the export of its result will leave or need in passing."""
    trained = 4 * sizes.trained
    rewritten = sizes.linear if config.advanced.lora_enabled else sizes.total
    return {
        "checkpoints": checkpoint_bytes(sizes, config) * (config.training.keep_checkpoints + 2),
        "best_model": 2 * trained,  # the new one is whole before the old one goes
        "adapter": trained if config.advanced.lora_enabled else 0,
        "export": max(sizes.stored_bytes, int(rewritten * 34 / 32) + sizes.total - rewritten),
    }


def require_disk(config: Config, sizes: ModelSizes, checkpoints: Path) -> None:
    """Raise StorageError before the run where its files, or the export after it, will not fit.

    The export is counted where the output folder is. What earlier checkpoints of a resumed run take is room already.
    """
    needs = disk_bytes(config, sizes)
    needs["checkpoints"] = max(0, needs["checkpoints"] - _size_of(checkpoints))
    output = config.output.folder
    places = {checkpoints: {"checkpoints": needs.pop("checkpoints")}, output: needs}
    if _on_one_device(checkpoints, output):
        places = {output: places[checkpoints] | needs}
    for folder, parts in places.items():
        needed, free = sum(parts.values()), free_bytes(folder)
        if free >= needed:
            continue
        named = ", ".join(f"{_NAMES[k]} {format_bytes(v)}" for k, v in parts.items() if v)
        raise StorageError(
            f"{folder}: this run needs {format_bytes(needed)} there ({named}), {format_bytes(free)} are free.",
            hint=(
                "Free some space, choose another --output, set output.checkpoints to a folder on another disk, or "
                "lower training.keep_checkpoints."
            ),
        )


def _on_one_device(*folders: Path) -> bool:
    return len({folder.stat().st_dev for folder in folders}) == 1


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
