"""The command tree, and the one place where an error becomes a message and an exit code.

Nothing heavy is imported at module level: help and mistakes answer at once.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ollatune import __version__
from ollatune.base.errors import Interrupted, OllatuneError
from ollatune.base.leaving import is_first_process, leave
from ollatune.base.log import redact
from ollatune.base.signals import StopSignal, handling, raise_stop
from ollatune.cli.data import data, preprocess
from ollatune.cli.models import models
from ollatune.cli.options import VerboseFlag, log_to_terminal
from ollatune.cli.serving import create_modelfile, evaluate, release, verify
from ollatune.cli.training import bench, train

app = typer.Typer(
    name="ollatune",
    help="Fine-tune the models Ollama serves, on the weights it serves, and put them back - proved.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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


def demo(verbose: VerboseFlag = False) -> None:
    """Train, export, serve and score a real model on the sample data; the last line is one JSON object.

    Example: ollatune demo
    """
    from ollatune.commands.demo import run_demo

    log_to_terminal(verbose)
    print(json.dumps(run_demo()))


app.command()(train)
app.command("create-modelfile")(create_modelfile)
app.command()(verify)
app.command()(evaluate)
app.command()(preprocess)
app.command()(data)
app.command()(demo)
app.command()(release)
app.command()(bench)
app.add_typer(models, name="models")


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
        if not error.is_quiet and (is_first_process() or not isinstance(error, Interrupted)):
            print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except StopSignal as stop:
        if is_first_process():
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
