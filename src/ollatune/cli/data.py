"""`ollatune preprocess` and `ollatune data`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ollatune.cli.options import (
    ConfigFlag,
    JsonFlag,
    SetFlag,
    SkipBadFlag,
    VerboseFlag,
    finish,
    log_to_terminal,
    settings,
)


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
    skip_bad: SkipBadFlag = None,
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

    log_to_terminal(verbose)
    flags = settings(model__base_model=model, data__skip_bad=skip_bad)
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
    finish(result, as_json, preprocess_text)


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
    skip_bad: SkipBadFlag = None,
    assignments: SetFlag = None,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Show the first batch with its loss mask, token counts, lengths and the template used.

    Example: ollatune data data/processed/ --model llama3.2:1b
    """
    from ollatune.commands.data import DataOptions, data_text, run_data
    from ollatune.commands.train import DEFAULT_DATA

    log_to_terminal(verbose)
    flags = settings(model__base_model=model, data__skip_bad=skip_bad)
    if path is None and config is None:
        path = Path(DEFAULT_DATA)
    sets = tuple(assignments or ())
    result = run_data(DataOptions(path, config, sets, flags, examples, show_progress=not as_json))
    finish(result, as_json, lambda found: data_text(found, color=_shows_color()))


def _shows_color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
