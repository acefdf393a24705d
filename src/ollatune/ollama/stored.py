"""A model of the local store: its layers, what the small ones say, and whether its weights can be trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.files import sha256_file
from ollatune.ollama.blobs import readable
from ollatune.ollama.names import ModelName, digest_hex


@dataclass(frozen=True)
class Layer:
    """One blob of a model. `kind` is the media type without its prefix; `path` need not exist."""

    kind: str
    digest: str
    size_bytes: int
    path: Path
    name: str = ""


@dataclass(frozen=True)
class StoredModel:
    """A model in the local store. Absent layers are None or empty; `config` is the config blob as it stands."""

    name: ModelName
    root: Path
    manifest_path: Path
    manifest_digest: str
    layers: tuple[Layer, ...]
    config: dict[str, Any]
    template: str | None = None
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, Any], ...] = ()
    licenses: tuple[str, ...] = ()

    def paths(self, kind: str) -> tuple[Path, ...]:
        """Blob paths of the layers of one kind, in the manifest's order."""
        return tuple(layer.path for layer in self.layers if layer.kind == kind)

    @property
    def gguf_paths(self) -> tuple[Path, ...]:
        """The model's GGUF; more than one where it is split."""
        return self.paths("model")

    @property
    def adapter_paths(self) -> tuple[Path, ...]:
        """GGUF LoRA adapters that the server applies on top of the weights."""
        return self.paths("adapter")

    @property
    def projector_paths(self) -> tuple[Path, ...]:
        """Vision projectors."""
        return self.paths("projector")

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def renderer(self) -> str:
        """Name of the prompt renderer built into the server ("" = none): it beats the template."""
        return str(self.config.get("renderer") or "")

    @property
    def parser(self) -> str:
        return str(self.config.get("parser") or "")

    @property
    def requires(self) -> str:
        """The lowest server version that the model asks for, or ""."""
        return str(self.config.get("requires") or "")

    @property
    def capabilities(self) -> tuple[str, ...]:
        return tuple(self.config.get("capabilities") or ())

    @property
    def is_remote(self) -> bool:
        """Whether it runs on somebody else's server: there are no weights here."""
        return bool(self.config.get("remote_host") or self.config.get("remote_model"))

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are MLX safetensors rather than a GGUF."""
        return self.config.get("model_format") == "safetensors" or bool(self.paths("tensor"))

    def require_gguf(self) -> Path:
        """Path of the (first) GGUF that holds the weights; the blobs of all weights and adapters are there.

        Raises InputError where they are not here, or not a GGUF.
        """
        short = self.name.short
        if self.is_remote:
            where = self.config.get("remote_host") or "another server"
            raise InputError(
                f"{short} runs on {where}; its weights are not on this machine.",
                hint="Choose a model without `cloud` in its tag.",
            )
        if not self.gguf_paths:
            what = "MLX safetensors" if self.is_safetensors else "no weights"
            raise InputError(
                f"{short} holds {what}, a GGUF was expected ({self.manifest_path}).",
                hint="Pull a tag with a GGUF, such as one ending in q4_K_M, or pass a .gguf file.",
            )
        for layer in self.layers:
            if layer.kind in ("model", "adapter", "projector"):
                _require_blob(self, layer)
        return self.gguf_paths[0]

    def verify(self) -> None:
        """Read every blob and compare its SHA-256 with its name. Raises InputError naming the first that differs."""
        for layer in self.layers:
            _require_blob(self, layer)
            with readable(layer.path):
                found = sha256_file(layer.path)
            if found != digest_hex(layer.digest):
                raise InputError(
                    f"{layer.path} is damaged: its sha256 is {found}.",
                    hint=f"Run `ollama rm {self.name.short}` and `ollama pull {self.name.short}`.",
                )


def _require_blob(model: StoredModel, layer: Layer) -> None:
    with readable(layer.path):
        if not layer.path.is_file():
            raise InputError(
                f"{model.name.short} needs the blob {layer.path}, which is not there.",
                hint=f"The pull was interrupted or the file was removed: run `ollama pull {model.name.short}`.",
            )
        found = layer.path.stat().st_size
    if layer.size_bytes and found != layer.size_bytes:
        raise InputError(
            f"{layer.path} has {found} bytes, {layer.size_bytes} were expected.",
            hint=f"Run `ollama rm {model.name.short}` and `ollama pull {model.name.short}`.",
        )
