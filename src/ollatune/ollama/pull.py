"""From a name to files on this machine: the local store, else the store of a running server, else a pull."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ollatune.base.errors import InputError, ServiceError
from ollatune.base.log import get_logger
from ollatune.ollama.answers import ProgressCallback, ShownModel
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import ModelMissing, ServerDown
from ollatune.ollama.names import ModelName
from ollatune.ollama.store import LocalStore, find_local, store_roots
from ollatune.ollama.stored import StoredModel

DEFAULT_BASE = "embedded:smollm2-135m"
"""The base model that needs neither a store nor a server; errors name it."""


def ensure_local(
    name: str | ModelName,
    client: OllamaClient,
    *,
    roots: Sequence[Path] | None = None,
    progress: ProgressCallback | None = None,
) -> StoredModel:
    """The model `name` with its files on this machine, pulled through the server where it has to be.

    Raises:
        UsageError: no valid name. InputError: a cloud model, or on a server whose files cannot be read from here.
        StorageError: a store may not be read. ServiceError: not here and no server, or the server's failure.
    """
    wanted = name if isinstance(name, ModelName) else ModelName.parse(name)
    if wanted.is_cloud:
        raise InputError(
            f"{wanted.short} runs on Ollama's servers only; its weights cannot be had.",
            hint="Choose a model without `cloud` in its tag.",
        )
    looked = list(store_roots() if roots is None else roots)
    if stored := find_local(wanted, looked):
        return stored
    shown = _show_or_pull(wanted, client, looked, progress)
    return find_local(wanted, looked) or _in_store_of_server(wanted, shown, client)


def _show_or_pull(
    wanted: ModelName, client: OllamaClient, looked: list[Path], progress: ProgressCallback | None
) -> ShownModel:
    name = wanted.short
    try:
        return client.show(name)
    except ModelMissing:
        get_logger("ollama").info("Pulling %s through %s", name, client.endpoint.url)
    except ServerDown as error:
        raise _not_present(wanted, looked, error) from error
    try:
        client.pull(name, progress=progress)
    except ModelMissing as error:
        raise InputError(
            f"There is no model {name}: neither in a local store nor on the server nor in the registry"
            f" ({error.server_text.strip()}).",
            hint=f"Check the name at https://ollama.com/library, or use {DEFAULT_BASE}.",
        ) from error
    return client.show(name)


def _in_store_of_server(wanted: ModelName, shown: ShownModel, client: OllamaClient) -> StoredModel:
    """The model in the store that the server itself uses, which lies two folders above the blob it names."""
    blob = Path(shown.blob_path)
    if blob.is_absolute() and blob.parent.name == "blobs":
        stored = LocalStore(blob.parent.parent).find(wanted)
        if stored is not None:
            return stored
    raise InputError(
        f"The server at {client.endpoint.url} has {wanted.short}, but its file {shown.blob_path or '(not named)'} is"
        " not on this machine.",
        hint="Run Ollatune where the server runs, or copy that file here and pass it with --model FILE.gguf, or pull"
        " the model into a local store with `ollama serve` and `ollama pull`; in Docker, mount the models folder and"
        " set OLLAMA_MODELS to it.",
    )


def _not_present(wanted: ModelName, looked: list[Path], error: ServerDown) -> ServiceError:
    folders = ", ".join(str(root) for root in looked)
    return ServiceError(
        f"The named base is not present and no Ollama server answers: {wanted.short} is in no local store (looked in"
        f" {folders}). {error.message}",
        hint=f"Start the server with `ollama serve` (then the model is pulled), pass a .gguf file with --model, or use"
        f" the embedded default: --model {DEFAULT_BASE}.",
    )
