"""The command tree, and the one place where an error becomes a message and an exit code.

Nothing heavy is imported at module level: help and mistakes answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ollatune import __version__
from ollatune.base.errors import OllatuneError
from ollatune.base.leaving import leave
from ollatune.base.log import configure_logging, redact
from ollatune.base.signals import StopSignal, handling, raise_stop

app = typer.Typer(
    name="ollatune",
    help="Fine-tune the models Ollama serves, on the weights it serves, and put them back - proved.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ConfigFlag = Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: section.key=value. Repeatable."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Also log details.")]


def _flags(**values: Any) -> dict[str, Any]:
    """Named flags that were given, by the dotted key of the setting that each stands for."""
    return {key.replace("__", "."): value for key, value in values.items() if value is not None}


def _finish(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False, default=str))
    else:
        shown = text(result)
        if shown:
            print(shown)


@app.command()
def train(
    config: ConfigFlag = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="File or folder of records.  [data/processed/]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Ollama name, .gguf file, or embedded:smollm2-135m."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder.  [models/trained/]")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Go on from this checkpoint, or `auto` for the newest."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    batch_size: Annotated[
        str | None, typer.Option("--batch-size", help="Examples per micro-batch, or `auto`.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option("--gradient-accumulation-steps", help="Micro-batches per optimiser step."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Rank of the adapter.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after this many optimiser steps.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="The Ollama server that pulls the base.")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Join the processes torchrun started.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Anomaly detection, shapes and norms, first batch shown."),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Record where time and memory go.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although settings or data changed.")
    ] = False,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Fine-tune a model.

    Example: ollatune train --model llama3.2:1b --data data/processed/ --output models/trained/
    """
    from ollatune.commands.train import TrainOptions, run_train

    configure_logging(level=logging.DEBUG if verbose or debug else logging.INFO)
    flags = _flags(
        data__sources=None if data is None else [{"path": str(data)}],
        model__base_model=model,
        output__folder=output,
        training__epochs=epochs,
        training__batch_size=_whole_number(batch_size),
        training__learning_rate=learning_rate,
        training__gradient_accumulation_steps=gradient_accumulation_steps,
        training__max_steps=max_steps,
        training__seed=seed,
        advanced__lora_rank=lora_rank,
        ollama__host=host,
    )
    result = run_train(
        TrainOptions(
            config, tuple(assignments or ()), flags, resume, overwrite, force, dry_run, debug,
            profile, distributed,
        )
    )  # fmt: skip
    _finish(result, as_json, _train_text)


