"""`ollatune models`: what is in the local store and the catalog, what a file holds; pulling, copying, deleting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollatune.base.errors import OllatuneError, UsageError
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes, format_count, printable
from ollatune.catalog import Entry, load_catalog
from ollatune.config.schema import Config, ModelConfig, OllamaConfig


def list_models(models_folder: Path | None = None, host: str | None = None) -> dict[str, Any]:
    """Models in the local stores, and the catalog with what each needs.

    The server is asked, too, where `host` names it, or where no store can be read here: in Docker, or elsewhere.
    """
    from ollatune.modeling.embedded import EMBEDDED_MODELS, EMBEDDED_PREFIX
    from ollatune.ollama.store import LocalStore, store_roots

    roots = [models_folder] if models_folder is not None else store_roots()
    local: list[dict[str, Any]] = []
    for root in roots:
        try:
            stored = LocalStore(root).list() if root.is_dir() else []
        except OllatuneError as error:
            get_logger("models").warning("%s", error)
            continue
        local += [
            {"name": model.name.short, "size_bytes": model.size_bytes, "store": str(root)}
            for model in stored
        ]
    served = _served_models(host, is_wanted=host is not None or not local)
    embedded = [
        {
            "name": f"{EMBEDDED_PREFIX}{name}",
            "size_bytes": model.size_bytes,
            "licence": model.licence,
        }
        for name, model in EMBEDDED_MODELS.items()
    ]
    catalog = [_catalog_row(entry) for entry in load_catalog().entries()]
    return {"local": local, "embedded": embedded, "catalog": catalog} | served


def _served_models(host: str | None, *, is_wanted: bool) -> dict[str, Any]:
    """What the server has, under `server`; {} where it is not wanted, or is down and was not named."""
    if not is_wanted:
        return {}
    from ollatune.ollama.client import OllamaClient
    from ollatune.ollama.failures import ServerDown

    try:
        with OllamaClient(host) as client:
            models = [{"name": row.name, "size_bytes": row.size_bytes} for row in client.list()]
            return {"server": {"url": client.endpoint.url, "models": models}}
    except ServerDown:
        if host is not None:
            raise
        return {}


def _catalog_row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "parameters": entry.parameters,
        "architecture": entry.architecture,
        "context_tokens": entry.context_tokens,
        "licence": entry.licence,
        "download_bytes": entry.download_bytes,
        "is_trainable": entry.is_trainable,
        "memory_bytes": {
            method: entry.training_memory_bytes(method)
            for method in ("lora-packed", "lora-bf16", "full")
        },
        "use": entry.use,
    }


def list_text(result: dict[str, Any]) -> str:
    """The list for a terminal."""
    lines = ["In the local store:"]
    lines += [f"  {m['name']:<32} {format_bytes(m['size_bytes']):>10}" for m in result["local"]]
    if not result["local"]:
        lines.append("  (nothing; `ollama pull NAME` or `ollatune models pull NAME`)")
    if server := result.get("server"):
        lines.append(f"On the server at {server['url']}:")
        lines += [
            f"  {m['name']:<32} {format_bytes(m['size_bytes']):>10}" for m in server["models"]
        ]
    lines.append("Embedded:")
    lines += [f"  {m['name']:<32} {format_bytes(m['size_bytes']):>10}" for m in result["embedded"]]
    lines.append(
        "Catalog (memory to train: adapter on packed weights / on dense bf16 / all weights):"
    )
    for row in result["catalog"]:
        memory = " / ".join(format_bytes(size) for size in row["memory_bytes"].values())
        note = "" if row["is_trainable"] else "  (cannot be trained here)"
        lines.append(f"  {row['name']:<20} {format_count(row['parameters']):>7}  {memory}{note}")
    return "\n".join(lines)


def show_model(name: str, models_folder: Path | None = None) -> dict[str, Any]:
    """What is in a model's file: architecture, size, types, tokenizer, template, context, trainable or why not."""
    from ollatune.commands.remote import remote_finder
    from ollatune.gguf.codecs import DECODABLE
    from ollatune.gguf.inspect import describe
    from ollatune.modeling.architectures import ARCHITECTURES
    from ollatune.modeling.base import resolve_base

    config = Config(model=ModelConfig(), ollama=OllamaConfig(models=models_folder))
    source = resolve_base(
        name, models_folder=models_folder, find_remote=remote_finder(config), merges_adapters=False
    )
    with source.open() as gguf:
        described = describe(gguf, known_architectures=ARCHITECTURES, decodable_types=DECODABLE)
    described["model_name"] = described.pop("name", None)
    return {
        "name": source.name,
        "origin": source.origin,
        "digest": source.digest,
        "path": str(source.path),
        "has_ollama_template": source.template is not None,
        "system": source.system,
        "parameters": dict(source.parameters),
        **described,
    }


