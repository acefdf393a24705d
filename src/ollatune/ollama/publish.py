"""Putting a finished GGUF on a server under a name, so that the name never stands for something half done.

    blob: HEAD, POST if missing  →  create under a staging tag  →  one token and the caller's check  →  copy to the name
    →  delete the staging tag

Killed anywhere, the name is what it was before; the next run takes up the staging tag and the blobs that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import sha256_file
from ollatune.ollama.answers import ProgressCallback, ShownModel
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import ModelMissing, OllamaError
from ollatune.ollama.names import ModelName
from ollatune.ollama.parameters import checked_parameters

_STAGING_SUFFIX = "-ollatune-staging"
_MAX_TAG_BYTES = 80
_NO_STOPS: Mapping[str, Any] = {"stop": []}


@dataclass(frozen=True)
class ModelToPublish:
    """What a model is made of. Either `gguf` (complete weights) or `adapter` with `base` (a LoRA on a served model).

    Attributes:
        architecture: GGUF architecture, needed for an adapter.
        template, system: None leaves them out; with `base`, they are then the base's.
        identity: metadata that tells this very export apart from any other, to recognise it on the server.
    """

    gguf: Path | None = None
    adapter: Path | None = None
    base: str = ""
    architecture: str = ""
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    licenses: Sequence[str] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """The outcome. `was_there`: the very same model had that name already, and nothing was done."""

    name: str
    digest: str
    was_there: bool = False


def publish(
    client: OllamaClient,
    name: str,
    model: ModelToPublish,
    *,
    force: bool = False,
    check: Callable[[str], None] | None = None,
    progress: ProgressCallback | None = None,
) -> Published:
    """Create `name` from `model`. `check` gets the staging name and raises where the served model is not good.

    Raises:
        UsageError: the name is taken and `force` is not set. InputError: adapter where it would not be served right,
        wrong parameters, or a file that changes on the way. OllamaError: the server's failure.
    """
    target = ModelName.parse(name)
    parameters = checked_parameters(dict(model.parameters))
    _require_routes(client, model)
    weights = model.adapter or model.gguf
    if weights is None:
        raise UsageError("Nothing to publish: neither a GGUF nor an adapter is given.")
    shown = _shown(client, target.short)
    if shown is not None and not force:
        if _is_same(shown, model, parameters):
            _delete_quietly(
                client, _staging_name(target)
            )  # of a run that was killed at the very end
            return Published(target.short, _digest_of(shown), was_there=True)
        raise UsageError(
            f"The server has a model {target.short} already.",
            hint="Choose another name, or replace it with --force.",
        )
    digest = client.upload_blob(weights, progress=progress)
    staging = _staging_name(target)
    client.create(_request(staging, model, parameters, weights, digest), progress=progress)
    try:
        client.generate(staging, "Hi", options={"num_predict": 1, "temperature": 0, "seed": 1})
        if check:
            check(staging)
        client.copy(staging, target.short)
    finally:
        with suppress(
            OllamaError
        ):  # a failure here must not hide the one above; the next run takes it up
            client.delete(staging)
    return Published(target.short, digest)


def _require_routes(client: OllamaClient, model: ModelToPublish) -> None:
    version = client.version()
    if model.adapter is not None:
        if not model.base or not model.architecture:
            raise UsageError("An adapter needs the name of its base model and its architecture.")
        if reason := version.adapter_refusal(model.architecture):
            raise InputError(
                f"{model.adapter.name} would not be served: {reason}.",
                hint="Export the merged model instead (--format gguf): it works with every version.",
            )
    if model.renderer or model.parser:
        client.require(version.has_renderers, "use the base model's renderer and parser", "0.12.0")


def _request(
    name: str,
    model: ModelToPublish,
    parameters: Mapping[str, Any],
    weights: Path,
    digest: str,
) -> dict[str, Any]:
    """The JSON of `/api/create`: only what is set, since empty fields cannot clear what a base has."""
    if model.adapter is not None:
        sources: dict[str, Any] = {"from": model.base, "adapters": {_file_name(weights): digest}}
    else:
        sources = {"files": {_file_name(weights): digest}}
        # Said even where there are none: the server adds those of a template that it recognises in the file.
        parameters = {**_NO_STOPS, **parameters}
    fields = {
        "template": model.template, "system": model.system, "parameters": dict(parameters),
        "license": list(model.licenses), "messages": [dict(message) for message in model.messages],
        "renderer": model.renderer, "parser": model.parser, "requires": model.requires,
    }  # fmt: skip
    return {"model": name, **sources, **{key: value for key, value in fields.items() if value}}


def _file_name(path: Path) -> str:
    """A name the server takes: relative, and ending so that it knows the format."""
    return "model.gguf" if path.suffix.lower() != ".gguf" else path.name


def _shown(client: OllamaClient, name: str) -> ShownModel | None:
    try:
        return client.show(name)
    except ModelMissing:
        return None


def _is_same(shown: ShownModel, model: ModelToPublish, parameters: Mapping[str, Any]) -> bool:
    """Whether `shown` was made from `model`. A merged model is known by its identity alone, for servers since 0.30
    store other bytes than they are sent; an adapter, which they do not rewrite, by its digest."""
    if model.adapter is not None:
        digest = sha256_file(model.adapter)
        if [_digest_in(path) for path in shown.adapter_paths] != [f"sha256:{digest}"]:
            return False
        # What is not said is the base's.
        said = {key: shown.parameters.get(key) for key in parameters}
        return (
            shown.template == (model.template or shown.template)
            and shown.system == (model.system or shown.system)
            and said == dict(parameters)
        )
    found = {key: shown.metadata.get(key) for key in model.identity}
    if not model.identity or found != dict(model.identity):
        return False
    return (
        shown.template == (model.template or shown.template)
        and shown.system == (model.system or "")
        and [dict(m) for m in shown.messages] == [dict(m) for m in model.messages]
        and {**_NO_STOPS, **shown.parameters} == {**_NO_STOPS, **parameters}
    )


def _delete_quietly(client: OllamaClient, name: str) -> None:
    """A failure here must not hide the one that led here; the next run deletes what stays."""
    with suppress(OllamaError):
        client.delete(name)


def _digest_of(shown: ShownModel) -> str:
    return _digest_in(shown.blob_path)


def _digest_in(blob_path: str) -> str:
    """The digest that a blob's path on the server ends with; the path may be of another system than this one."""
    return blob_path.replace("\\", "/").rpartition("/")[2].replace("sha256-", "sha256:")


def _staging_name(target: ModelName) -> str:
    tag = target.tag[: _MAX_TAG_BYTES - len(_STAGING_SUFFIX)] + _STAGING_SUFFIX
    return ModelName(target.host, target.namespace, target.model, tag).short