def _whole_number(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def _train_text(result: dict[str, Any]) -> str:
    if not result:
        return ""
    if result.get("dry_run"):
        from ollatune.commands.dry_run import plan_text

        return plan_text(result)
    val = result.get("best_val_loss")
    loss = "" if val is None else f", best validation loss {val:.4f}"
    return (
        f"Done: {result['steps']} steps, {result['tokens']} tokens in {result['train_seconds']:.0f} s"
        f"{loss}. Next:\n  ollatune create-modelfile --checkpoint {result['best_model']} "
        "--output models/ollama/"
    )


@app.command("create-modelfile")
def create_modelfile(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="best_model.pt, or a file under checkpoints/.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The export folder.")] = Path(
        "models/ollama"
    ),
    config: ConfigFlag = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The base, where it is no longer under its old name."),
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

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    flags = _flags(
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
    _finish(result, as_json, _export_text)


def _export_text(result: dict[str, Any]) -> str:
    if result.get("dry_run"):
        return ""
    if "folder" in result:
        return f"Next:\n  AutoModelForCausalLM.from_pretrained({result['folder']!r})"
    if created := result.get("created"):
        return f"Next:\n  ollama run {created['name']}"
    return f"Next:\n  ollama create my-model -f {result['modelfile']}\n  ollama run my-model"


@app.command()
def verify(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            help="The checkpoint that was exported; or a folder of them, to see that all are whole.",
        ),
    ],
    export: Annotated[
        Path, typer.Option("--export", help="The export folder of create-modelfile.")
    ] = Path("models/ollama"),
    data: Annotated[
        Path | None, typer.Option("--data", help="Held-out records.  [the run's test files]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A tag on an Ollama server, instead of the file.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="The server's address.")] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Questions to compare.")] = 6,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base, where it is no longer under its old name."),
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Prove that what is served is what was trained (exit code 9 if not).

    Example: ollatune verify --checkpoint models/trained/best_model.pt --export models/ollama/
    """
    from ollatune.commands.verify import VerifyOptions, run_verify

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    from ollatune.commands.verify_checkpoints import (
        is_folder_of_checkpoints,
        run_verify_checkpoints,
    )

    if is_folder_of_checkpoints(checkpoint):
        result = run_verify_checkpoints(checkpoint)
    else:
        result = run_verify(VerifyOptions(checkpoint, export, data, model, host, prompts, base))
    _finish(result, as_json, lambda found: "Verified." if found["passed"] else "")


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="The checkpoint that was exported.")
    ],
    export: Annotated[
        Path, typer.Option("--export", help="The export folder of create-modelfile.")
    ] = Path("models/ollama"),
    data: Annotated[
        Path | None, typer.Option("--data", help="Held-out records.  [the run's test files]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A tag on an Ollama server, instead of the file.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's tag on that server.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="The server's address.")] = None,
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
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base, where it is no longer under its old name."),
    ] = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Score base and tuned model on held-out questions, as served.

    Example: ollatune evaluate --checkpoint models/trained/best_model.pt --require "exact_match>=0.7"
    """
    from ollatune.commands.evaluate import EvaluateOptions, evaluation_text, run_evaluate

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    result = run_evaluate(
        EvaluateOptions(
            checkpoint, export, data, model, base_model, host, tuple(metric or ()),
            tuple(requirement or ()), max_tokens, base, perplexity, general_text, forgetting,
        )
    )  # fmt: skip
    _finish(result, as_json, evaluation_text)


@app.command()
def preprocess(
    raw: Annotated[
        Path | None, typer.Argument(help="Raw file or folder.  [data.sources of the configuration]")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where train, validation and test files go.")
    ] = Path("data/processed"),
    config: ConfigFlag = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Also count tokens with this base model.")
    ] = None,
    skip_bad: Annotated[
        bool | None, typer.Option("--skip-bad", help="Set bad records aside, at most 5 %.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace data that is in the output folder.")
    ] = False,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Turn raw files into training data: validate, deduplicate, split, convert, report.

    Example: ollatune preprocess raw/ --output data/processed/
    """
    from ollatune.commands.preprocess import PreprocessOptions, preprocess_text, run_preprocess

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    flags = _flags(model__base_model=model, data__skip_bad=skip_bad)
    result = run_preprocess(
        PreprocessOptions(
            raw,
            output,
            config,
            tuple(assignments or ()),
            flags,
            model is not None,
            overwrite,
            show_progress=not as_json,
        )
    )
    _finish(result, as_json, preprocess_text)


@app.command()
def data(
    path: Annotated[
        Path | None, typer.Argument(help="File or folder of records.  [data/processed/]")
    ] = None,
    config: ConfigFlag = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Base model whose template and tokenizer decide.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, help="Examples to show.  [one micro-batch]")
    ] = None,
    skip_bad: Annotated[
        bool | None, typer.Option("--skip-bad", help="Set bad records aside, at most 5 %.")
    ] = None,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Show the first batch with its loss mask, token counts, lengths and the template used.

    Example: ollatune data data/processed/ --model llama3.2:1b
    """
    from ollatune.commands.data import DataOptions, data_text, run_data
    from ollatune.commands.train import DEFAULT_DATA

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    flags = _flags(model__base_model=model, data__skip_bad=skip_bad)
    if path is None and config is None:
        path = Path(DEFAULT_DATA)
    sets = tuple(assignments or ())
    result = run_data(DataOptions(path, config, sets, flags, examples, show_progress=not as_json))
    _finish(result, as_json, lambda found: data_text(found, color=_shows_color()))


def _shows_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


@app.command()
def demo(verbose: VerboseFlag = False) -> None:
    """Train, export, serve and score a real model on the sample data; the last line is one JSON object.

    Example: ollatune demo
    """
    from ollatune.commands.demo import run_demo

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    print(json.dumps(run_demo()))


models = typer.Typer(
    help="Models here and in the catalog: list, show, pull, ps, copy, delete.",
    invoke_without_command=True,
)
app.add_typer(models, name="models")
HostFlag = Annotated[str | None, typer.Option("--host", help="The server's address.")]
StoreFlag = Annotated[
    Path | None,
    typer.Option("--models", help="Ollama's store folder.  [OLLAMA_MODELS, or its default]"),
]


@models.callback()
def _models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        models_list(None, None, False)


@models.command("list")
def models_list(store: StoreFlag = None, host: HostFlag = None, as_json: JsonFlag = False) -> None:
    """What is in the local store, on a server, embedded, and in the catalog with the memory each needs.

    Example: ollatune models list
    """
    from ollatune.commands.models import list_models, list_text

    configure_logging()
    _finish(list_models(store, host), as_json, list_text)


@models.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Ollama name, .gguf file, or embedded model.")],
    store: StoreFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """What is in a model's file, and whether it can be trained here.

    Example: ollatune models show embedded:smollm2-135m
    """
    from ollatune.commands.models import show_model, show_text

    configure_logging()
    _finish(show_model(name, store), as_json, show_text)


@models.command("pull")
def models_pull(
    name: Annotated[str, typer.Argument(help="Ollama name.")],
    host: Annotated[str | None, typer.Option("--host", help="The server's address.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Pull a model through a running Ollama server.

    Example: ollatune models pull llama3.2:1b
    """
    from ollatune.commands.models import pull_model

    configure_logging()
    _finish(pull_model(name, host), as_json, lambda result: f"Pulled {result['pulled']}.")


@models.command("ps")
def models_ps(host: HostFlag = None, as_json: JsonFlag = False) -> None:
    """What the Ollama server has loaded now.

    Example: ollatune models ps
    """
    from ollatune.commands.models import running_models, running_text

    configure_logging()
    _finish(running_models(host), as_json, running_text)


@models.command("copy")
def models_copy(
    source: Annotated[str, typer.Argument(help="Ollama name.")],
    destination: Annotated[str, typer.Argument(help="Its second name.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Give a model on the Ollama server a second name.

    Example: ollatune models copy ramsey-model ramsey-model:v2
    """
    from ollatune.commands.models import copy_model

    configure_logging()
    result = copy_model(source, destination, host, force=force)
    _finish(result, as_json, lambda done: f"{done['to']} is {done['copied']} now.")


@models.command("delete")
def models_delete(
    name: Annotated[str, typer.Argument(help="Ollama name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really delete it.")] = False,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Delete a model from the Ollama server.

    Example: ollatune models delete ramsey-model --yes
    """
    from ollatune.commands.models import delete_model

    configure_logging()
    _finish(delete_model(name, host, yes=yes), as_json, lambda done: f"Deleted {done['deleted']}.")


@app.command()
def release(
    name: Annotated[str | None, typer.Argument(help="The model's name in the registry.")] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="Version: v1, v1.2, v1.2.3-rc1.  [the next one]")
    ] = None,
    export: Annotated[
        Path, typer.Option("--export", help="The export folder to release, or to restore into.")
    ] = Path("models/ollama"),
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

    configure_logging()
    result = run_release(
        ReleaseOptions(
            name, tag, export, run, summary, registry, show_list, notes, alias, rollback, restore,
            push, source, host,
        )
    )  # fmt: skip
    _finish(result, as_json, release_text)


@app.command()
def bench(
    config: ConfigFlag = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="File or folder of records.  [data/processed/]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Ollama name, .gguf file, or embedded:smollm2-135m."),
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option("--batch-size", help="Examples per micro-batch, or `auto`.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option("--lora-rank", help="Rank of the adapter.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps measured.")] = 8,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps before that.")] = 2,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Instead: fixed batches side by side with other trainers. From a checkout only; "
            "installs them once into the user cache.",
        ),
    ] = False,
    rounds: Annotated[int, typer.Option("--rounds", help="With --peers: repetitions.")] = 3,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Measure the training step on this machine: speed, memory, phases, share of what is possible.

    Example: ollatune bench --model llama3.2:1b --data data/processed/
    """
    from ollatune.commands.bench import BenchOptions, bench_text, run_bench
    from ollatune.commands.train import TrainOptions

    configure_logging(level=logging.DEBUG if verbose else logging.INFO)
    flags = _flags(
        data__sources=None if data is None else [{"path": str(data)}],
        model__base_model=model,
        training__batch_size=_whole_number(batch_size),
        advanced__lora_rank=lora_rank,
    )
    options = TrainOptions(config, tuple(assignments or ()), flags)
    result = run_bench(BenchOptions(options, warmup, steps, peers, rounds))
    _finish(result, as_json, bench_text)


def _version(value: bool) -> None:
    if value:
        print(f"ollatune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _with_dashes(arguments: list[str]) -> list[str]:
    """`--learning_rate` means `--learning-rate`; values, and what follows `--`, stay as they are."""
    result: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return result + arguments[index:]
        if argument.startswith("--"):
            name, separator, value = argument.partition("=")
            argument = name.replace("_", "-") + separator + value
        result.append(argument)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code (see `base.errors`). Tracebacks are for our own mistakes only."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with handling(raise_stop):
            code = app(_with_dashes(given), prog_name="ollatune", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except OllatuneError as error:
        if not error.is_quiet:
            print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except StopSignal as stop:
        print(f"error: {stop.message}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        return _usage_error(error)


def _usage_error(error: Exception) -> int:
    """Typer's own errors (unknown option, missing value) in our form; anything else is a bug: its traceback stays."""
    show = getattr(error, "format_message", None)
    if show is None:
        if type(error).__name__ == "Abort":
            return 130
        raise error
    context = getattr(error, "ctx", None)
    where = f" Try `{context.command_path} --help`." if context is not None else ""
    print(f"error: {show()}{where}", file=sys.stderr)
    return int(getattr(error, "exit_code", 2))


def entry() -> None:
    """The console command."""
    leave(main())
