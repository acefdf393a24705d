"""`ollatune create-modelfile`: checkpoint → GGUF + Modelfile, and into Ollama if asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ollatune.base.errors import InputError, ServiceError, UsageError, VerificationError
from ollatune.base.files import clean_staging, refuse_unwritable
from ollatune.base.log import get_logger
from ollatune.base.text import did_you_mean, format_bytes
from ollatune.config.load import ParsedYaml, load_config
from ollatune.config.schema import Config

if TYPE_CHECKING:
    from ollatune.checkpoint.format import Checkpoint
    from ollatune.modeling.opened import OpenBase

Format = Literal["gguf", "adapter", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
_MODEL_FILES = ("model.gguf", "adapter.gguf", "config.json", "model.safetensors")


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
    format: str = "gguf"
    data: Path | None = None


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
    _check_options(options)
    from ollatune.checkpoint.store import load_checkpoint
    from ollatune.commands.remote import remote_finder
    from ollatune.export.bundle import plan_bundle, require_same_base
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
    if options.dry_run:
        plan = plan_bundle(base, checkpoint, config)
        get_logger("export").info("%s", plan.table())
        return {"dry_run": True, "output": str(options.output), **plan.to_json()}
    _require_own_folder(options.output, options.format)
    write = {"gguf": _write_gguf, "adapter": _write_adapter, "hf": _write_hf}[options.format]
    return write(options, checkpoint, config, base)


def _write_gguf(
    options: ExportOptions, checkpoint: Checkpoint, config: Config, base: OpenBase
) -> dict[str, Any]:
    from ollatune.export.bundle import write_bundle

    context = _served_context(config, base)
    bundle = write_bundle(base, checkpoint, config, options.output, context=context)
    recovery = bundle.result.smallest_recovery
    get_logger("export").info(
        "Wrote %s (%s; smallest recovery of the update %s) and %s.",
        bundle.gguf_path, format_bytes(bundle.result.size_bytes),
        "-" if recovery is None else f"{recovery:.3f}", options.output / "Modelfile",
    )  # fmt: skip
    result = {
        "format": "gguf",
        "gguf": str(bundle.gguf_path),
        "modelfile": str(options.output / "Modelfile"),
        "sha256": bundle.result.sha256,
        "size_bytes": bundle.result.size_bytes,
        "smallest_recovery": recovery,
        "identity": bundle.identity,
        "base": base.source.name,
        "notes": list(bundle.serving.notes),
    }
    if options.create:
        from ollatune.commands.create import create_in_ollama, merged_model

        model = merged_model(bundle, base)
        result["created"] = _created(
            options, lambda: create_in_ollama(options, config, options.output, model)
        )
    return result


def _write_adapter(
    options: ExportOptions, checkpoint: Checkpoint, config: Config, base: OpenBase
) -> dict[str, Any]:
    from ollatune.export.adapter_bundle import write_adapter_bundle

    context = _served_context(config, base)
    bundle = write_adapter_bundle(base, checkpoint, config, options.output, context=context)
    get_logger("export").info(
        "Wrote %s (%s) and %s.",
        bundle.gguf_path, format_bytes(bundle.result.size_bytes), options.output / "Modelfile",
    )  # fmt: skip
    result = {
        "format": "adapter",
        "adapter": str(bundle.gguf_path),
        "modelfile": str(options.output / "Modelfile"),
        "sha256": bundle.result.sha256,
        "size_bytes": bundle.result.size_bytes,
        "base": base.source.name,
        "notes": list(bundle.serving.notes),
    }
    if options.create:
        from ollatune.commands.create import adapter_model, create_in_ollama

        model = adapter_model(bundle, base, config)
        result["created"] = _created(
            options, lambda: create_in_ollama(options, config, options.output, model)
        )
    return result


def _write_hf(
    options: ExportOptions, checkpoint: Checkpoint, config: Config, base: OpenBase
) -> dict[str, Any]:
    from ollatune.export.hf_folder import DEFAULT_HF_DTYPE, HF_DTYPES, hf_dtype, write_hf_folder

    wanted = config.export.tensor_type
    is_chosen = "export.tensor_type" in options.flags or wanted in HF_DTYPES
    written = write_hf_folder(
        base, checkpoint, config, options.output,
        dtype=hf_dtype(wanted if is_chosen else DEFAULT_HF_DTYPE),
        context=_served_context(config, base),
    )  # fmt: skip
    get_logger("export").info("Wrote %s (%s).", written.folder, format_bytes(written.size_bytes))
    return {
        "format": "hf",
        "folder": str(written.folder),
        "files": [str(path) for path in written.files],
        "size_bytes": written.size_bytes,
        "base": base.source.name,
        "notes": list(written.notes),
    }


def _created(options: ExportOptions, create: Any) -> dict[str, Any]:
    """Run `create`; where the server fails, say that the export is there and how to go on without it."""
    try:
        created: dict[str, Any] = create()
        return created
    except VerificationError as error:
        error.hint = f"{error.hint} `{options.create}` was not created; the export is in {options.output}.".strip()
        raise
    except ServiceError as error:
        error.message = (
            f"The export is written to {options.output} and complete, but `{options.create}` was not created: "
            f"{error.message}"
        )
        error.hint = (
            f"{error.hint} Then run the same command again, or `ollama create {options.create} -f "
            f"{options.output / 'Modelfile'}`; `ollatune verify` works without a server."
        ).strip()
        raise


def _served_context(config: Config, base: OpenBase) -> int:
    """Tokens of context that the export is served with: the run's, at most what the base was made for."""
    return min(config.model.context_window, base.context_length or config.model.context_window)


def base_name(base: dict[str, Any]) -> str:
    return str(base["path"]) if base["origin"] == "file" else str(base["name"])


def _check_options(options: ExportOptions) -> None:
    if options.format not in FORMATS:
        raise UsageError(
            f"--format `{options.format}` is not known.{did_you_mean(options.format, FORMATS)}",
            hint=f"Choose one of {', '.join(FORMATS)}.",
        )
    if options.format == "hf" and options.create:
        raise UsageError(
            "--create does not go with --format hf: Ollama's converter drops the rotary parameters and the chat "
            "template of such folders.",
            hint="Create from the merged GGUF: --format gguf.",
        )
    if options.dry_run and options.format != "gguf":
        raise UsageError(
            "--dry-run plans GGUF files only.", hint="Leave out --format or --dry-run."
        )
    if options.create:
        from ollatune.ollama.names import ModelName

        ModelName.parse(options.create)  # a wrong name is found before minutes of work
    if not options.dry_run:
        refuse_unwritable(options.output)


def _require_own_folder(folder: Path, wanted: str) -> None:
    """A folder with a model that we did not write is somebody's; one export a folder."""
    clean_staging(folder)
    found = next((name for name in _MODEL_FILES if (folder / name).exists()), None)
    if found is None:
        return
    report = folder / "export.json"
    if not report.exists():
        raise InputError(
            f"{folder} holds a {found} that ollatune did not write; it was left as it is.",
            hint="Choose another folder with --output.",
        )
    try:
        written = str(json.loads(report.read_bytes()).get("format", "gguf"))
    except (OSError, ValueError, AttributeError):
        return  # a damaged report is written anew
    if written != wanted:
        raise InputError(
            f"{folder} holds an export in the format `{written}`; it was left as it is.",
            hint="Choose another folder with --output, or remove that one.",
        )
