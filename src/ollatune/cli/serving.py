"""`ollatune create-modelfile`, `verify`, `evaluate` and `release`: from a checkpoint to a model that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ollatune.cli.options import (
    EXPORT_FOLDER,
    MOVED_BASE_HELP,
    ConfigFlag,
    ExportFlag,
    HeldOutFlag,
    HostFlag,
    JsonFlag,
    MovedBaseFlag,
    ServedTagFlag,
    SetFlag,
    VerboseFlag,
    finish,
    log_to_terminal,
    settings,
)


def create_modelfile(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="best_model.pt, or a file under checkpoints/.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The export folder.")
    ] = EXPORT_FOLDER,
    config: ConfigFlag = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=MOVED_BASE_HELP),
    ] = None,
    tensor_type: Annotated[
        str | None,
        typer.Option("--type", help="Type of the tuned tensors: q8_0, q6_K, f16, q4_K_M, …"),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="SYSTEM message of the exported model.")
    ] = None,
    accept_recovery: Annotated[
        bool | None,
        typer.Option("--accept-recovery", help="Write tensors whose update does not survive."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf: merged, serves everywhere. adapter: GGUF LoRA on its base. hf: for Transformers.",
        ),
    ] = "gguf",
    create: Annotated[
        str | None,
        typer.Option("--create", help="Also create this model in Ollama, and verify it."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="With --create: records to verify with.  [the run's test files]"
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="With --create: the server's address.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --create: replace a tag that exists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan of the export, and write nothing.")
    ] = False,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Export a checkpoint for Ollama (GGUF with its Modelfile) or for Transformers.

    Example: ollatune create-modelfile --checkpoint models/trained/best_model.pt --output models/ollama/
    """
    from ollatune.commands.create_modelfile import ExportOptions, run_create_modelfile

    log_to_terminal(verbose)
    flags = settings(
        export__tensor_type=tensor_type,
        export__system=system,
        export__accept_recovery=accept_recovery,
        ollama__host=host,
    )
    result = run_create_modelfile(
        ExportOptions(
            checkpoint,
            output,
            config,
            tuple(assignments or ()),
            flags,
            model,
            create,
            force,
            dry_run,
            format,
            data,
        )
    )
    finish(result, as_json, _export_text)


def _export_text(result: dict[str, Any]) -> str:
    if result.get("dry_run"):
        return ""
    if "folder" in result:
        return f"Next:\n  AutoModelForCausalLM.from_pretrained({result['folder']!r})"
    if created := result.get("created"):
        return f"Next:\n  ollama run {created['name']}"
    return f"Next:\n  ollama create my-model -f {result['modelfile']}\n  ollama run my-model"


def verify(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            help="The checkpoint that was exported; or a folder of them, to see that all are whole.",
        ),
    ],
    export: ExportFlag = EXPORT_FOLDER,
    data: HeldOutFlag = None,
    model: ServedTagFlag = None,
    host: HostFlag = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Questions to compare.")] = 6,
    base: MovedBaseFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Prove that what is served is what was trained (exit code 9 if not).

    Example: ollatune verify --checkpoint models/trained/best_model.pt --export models/ollama/
    """
    from ollatune.commands.verify import VerifyOptions, run_verify
    from ollatune.commands.verify_checkpoints import (
        is_folder_of_checkpoints,
        run_verify_checkpoints,
    )

    log_to_terminal(verbose)
    if is_folder_of_checkpoints(checkpoint):
        result = run_verify_checkpoints(checkpoint)
    else:
        result = run_verify(VerifyOptions(checkpoint, export, data, model, host, prompts, base))
    finish(result, as_json, lambda found: "Verified." if found["passed"] else "")


def evaluate(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="The checkpoint that was exported.")
    ],
    export: ExportFlag = EXPORT_FOLDER,
    data: HeldOutFlag = None,
    model: ServedTagFlag = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's tag on that server.")
    ] = None,
    host: HostFlag = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="exact_match, field_accuracy, rouge_l, …, file.py:function."),
    ] = None,
    requirement: Annotated[
        list[str] | None, typer.Option("--require", help='A gate, e.g. "exact_match>=0.7".')
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    perplexity: Annotated[
        int,
        typer.Option(
            "--perplexity",
            min=0,
            help="Records whose perplexity is measured, on the files. 0: none.",
        ),
    ] = 16,
    general_text: Annotated[
        Path | None,
        typer.Option("--general-text", help="Prose to measure forgetting on.  [the package's own]"),
    ] = None,
    forgetting: Annotated[
        bool,
        typer.Option(
            "--forgetting/--no-forgetting", help="Perplexity on general prose, before and after."
        ),
    ] = True,
    base: MovedBaseFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Score base and tuned model on held-out questions, as served.

    Example: ollatune evaluate --checkpoint models/trained/best_model.pt --require "exact_match>=0.7"
    """
    from ollatune.commands.evaluate import EvaluateOptions, evaluation_text, run_evaluate

    log_to_terminal(verbose)
    result = run_evaluate(
        EvaluateOptions(
            checkpoint, export, data, model, base_model, host, tuple(metric or ()),
            tuple(requirement or ()), max_tokens, base, perplexity, general_text, forgetting,
        )
    )  # fmt: skip
    finish(result, as_json, evaluation_text)


def release(
    name: Annotated[str | None, typer.Argument(help="The model's name in the registry.")] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="Version: v1, v1.2, v1.2.3-rc1.  [the next one]")
    ] = None,
    export: Annotated[
        Path, typer.Option("--export", help="The export folder to release, or to restore into.")
    ] = EXPORT_FOLDER,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run's folder.  [models/trained/ if it fits]")
    ] = None,
    summary: Annotated[str, typer.Option("--summary", help="A sentence for the notes.")] = "",
    registry: Annotated[
        Path | None, typer.Option("--registry", help="Registry folder.  [OLLATUNE_REGISTRY]")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List models and versions.")] = False,
    notes: Annotated[
        str | None, typer.Option("--notes", help="Print the notes of a version or alias.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option("--alias", help="Let this name stand for --tag.  [latest]")
    ] = None,
    rollback: Annotated[
        str | None, typer.Option("--rollback", help="Let latest be this version, or `parent`.")
    ] = None,
    restore: Annotated[
        str | None, typer.Option("--restore", help="Put a version's files into --export.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Also push to a registry: USER/MODEL:TAG.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="The export's tag on the Ollama server: it is named NAME:TAG, too."
        ),
    ] = None,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Release an export as a version of a model: with its origin, metrics, notes, and a way back.

    Example: ollatune release ramsey-model --tag v2 --summary "More data."
    """
    from ollatune.commands.release import ReleaseOptions, release_text, run_release

    log_to_terminal()
    result = run_release(
        ReleaseOptions(
            name, tag, export, run, summary, registry, show_list, notes, alias, rollback, restore,
            push, source, host,
        )
    )  # fmt: skip
    finish(result, as_json, release_text)
