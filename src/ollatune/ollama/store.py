"""Ollama's models on disk, read only: name → manifest → blobs.

    <root>/manifests/<host>/<namespace>/<model>/<tag>     JSON: a config and layers, each a digest with a media type
    <root>/blobs/sha256-<64 hex>                          the layers' content

Nothing here writes to the store, and no path is opened that does not resolve to inside it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, OllatuneError, StorageError
from ollatune.base.folders import expanded, home_folder
from ollatune.base.log import get_logger
from ollatune.base.text import printable
from ollatune.ollama.blobs import (
    damaged,
    read_object,
    read_objects,
    read_small,
    read_text,
    readable,
)
from ollatune.ollama.names import ModelName, digest_hex
from ollatune.ollama.stored import Layer, StoredModel

MEDIA_TYPE_PREFIX = "application/vnd.ollama.image."
"""Layers' media types are this and one of: model, adapter, projector, draft, template, system, params, messages, …"""

_MAX_JSON_BYTES = (
    16 << 20
)  # manifests and text layers; the largest known licence is well under 1 MiB
_TEXT_KINDS = {"template": "template", "prompt": "template", "system": "system"}


def store_roots(
    environment: Mapping[str, str] | None = None,
    *,
    platform: str = sys.platform,
    home: Path | None = None,
) -> list[Path]:
    """Where Ollama may keep its models on this system, the likeliest first; they need not exist.

    OLLAMA_MODELS, then `~/.ollama/models` (every system), then the folder of the Linux service, then Docker's.
    """
    environment = os.environ if environment is None else environment
    roots: list[Path] = []
    if configured := environment.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        roots.append(expanded(configured))
    roots.append((home or home_folder()) / ".ollama" / "models")
    if platform.startswith("linux"):
        roots.append(Path("/usr/share/ollama/.ollama/models"))
        roots.append(Path("/root/.ollama/models"))
    return list(dict.fromkeys(roots))


class LocalStore:
    """One folder of Ollama models."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def exists(self) -> bool:
        """Whether there is a store here. Raises StorageError where that cannot be told for lack of permission."""
        with readable(self.root):
            try:
                return (self.root / "manifests").is_dir()
            except PermissionError:
                raise
            except OSError:
                return False

    def find(self, name: str | ModelName) -> StoredModel | None:
        """The model called `name`, upper and lower case being equal as in Ollama; None where there is none.

        Raises InputError for a damaged manifest or layer, StorageError where the store may not be read.
        """
        wanted = name if isinstance(name, ModelName) else ModelName.parse(name)
        path = self._find_manifest(wanted)
        return None if path is None else self._load(path)

    def names(self) -> list[ModelName]:
        """Every name in the store, sorted as `ollama list` would show it."""
        return sorted((name for name, _ in self._manifests()), key=lambda name: name.short)

    def list(self) -> list[StoredModel]:
        """Every model that can be read, sorted by name; a damaged one is left out with a warning."""
        models = []
        for name, path in self._manifests():
            try:
                models.append(self._load(path))
            except InputError as error:
                get_logger("ollama").warning("%s is left out: %s", name.short, error)
        return sorted(models, key=lambda model: model.name.short)

    def blob_path(self, digest: str) -> Path:
        """Where the blob lies. Raises InputError for what is no digest, or if the path leaves the store."""
        path = self.root / "blobs" / f"sha256-{digest_hex(digest)}"
        blobs = (self.root / "blobs").resolve()
        if path.resolve().parent != blobs:
            raise InputError(
                f"{path} leads out of the store, to {path.resolve()}.",
                hint="A blob has to be a file in `blobs`; the folder `blobs` itself may lie elsewhere.",
            )
        return path

    def _find_manifest(self, wanted: ModelName) -> Path | None:
        if not self.exists():
            return None
        candidates = [self.root / "manifests"]
        for part in wanted.parts:
            candidates = [found for folder in candidates for found in _children(folder, part)]
        return next((path for path in candidates if path.is_file()), None)

    def _manifests(self) -> Iterator[tuple[ModelName, Path]]:
        if not self.exists():
            return
        with readable(self.root):
            for path in sorted((self.root / "manifests").glob("*/*/*/*")):
                try:
                    if path.is_file() and not path.name.startswith("."):
                        yield _name_of(path), path
                except OllatuneError:
                    continue  # not a model: Ollama skips such files too

    def _load(self, path: Path) -> StoredModel:
        if not path.resolve().is_relative_to((self.root / "manifests").resolve()):
            raise InputError(f"{path} leads out of the store, to {path.resolve()}.")
        content = read_small(path)
        manifest = read_object(path, content)
        raw_layers = manifest.get("layers") or []
        if not isinstance(raw_layers, list):
            raise damaged(path, "`layers` is not a list")
        layers = tuple(self._layer(raw, path) for raw in raw_layers)
        config: dict[str, Any] = {}
        if manifest.get("config"):
            config_layer = self._layer(manifest["config"], path)
            config = read_object(config_layer.path)
        return StoredModel(
            name=_name_of(path),
            root=self.root,
            manifest_path=path,
            manifest_digest=hashlib.sha256(content).hexdigest(),
            layers=layers,
            config=config,
            **_text_layers(layers),
        )

    def _layer(self, raw: Any, manifest_path: Path) -> Layer:
        if not isinstance(raw, dict) or not isinstance(raw.get("digest"), str):
            raise damaged(manifest_path, f"a layer without a digest: {printable(str(raw))}")
        size = raw.get("size", 0)
        return Layer(
            kind=str(raw.get("mediaType", "")).removeprefix(MEDIA_TYPE_PREFIX),
            digest=f"sha256:{digest_hex(raw['digest'])}",
            size_bytes=size if isinstance(size, int) else 0,
            path=self.blob_path(raw["digest"]),
            name=str(raw.get("name", "")),
        )


def find_local(name: str | ModelName, roots: list[Path] | None = None) -> StoredModel | None:
    """The model in the first local store that has it; None where none has.

    A store that may not be read is passed over, with a note, if another one has the model; else its StorageError
    is raised, since the model may well be there.
    """
    refused: StorageError | None = None
    for root in store_roots() if roots is None else roots:
        try:
            if found := LocalStore(root).find(name):
                return found
        except StorageError as error:
            get_logger("ollama").debug("%s", error)
            refused = refused or error
    if refused:
        raise refused
    return None


def _children(folder: Path, part: str) -> list[Path]:
    """Entries of `folder` that are called `part` without regard to case, the exact one first."""
    with readable(folder):
        if not folder.is_dir():
            return []
        same = [entry for entry in folder.iterdir() if entry.name.lower() == part.lower()]
    return sorted(same, key=lambda entry: (entry.name != part, entry.name))


def _name_of(manifest_path: Path) -> ModelName:
    host, namespace, model, tag = manifest_path.parts[-4:]
    return ModelName.parse(f"{host}/{namespace}/{model}:{tag}")


def _text_layers(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The contents of the small layers, as fields of StoredModel."""
    fields: dict[str, Any] = {"licenses": ()}
    for layer in layers:
        if layer.kind in _TEXT_KINDS:
            fields[_TEXT_KINDS[layer.kind]] = read_text(layer.path)
        elif layer.kind == "license":
            fields["licenses"] += (read_text(layer.path),)
        elif layer.kind == "params":
            fields["params"] = read_object(layer.path)
        elif layer.kind == "messages":
            fields["messages"] = read_objects(layer.path)
    return fields
