"""`ollatune train` and `ollatune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ollatune.cli.options import (
    BaseModelFlag,
    BatchSizeFlag,
    ConfigFlag,
    JsonFlag,
    LoraRankFlag,
    RecordsFlag,
    SetFlag,
    VerboseFlag,
    finish,
    log_to_terminal,
    settings,
    source_of,
    whole_number,
)


def train(
    config: ConfigFlag = None,
    data: RecordsFlag = None,
    model: BaseModelFlag = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder.  [models/trained/]")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Go on from this checkpoint, or `auto` for the newest."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    batch_size: BatchSizeFlag = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option("--gradient-accumulation-steps", help="Micro-batches per optimiser step."),
    ] = None,
    lora_rank: LoraRankFlag = None,
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

    log_to_terminal(verbose or debug)
    flags = settings(
        data__sources=source_of(data),
        model__base_model=model,
        output__folder=output,
        training__epochs=epochs,
        training__batch_size=whole_number(batch_size),
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
    finish(result, as_json, _train_text)


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


def bench(
    config: ConfigFlag = None,
    data: RecordsFlag = None,
    model: BaseModelFlag = None,
    batch_size: BatchSizeFlag = None,
    lora_rank: LoraRankFlag = None,
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

    log_to_terminal(verbose)
    flags = settings(
        data__sources=source_of(data),
        model__base_model=model,
        training__batch_size=whole_number(batch_size),
        advanced__lora_rank=lora_rank,
    )
    options = TrainOptions(config, tuple(assignments or ()), flags)
    result = run_bench(BenchOptions(options, warmup, steps, peers, rounds))
    finish(result, as_json, bench_text)
