"""Options that several commands have, and what every command does with its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ollatune.base.log import configure_logging

ConfigFlag = Annotated[Path | None, typer.Option("--config", "-c", help="YAML configuration file.")]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: section.key=value. Repeatable."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Also log details.")]

RecordsFlag = Annotated[
    Path | None, typer.Option("--data", help="File or folder of records.  [data/processed/]")
]
BaseModelFlag = Annotated[
    str | None,
    typer.Option("--model", help="Ollama name, .gguf file, or embedded:smollm2-135m."),
]
BatchSizeFlag = Annotated[
    str | None, typer.Option("--batch-size", help="Examples per micro-batch, or `auto`.")
]
LoraRankFlag = Annotated[int | None, typer.Option("--lora-rank", help="Rank of the adapter.")]
SkipBadFlag = Annotated[
    bool | None, typer.Option("--skip-bad", help="Set bad records aside, at most 5 %.")
]

ExportFlag = Annotated[
    Path, typer.Option("--export", help="The export folder of create-modelfile.")
]
HeldOutFlag = Annotated[
    Path | None, typer.Option("--data", help="Held-out records.  [the run's test files]")
]
ServedTagFlag = Annotated[
    str | None, typer.Option("--model", help="A tag on an Ollama server, instead of the file.")
]
MOVED_BASE_HELP = "The base, where it is no longer under its old name."
MovedBaseFlag = Annotated[str | None, typer.Option("--base", help=MOVED_BASE_HELP)]
HostFlag = Annotated[str | None, typer.Option("--host", help="The server's address.")]
NameArgument = Annotated[str, typer.Argument(help="Ollama name.")]

EXPORT_FOLDER = Path("models/ollama")


def log_to_terminal(verbose: bool = False) -> None:
    """Log on stderr; details where they are wanted."""
    configure_logging(level=logging.DEBUG if verbose else logging.INFO)


def settings(**values: Any) -> dict[str, Any]:
    """Named flags that were given, by the dotted key of the setting that each stands for."""
    return {key.replace("__", "."): value for key, value in values.items() if value is not None}


def source_of(data: Path | None) -> list[dict[str, str]] | None:
    """`--data` as `data.sources`."""
    return None if data is None else [{"path": str(data)}]


def whole_number(text: str | None) -> int | str | None:
    """`--batch-size` is a number or `auto`."""
    return int(text) if text is not None and text.isdigit() else text


def finish(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print the result as `--json` asks, or in words."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, default=str))
    elif shown := text(result):
        print(shown)
