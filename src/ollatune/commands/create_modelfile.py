"""`ollatune create-modelfile`: checkpoint → GGUF + Modelfile, and into Ollama if asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.config.load import ParsedYaml, load_config
from ollatune.config.schema import Config


@dataclass(frozen=True)
class ExportOptions:
    """The flags of `ollatune create-modelfile`."""

    checkpoint: Path
    output: Path = Path("models/ollama")
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    create: str | None = None
    force: bool = False
    dry_run: bool = False


def export_config(options: ExportOptions, trained_with: dict[str, Any]) -> Config:
    """The run's own configuration, with export settings from a file, `--set` and flags laid over it."""
    values = {key: dict(section) for key, section in trained_with.items()}
    if options.config is not None:
        given = load_config(options.config).model_dump(mode="json")
        values["export"], values["ollama"] = given["export"], given["ollama"]
    source = ParsedYaml(str(options.checkpoint), values)
    return load_config(source, assignments=options.assignments, overrides=options.flags)


def run_create_modelfile(options: ExportOptions) -> dict[str, Any]:
    """Export a checkpoint. Returns the result that `--json` prints."""
    from ollatune.checkpoint.store import load_checkpoint
    from ollatune.commands.remote import remote_finder
    from ollatune.export.bundle import plan_bundle, require_same_base, write_bundle
    from ollatune.modeling.base import resolve_base
    from ollatune.modeling.opened import open_base

    checkpoint = load_checkpoint(options.checkpoint)
    config = export_config(options, checkpoint.config)
    name = options.model or base_name(checkpoint.base)
    source = resolve_base(
        name, models_folder=config.ollama.models, find_remote=remote_finder(config)
    )
    base = open_base(source)
    require_same_base(base, checkpoint)
    context = min(config.model.context_window, base.context_length or config.model.context_window)
    if options.dry_run:
        plan = plan_bundle(base, checkpoint, config)
        get_logger("export").info("%s", plan.table())
        return {"dry_run": True, "output": str(options.output), **plan.to_json()}
    _require_own_folder(options.output)
    bundle = write_bundle(base, checkpoint, config, options.output, context=context)
    recovery = bundle.result.smallest_recovery
    get_logger("export").info(
        "Wrote %s (%s; smallest recovery of the update %s) and %s.",
        bundle.gguf_path, format_bytes(bundle.result.size_bytes),
        "-" if recovery is None else f"{recovery:.3f}", options.output / "Modelfile",
    )  # fmt: skip
    result = {
        "gguf": str(bundle.gguf_path),
        "modelfile": str(options.output / "Modelfile"),
        "sha256": bundle.result.sha256,
        "size_bytes": bundle.result.size_bytes,
        "smallest_recovery": recovery,
        "base": source.name,
        "notes": list(bundle.serving.notes),
    }
    if options.create:
        from ollatune.commands.create import create_in_ollama

        result["created"] = create_in_ollama(options, config, bundle)
    return result


def base_name(base: dict[str, Any]) -> str:
    return str(base["path"]) if base["origin"] == "file" else str(base["name"])


def _require_own_folder(folder: Path) -> None:
    """A folder with a model.gguf that we did not write is somebody's model."""
    if (folder / "model.gguf").exists() and not (folder / "export.json").exists():
        raise InputError(
            f"{folder} holds a model.gguf that ollatune did not write; it was left as it is.",
            hint="Choose another folder with --output.",
        )
