"""What is in a GGUF file, as a dictionary for people and programs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ollatune.base.text import printable
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType

FILE_TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
"""`general.file_type`: enum llama_ftype of llama.h."""

_NOT_MODELS = {
    "adapter": "this is an adapter, not a model: train the base model it belongs to",
    "mmproj": "this is the vision part of a model: train the language model it belongs to",
    "imatrix": "this is an importance matrix, not a model",
    "vocab": "this file holds a vocabulary and no weights",
}


def describe(
    file: GGUFFile,
    *,
    known_architectures: Collection[str],
    decodable_types: Collection[GGMLType],
) -> dict[str, Any]:
    """Architecture, sizes, types by share, tokenizer, template, and whether the model can be trained here.

    `known_architectures` and `decodable_types` are what the caller can train. Texts are safe for a terminal.
    """
    metadata = file.metadata
    architecture = file.architecture
    num_weights = sum(info.num_weights for info in file.tensors.values())
    tensor_bytes = sum(info.size_bytes for info in file.tensors.values())
    why_not = why_not_trainable(file, known_architectures, decodable_types)
    return {
        "path": str(file.path),
        "num_parts": len(file.paths),
        "gguf_version": file.version,
        "name": _text(metadata.get("general.name")),
        "architecture": printable(architecture),
        "type": _text(metadata.get("general.type")) or "model",
        "license": _text(metadata.get("general.license")),
        "size_bytes": file.size_bytes,
        "num_weights": num_weights,
        "bits_per_weight": 8 * tensor_bytes / num_weights if num_weights else None,
        "file_type": file_type_name(metadata.get("general.file_type")),
        "types": _types_by_share(file),
        "context_length": _number(metadata.get(f"{architecture}.context_length")),
        "num_layers": _number(metadata.get(f"{architecture}.block_count")),
        "hidden_size": _number(metadata.get(f"{architecture}.embedding_length")),
        "num_heads": _number(metadata.get(f"{architecture}.attention.head_count")),
        "num_kv_heads": _number(metadata.get(f"{architecture}.attention.head_count_kv")),
        "tokenizer": _tokenizer(file),
        "has_chat_template": "tokenizer.chat_template" in metadata,
        "trainable": not why_not,
        "why_not": why_not,
    }


def why_not_trainable(
    file: GGUFFile, known_architectures: Collection[str], decodable_types: Collection[GGMLType]
) -> str:
    """The first reason why `file` cannot be trained, '' where it can."""
    kind = file.metadata.get("general.type", "model")
    if isinstance(kind, str) and kind in _NOT_MODELS:
        return _NOT_MODELS[kind]
    if not file.tensors:
        return _NOT_MODELS["vocab"]
    if file.architecture not in known_architectures:
        known = ", ".join(sorted(known_architectures))
        named = (
            f"the architecture `{printable(file.architecture)}`"
            if file.architecture
            else "no architecture"
        )
        return f"the file states {named}; architectures that can be trained: {known}"
    unknown = {info.type.name for info in file.tensors.values() if info.type not in decodable_types}
    if unknown:
        return f"tensors stored as {', '.join(sorted(unknown))} cannot be decoded"
    if "tokenizer.ggml.tokens" not in file.metadata:
        return "the file holds no tokenizer"
    return ""


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def _number(value: object) -> int | list[Any] | None:
    """A whole number, or one for each layer; None for anything else."""
    is_number = isinstance(value, int) or (
        isinstance(value, list) and all(isinstance(element, int) for element in value)
    )
    return value if is_number else None  # type: ignore[return-value]


def file_type_name(number: object) -> str | None:
    if not isinstance(number, int):
        return None
    return FILE_TYPES.get(number, f"unknown ({number})")


def _types_by_share(file: GGUFFile) -> list[dict[str, Any]]:
    """Storage types, the one with the most bytes first."""
    total_bytes = sum(info.size_bytes for info in file.tensors.values())
    rows: dict[GGMLType, dict[str, Any]] = {}
    for info in file.tensors.values():
        empty = {"type": info.type.name, "num_tensors": 0, "num_weights": 0, "size_bytes": 0}
        row = rows.setdefault(info.type, empty)
        row["num_tensors"] += 1
        row["num_weights"] += info.num_weights
        row["size_bytes"] += info.size_bytes
    for row in rows.values():
        row["share"] = row["size_bytes"] / total_bytes
    return sorted(rows.values(), key=lambda row: -row["size_bytes"])


def _tokenizer(file: GGUFFile) -> dict[str, Any] | None:
    metadata = file.metadata
    if "tokenizer.ggml.model" not in metadata:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _text(metadata["tokenizer.ggml.model"]),
        "pre": _text(metadata.get("tokenizer.ggml.pre")),
        "vocab_size": len(tokens) if isinstance(tokens, list) else None,
        "add_bos": metadata.get("tokenizer.ggml.add_bos_token"),
        "add_eos": metadata.get("tokenizer.ggml.add_eos_token"),
    }
