"""The fake server's store: written as Ollama lays it out, with Ollama's digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.ollama.names import ModelName
from tests.fake_ollama.go_text import go_json

MEDIA = "application/vnd.ollama.image."


@dataclass
class Model:
    """A manifest, read. `layers` hold mediaType, digest, size and sometimes `from`."""

    name: ModelName
    layers: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    modified: float = 0.0

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [layer for layer in self.layers if layer["mediaType"] == MEDIA + kind]


class FakeStore:
    """Blobs by digest and manifests by name below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("blobs", "manifests"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    def blob_path(self, digest: str) -> Path:
        assert re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest), digest
        return self.root / "blobs" / digest.replace(":", "-")

    def add_blob(self, content: bytes) -> tuple[str, bool]:
        """Digest, and whether it is new."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        path = self.blob_path(digest)
        if path.exists():
            return digest, False
        path.write_bytes(content)
        return digest, True

    def add_file(self, path: Path) -> str:
        """Hard-link a file into the store as a blob."""
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        target = self.blob_path(digest)
        if not target.exists():
            try:
                target.hardlink_to(path)
            except OSError:
                target.write_bytes(path.read_bytes())
        return digest

    def layer(self, kind: str, content: bytes) -> tuple[dict[str, Any], bool]:
        digest, is_new = self.add_blob(content)
        return {"mediaType": MEDIA + kind, "digest": digest, "size": len(content)}, is_new

    def text(self, layer: dict[str, Any]) -> str:
        return self.blob_path(layer["digest"]).read_bytes().decode()

    def manifest_path(self, name: ModelName) -> Path:
        return self.root.joinpath("manifests", *name.parts)

    def existing(self, name: ModelName) -> ModelName:
        """`name` with the case of what is there (getExistingName)."""
        for path in self._manifest_paths():
            stored = ModelName(*path.parts[-4:])
            if stored.matches(name):
                return stored
        return name

    def read(self, name: ModelName) -> Model | None:
        path = self.manifest_path(self.existing(name))
        if not path.is_file():
            return None
        content = path.read_bytes()
        manifest = json.loads(content)
        return Model(
            name=ModelName(*path.parts[-4:]),
            layers=manifest["layers"],
            config=json.loads(self.blob_path(manifest["config"]["digest"]).read_bytes()),
            digest=hashlib.sha256(content).hexdigest(),
            modified=path.stat().st_mtime,
        )

    def write(self, name: ModelName, layers: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Config blob first, the manifest last: a name never stands for something half there."""
        content = (go_json(config) + "\n").encode()
        digest, _ = self.add_blob(content)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": digest,
                "size": len(content),
            },
            "layers": layers,
        }
        path = self.manifest_path(self.existing(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.tmp")
        staging.write_text(go_json(manifest) + "\n")
        staging.replace(path)

    def copy(self, source: Model, destination: ModelName) -> None:
        path = self.manifest_path(self.existing(destination))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.manifest_path(source.name).read_bytes())

    def delete(self, model: Model) -> None:
        """The manifest, and the blobs that no other model uses."""
        path = self.manifest_path(model.name)
        manifest = json.loads(path.read_bytes())
        path.unlink()
        mine = {layer["digest"] for layer in [*manifest["layers"], manifest["config"]]}
        for other in self._manifest_paths():
            content = json.loads(other.read_bytes())
            mine -= {layer["digest"] for layer in [*content["layers"], content["config"]]}
        for digest in mine:
            self.blob_path(digest).unlink(missing_ok=True)

    def models(self) -> list[Model]:
        """Newest first."""
        found = [self.read(ModelName(*path.parts[-4:])) for path in self._manifest_paths()]
        return sorted((m for m in found if m), key=lambda model: -model.modified)

    def _manifest_paths(self) -> Iterator[Path]:
        for path in sorted((self.root / "manifests").glob("*/*/*/*")):
            if path.is_file() and not path.name.startswith("."):
                yield path
