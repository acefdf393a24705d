"""`/api/create` as the versions do it: which events, which layers, which errors with which status."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from ollatune.base.errors import GGUFError, InputError
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.writer import TensorToWrite, write_gguf
from ollatune.ollama.names import ModelName
from ollatune.templates.ollama_render import OllamaTemplate
from tests.fake_ollama.go_text import FILE_TYPES, go_json, go_map_json, human_number
from tests.fake_ollama.store import MEDIA, FakeStore, Model

Event = dict[str, Any]
Layer = dict[str, Any]

QUANTIZE_TYPES = ("F32", "F16", "Q4_K_S", "Q4_K_M", "Q8_0")
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
LONGEST_CHATML = 600
CHATML_STOPS = ["<|im_start|>", "<|im_end|>"]


class ApiError(Exception):
    """An error with its HTTP status; in a stream that has begun it becomes an event."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Creation:
    """One request. `numbers` is the server's version."""

    def __init__(
        self, store: FakeStore, numbers: tuple[int, ...], request: Mapping[str, Any]
    ) -> None:
        self.store = store
        self.numbers = numbers
        self.request = request
        name = str(request.get("model") or request.get("name") or "")
        if not ModelName.is_valid(name):
            raise ApiError(400, "invalid model name")
        self.name = ModelName.parse(name)
        for path in (*request.get("files", {}), *request.get("adapters", {})):
            if not _is_valid_path(path):
                raise ApiError(400, "file path must be relative")

    def run(self) -> Iterator[Event]:
        """The events up to `success`. Raises ApiError; nothing is written before the last two events."""
        request = self.request
        self._refuse_what_is_gone()
        layers: list[tuple[Layer, str]]
        if request.get("from"):
            base = self.store.read(ModelName.parse(request["from"]))
            if base is None:
                yield {"status": "pulling manifest"}
                raise ApiError(500, "pull model manifest: file does not exist")
            layers = [(layer, _using(layer)) for layer in base.layers]
            layers = [(self._inherited(layer, base), status) for layer, status in layers]
            config = dict(base.config)
        elif request.get("files"):
            layers = yield from self._from_files(request["files"], is_adapter=False)
            config = self._config_of(layers[0][0])
        else:
            raise ApiError(400, "neither 'from' or 'files' was specified")
        if request.get("quantize"):
            self._quantize(config)
        if request.get("adapters"):
            layers += yield from self._from_files(request["adapters"], is_adapter=True)
        self._set_texts(layers)
        for key in ("renderer", "parser", "requires"):
            if request.get(key):
                config[key] = request[key]
        for _, status in layers:
            yield {"status": status}
        yield {"status": "writing manifest"}
        self.store.write(self.name, [layer for layer, _ in layers], self._finished(config, layers))
        yield {"status": "success"}

    def _refuse_what_is_gone(self) -> None:
        if self.numbers < (0, 34, 1):
            return
        if (self.request.get("parameters") or {}).get("typical_p") is not None:
            raise ApiError(
                400,
                "typical_p is deprecated and cannot be set as a model parameter; pass it as a request option instead",
            )
        if self.request.get("adapters"):
            raise ApiError(400, "LoRA adapters are no longer supported")
        if self.request.get("quantize"):
            raise ApiError(
                400,
                "create-time quantization is only supported for safetensors imports;"
                " quantize GGUF models with llama.cpp tools before importing",
            )

    def _from_files(
        self, files: Mapping[str, str], *, is_adapter: bool
    ) -> Iterator[Event]:  # returns the layers
        if is_adapter and len(files) > 1:
            raise ApiError(400, "only one adapter is currently supported")
        if any(name.endswith(".safetensors") for name in files):
            raise ApiError(501, "the test server does not convert safetensors")
        layers: list[tuple[Layer, str]] = []
        for name, digest in files.items():
            path = self.store.blob_path(digest)
            if not name.endswith(".gguf") and not (
                path.exists() and path.read_bytes()[:4] == b"GGUF"
            ):
                raise ApiError(400, "unknown type")
        for digest in files.values():
            yield {"status": "parsing GGUF"}
            layers.append(self._gguf_layer(digest))
            if self.numbers >= (0, 30, 0):
                yield {"status": "verifying conversion"}
        if not is_adapter:  # also where a template is given: its stops stay then, if no others are
            layers += self._autodetected(layers[0][0])
        return layers

    def _gguf_layer(self, digest: str) -> tuple[Layer, str]:
        path = self.store.blob_path(digest)
        if not path.exists():
            raise ApiError(500, f"open {path}: no such file or directory")
        if path.read_bytes()[:4] != b"GGUF":
            raise ApiError(500, "supplied file was not in GGUF format")
        try:
            with GGUFFile.open(path) as gguf:
                kind = "adapter" if gguf.metadata.get("general.type") == "adapter" else "model"
        except GGUFError as error:
            raise ApiError(500, "unexpected EOF") from error
        if kind == "adapter" and self.numbers >= (0, 34, 1):
            raise ApiError(400, "LoRA adapters are no longer supported")
        layer = {"mediaType": MEDIA + kind, "digest": digest, "size": path.stat().st_size}
        if self.numbers < (0, 30, 0):
            return {**layer, "from": str(path)}, _using(layer)
        if kind == "model":
            layer["digest"] = self._rewritten(digest)
            layer["size"] = self.store.blob_path(layer["digest"]).stat().st_size
        return layer, _using(layer)

    def _rewritten(self, digest: str) -> str:
        """The blob as llama.cpp's quantiser copies it: same metadata, tensors sorted by block and name."""
        path = self.store.blob_path(digest)
        staging = path.with_name(f"rewritten-{path.name}")
        with GGUFFile.open(path) as gguf:
            tensors = [
                TensorToWrite(
                    info.name, info.shape, info.type, lambda n=info.name: [gguf.tensor_data(n)]
                )
                for info in sorted(gguf.tensors.values(), key=lambda info: _block_order(info.name))
            ]
            records = [gguf.metadata_record(key) for key in gguf.metadata]
            result = f"sha256:{write_gguf(staging, records, tensors, alignment=gguf.alignment)}"
        staging.replace(self.store.blob_path(result))
        return result

    def _autodetected(self, layer: Layer) -> list[tuple[Layer, str]]:
        """Ollama looks among some twenty known Jinja templates for one that is less than 100 edits away; this server
        knows ChatML, and takes what is short for near enough."""
        with GGUFFile.open(self.store.blob_path(layer["digest"])) as gguf:
            jinja = str(gguf.metadata.get("tokenizer.chat_template", ""))
        if "<|im_start|>" not in jinja or len(jinja) > LONGEST_CHATML:
            return []
        template, _ = self.store.layer("template", CHATML.encode())
        stops, is_new = self.store.layer("params", go_map_json({"stop": CHATML_STOPS}).encode())
        return [(template, "using autodetected template chatml"), (stops, _status(stops, is_new))]

    def _config_of(self, layer: Layer) -> dict[str, Any]:
        with GGUFFile.open(self.store.blob_path(layer["digest"])) as gguf:
            count = sum(_num_weights(info.shape) for info in gguf.tensors.values())
            return {
                "model_format": "gguf",
                "model_family": gguf.architecture,
                "model_families": [gguf.architecture],
                "model_type": human_number(count),
                "file_type": FILE_TYPES.get(
                    int(gguf.metadata.get("general.file_type", -1)), "unknown"
                ),  # type: ignore[arg-type]
            }

    def _quantize(self, config: dict[str, Any]) -> None:
        wanted = str(self.request["quantize"]).upper()
        if wanted not in QUANTIZE_TYPES:
            raise ApiError(
                500,
                f"unsupported quantization type {wanted} - supported types are {', '.join(QUANTIZE_TYPES)}",
            )
        if config.get("file_type") not in ("F16", "BF16", "F32"):
            raise ApiError(500, "quantization is only supported for F16, BF16 and F32 models")
        raise ApiError(501, "the test server does not quantise")

    def _set_texts(self, layers: list[tuple[Layer, str]]) -> None:
        request = self.request
        if request.get("template"):
            try:
                OllamaTemplate(request["template"])
            except InputError as error:
                raise ApiError(400, str(error)) from error
            self._replace(layers, "template", request["template"])
        if request.get("system"):
            self._replace(layers, "system", request["system"])
        licenses = request.get("license") or []
        for text in [licenses] if isinstance(licenses, str) else licenses:
            layers.append(self._new("license", text))
        if request.get("parameters"):
            params: dict[str, Any] = {}
            for layer, _ in layers:
                if layer["mediaType"] == MEDIA + "params":
                    params = json.loads(self.store.text(layer))
            self._replace(layers, "params", go_map_json({**params, **request["parameters"]}))
        if request.get("messages"):
            self._replace(layers, "messages", go_json(request["messages"]) + "\n")

    def _replace(self, layers: list[tuple[Layer, str]], kind: str, text: str) -> None:
        layers[:] = [item for item in layers if item[0]["mediaType"] != MEDIA + kind]
        layers.append(self._new(kind, text))

    def _new(self, kind: str, text: str) -> tuple[Layer, str]:
        layer, is_new = self.store.layer(kind, text.encode())
        return layer, _status(layer, is_new)

    def _inherited(self, layer: Layer, base: Model) -> Layer:
        return (
            {**layer, "from": base.name.short} if layer["mediaType"] == MEDIA + "model" else layer
        )

    def _finished(self, config: dict[str, Any], layers: list[tuple[Layer, str]]) -> dict[str, Any]:
        config = {
            key: value
            for key, value in config.items()
            if key not in ("architecture", "os", "rootfs")
        }
        config.update(architecture="amd64", os="linux")
        if self.numbers < (0, 30, 0):
            config["rootfs"] = {
                "type": "layers",
                "diff_ids": [layer["digest"] for layer, _ in layers],
            }
        return config


def _is_valid_path(path: str) -> bool:
    """fs.ValidPath."""
    parts = path.split("/")
    return bool(path) and not PurePosixPath(path).is_absolute() and not {"", ".", ".."} & set(parts)


def _block_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _num_weights(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _status(layer: Layer, is_new: bool) -> str:
    return f"creating new layer {layer['digest']}" if is_new else _using(layer)


def _using(layer: Layer) -> str:
    return f"using existing layer {layer['digest']}"
