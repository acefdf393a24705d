"""From the name a user gives to a base model: its GGUF file and everything it is served with.

Lookup order: embedded model, `.gguf` path, local Ollama store, a running server, a pull through that server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from ollatune.base.errors import InputError, StorageError, UsageError
from ollatune.base.files import sha256_file
from ollatune.base.folders import expanded
from ollatune.base.log import get_logger
from ollatune.catalog import load_catalog
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.split import open_gguf
from ollatune.modeling.assembled import digest_of_parts, in_order, linked_parts, merged_base
from ollatune.modeling.embedded import (
    DEFAULT_EMBEDDED,
    EMBEDDED_PREFIX,
    fetch_embedded,
    find_embedded,
)
from ollatune.ollama.names import ModelName
from ollatune.ollama.store import find_local, store_roots
from ollatune.ollama.stored import StoredModel

FindRemote = Callable[[ModelName], StoredModel]
"""Fetches a model that is not in any local store; raises where it cannot (see `ollama.pull.ensure_local`)."""


@dataclass(frozen=True)
class BaseSource:
    """A base model on this machine.

    Attributes:
        name: as it was resolved, e.g. `llama3.1:8b`; path: its GGUF (the first part of a split one).
        digest: hex sha256 of that file, or what stands for several (`assembled`).
        origin: `embedded`, `file` or `store`.
        template: the Go template it is served with, None where the GGUF's own Jinja decides.
        system, parameters, messages, licences, renderer, parser, requires: the store's other layers.
        num_merged: LoRA adapters that the store serves on top of its weights, and that are merged into `path`.
        has_projector: whether it also reads images.
    """

    name: str
    path: Path
    digest: str
    origin: str
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, Any], ...] = ()
    licences: tuple[str, ...] = ()
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    num_merged: int = 0
    has_projector: bool = False

    @property
    def is_ollama(self) -> bool:
        return self.origin == "store"

    def open(self) -> GGUFFile:
        """The GGUF file; close it after use."""
        return open_gguf(self.path)


def resolve_base(
    name: str,
    *,
    models_folder: Path | None = None,
    find_remote: FindRemote | None = None,
    merges_adapters: bool = True,
) -> BaseSource:
    """Find the base model called `name`.

    Args:
        name: Ollama name, path of a .gguf file, or `embedded:…`.
        models_folder: the Ollama store to look in; None takes the default places.
        find_remote: called when no local store has the model; None raises InputError instead.
        merges_adapters: see `from_stored`.

    Raises:
        UsageError: no valid name. InputError: not there, or not usable. ServiceError: from `find_remote`.
    """
    if name.startswith(EMBEDDED_PREFIX):
        embedded = find_embedded(name)
        return BaseSource(name, fetch_embedded(name), embedded.sha256, "embedded")
    if _looks_like_path(name):
        return _from_file(expanded(name))
    resolution = load_catalog().resolve(name)
    if resolution.notice:
        get_logger("modeling").info("%s", resolution.notice)
    model_name = ModelName.parse(resolution.name)
    roots = [models_folder] if models_folder is not None else store_roots()
    stored = find_local(model_name, roots)
    if stored is None:
        if find_remote is None:
            raise not_found(model_name, roots, resolution.suggestion)
        stored = find_remote(model_name)
    return from_stored(stored, merges_adapters=merges_adapters)


def not_found(model_name: ModelName, roots: list[Path], suggestion: str | None) -> InputError:
    """The error for a model that no local store has."""
    looked = ", ".join(str(root) for root in roots)
    meant = f" Did you mean `{suggestion}`?" if suggestion else ""
    return InputError(
        f"The base model {model_name.short} is not in a local Ollama store (looked in {looked}).{meant}",
        hint=(
            f"Run `ollama pull {model_name.short}`, pass --model with a .gguf file, or use the embedded "
            f"default: --model {DEFAULT_EMBEDDED}."
        ),
    )


def _looks_like_path(name: str) -> bool:
    """A path of this system or of Windows: no model name has a backslash, or begins with a drive and a root."""
    if name.lower().endswith(".gguf") or name.startswith(("/", "./", "../", "~")):
        return True
    return "\\" in name or PureWindowsPath(name).is_absolute()


def _from_file(path: Path) -> BaseSource:
    if not path.is_file():
        kind = "a folder, not a .gguf file" if path.is_dir() else "no file"
        raise InputError(
            f"--model {path}: there is {kind}.",
            hint=f"Pass the path of a .gguf file, an Ollama name, or {DEFAULT_EMBEDDED}.",
        )
    with open_gguf(path) as file:  # damaged files are named before anything is hashed
        parts = file.paths
    try:
        digest = digest_of_parts([sha256_file(part) for part in parts])
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}.") from error
    return BaseSource(str(path), path, digest, "file")


def from_stored(stored: StoredModel, *, merges_adapters: bool = True) -> BaseSource:
    """A model of an Ollama store as a base. Raises InputError where its weights cannot be used.

    Adapters that it carries are merged into its weights; without `merges_adapters` `path` is the weights alone, to
    look at, not to train on.
    """
    stored.require_gguf()
    name = stored.name.short
    digest_of = {layer.path: layer.digest.removeprefix("sha256:") for layer in stored.layers}
    parts = in_order(stored.gguf_paths, name)
    digest = digest_of_parts([digest_of[part] for part in parts])
    path = parts[0] if len(parts) == 1 else linked_parts(parts, digest)
    adapters = stored.adapter_paths if merges_adapters else ()
    if adapters:
        digests = [digest, *(digest_of[adapter] for adapter in adapters)]
        path, digest = merged_base(path, adapters, digests, name)
    return BaseSource(
        name=name,
        path=path,
        digest=digest,
        origin="store",
        template=stored.template,
        system=stored.system,
        parameters=stored.params,
        messages=stored.messages,
        licences=stored.licenses,
        renderer=stored.renderer,
        parser=stored.parser,
        requires=stored.requires,
        num_merged=len(adapters),
        has_projector=bool(stored.projector_paths),
    )


def check_family(source: BaseSource, expected: str | None, found: str) -> None:
    """Raise UsageError when the configuration expects another family than the file has."""
    if expected and expected != found:
        raise UsageError(
            f"model.model_family is `{expected}`, but {source.name} is a `{found}` model.",
            hint="Correct model_family, or leave it out.",
        )