def show_text(result: dict[str, Any]) -> str:
    """The description for a terminal: a fact a line, and last whether it can be trained here."""
    rows = [
        ("model", _joined(result["name"], result["model_name"], result["license"])),
        ("file", f"{result['path']} ({format_bytes(result['size_bytes'])}, sha256 {result['digest'][:12]})"),
        ("architecture", _architecture(result)),
        ("weights", _weights(result)),
        *(("", _share(row)) for row in result["types"]),
        ("tokenizer", _tokenizer(result["tokenizer"])),
        ("template", _template(result)),
        ("system", result["system"] or ""),
        ("parameters", ", ".join(f"{key} {value}" for key, value in result["parameters"].items())),
        ("context", f"{result['context_length']} tokens" if result["context_length"] else "not stated"),
        ("trainable", "yes" if result["trainable"] else f"no: {result['why_not']}"),
    ]  # fmt: skip
    shown = [(label, text) for label, text in rows if text]
    lines = [f"{label:<13} {printable(text)}" for label, text in shown]
    if result["trainable"]:
        lines.append(f"\nNext: ollatune train --model {result['name']} --data YOUR_DATA")
    return "\n".join(lines)


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _architecture(result: dict[str, Any]) -> str:
    sizes = {
        "num_layers": "layers", "hidden_size": "wide", "num_heads": "heads",
        "num_kv_heads": "key/value heads",
    }  # fmt: skip
    known = [f"{result[key]} {word}" for key, word in sizes.items() if result[key] is not None]
    return _joined(result["architecture"] or "not stated", *known)


def _weights(result: dict[str, Any]) -> str:
    bits = result["bits_per_weight"]
    return _joined(
        format_count(result["num_weights"]),
        result["file_type"],
        None if bits is None else f"{bits:.2f} bits each",
        f"in {result['num_parts']} files" if result["num_parts"] > 1 else None,
    )


def _share(row: dict[str, Any]) -> str:
    tensors = "tensor" if row["num_tensors"] == 1 else "tensors"
    return (
        f"{row['type']:<6} {row['share']:>6.1%}  {row['num_tensors']} {tensors}, "
        f"{format_count(row['num_weights'])} weights, {format_bytes(row['size_bytes'])}"
    )


def _tokenizer(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    added = [name for key, name in (("add_bos", "BOS"), ("add_eos", "EOS")) if tokenizer[key]]
    return _joined(
        tokenizer["model"],
        tokenizer["pre"],
        f"{tokenizer['vocab_size']} tokens" if tokenizer["vocab_size"] else None,
        f"adds {' and '.join(added)}" if added else None,
    )


def _template(result: dict[str, Any]) -> str:
    if result["has_ollama_template"]:
        return "Ollama's TEMPLATE"
    return (
        "the file's own (Jinja)"
        if result["has_chat_template"]
        else "none: it cannot be asked in turns"
    )


def pull_model(name: str, host: str | None = None) -> dict[str, Any]:
    """Pull `name` through a running server, with progress bars."""
    from ollatune.commands.remote import PullBars
    from ollatune.ollama.client import OllamaClient
    from ollatune.ollama.names import ModelName

    resolution = load_catalog().resolve(name)
    if resolution.notice:
        get_logger("models").info("%s", resolution.notice)
    with PullBars() as bars, OllamaClient(host) as client:
        client.pull(ModelName.parse(resolution.name).short, progress=bars.update)
    return {"pulled": resolution.name}


def running_models(host: str | None = None) -> dict[str, Any]:
    """The models that the server has loaded now."""
    from ollatune.ollama.client import OllamaClient

    with OllamaClient(host) as client:
        return {"running": [vars(model) for model in client.ps()]}


def running_text(result: dict[str, Any]) -> str:
    """The running models for a terminal."""
    rows = [
        f"  {m['name']:<32} {format_bytes(m['size_bytes']):>10}  context {m['context_tokens'] or '?'}"
        for m in result["running"]
    ]
    return "\n".join(["Loaded now:", *rows]) if rows else "No model is loaded."


def copy_model(
    source: str, destination: str, host: str | None = None, *, force: bool = False
) -> dict[str, Any]:
    """Give a model on the server a second name. Raises UsageError where the name is taken and `force` is not set."""
    from ollatune.ollama.client import OllamaClient

    with OllamaClient(host) as client:
        if not force and client.has(destination):
            raise UsageError(
                f"The server has a model {destination} already.",
                hint="Choose another name, or replace it with --force.",
            )
        client.copy(source, destination)
    return {"copied": source, "to": destination}


def delete_model(name: str, host: str | None = None, *, yes: bool = False) -> dict[str, Any]:
    """Delete a model from the server, if `yes`. Raises UsageError, saying what would go, otherwise."""
    from ollatune.ollama.client import OllamaClient

    with OllamaClient(host) as client:
        details = client.show(name).details
        if not yes:
            what = " ".join(
                str(details[key])
                for key in ("parameter_size", "quantization_level")
                if key in details
            )
            raise UsageError(
                f"{name} ({what or 'of unknown size'}) would be deleted from {client.endpoint.url}; nothing was done.",
                hint="Say --yes to delete it.",
            )
        client.delete(name)
    return {"deleted": name}
