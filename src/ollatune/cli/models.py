"""`ollatune models`: what is here, and what is in the catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ollatune.cli.options import HostFlag, JsonFlag, NameArgument, finish, log_to_terminal

models = typer.Typer(
    help="Models here and in the catalog: list, show, pull, ps, copy, delete.",
    invoke_without_command=True,
)
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

    log_to_terminal()
    finish(list_models(store, host), as_json, list_text)


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

    log_to_terminal()
    finish(show_model(name, store), as_json, show_text)


@models.command("pull")
def models_pull(
    name: NameArgument,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Pull a model through a running Ollama server.

    Example: ollatune models pull llama3.2:1b
    """
    from ollatune.commands.models import pull_model

    log_to_terminal()
    finish(pull_model(name, host), as_json, lambda result: f"Pulled {result['pulled']}.")


@models.command("ps")
def models_ps(host: HostFlag = None, as_json: JsonFlag = False) -> None:
    """What the Ollama server has loaded now.

    Example: ollatune models ps
    """
    from ollatune.commands.models import running_models, running_text

    log_to_terminal()
    finish(running_models(host), as_json, running_text)


@models.command("copy")
def models_copy(
    source: NameArgument,
    destination: Annotated[str, typer.Argument(help="Its second name.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a model of that name.")] = False,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Give a model on the Ollama server a second name.

    Example: ollatune models copy ramsey-model ramsey-model:v2
    """
    from ollatune.commands.models import copy_model

    log_to_terminal()
    result = copy_model(source, destination, host, force=force)
    finish(result, as_json, lambda done: f"{done['to']} is {done['copied']} now.")


@models.command("delete")
def models_delete(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Really delete it.")] = False,
    host: HostFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Delete a model from the Ollama server.

    Example: ollatune models delete ramsey-model --yes
    """
    from ollatune.commands.models import delete_model

    log_to_terminal()
    finish(delete_model(name, host, yes=yes), as_json, lambda done: f"Deleted {done['deleted']}.")
