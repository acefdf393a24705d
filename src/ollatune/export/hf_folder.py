"""A merged model as Hugging Face's folder: safetensors, config.json, tokenizer, and the adapter in PEFT's format.

It is for Transformers and what builds on it. Ollama's own converter silently damages such folders (rotary parameters,
chat template), so this format is never sent to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import make_folder, write_json
from ollatune.base.log import get_logger
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.export.apply import REPORT_NAME
from ollatune.export.bundle import origin_facts
from ollatune.export.checkpoint_updates import has_lora, tensor_updates
from ollatune.export.hf_config import readable_by_older
from ollatune.export.plan import TensorUpdate
from ollatune.export.safetensors_file import LazyTensor, write_safetensors
from ollatune.export.weights import updated
from ollatune.gguf.decode import decode_tensor
from ollatune.gguf.hf_tokenizer import save_hf_tokenizer
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.architectures import Architecture, TensorRule, architecture_of
from ollatune.modeling.architectures.llama import ROPE_FACTORS
from ollatune.modeling.opened import OpenBase
from ollatune.modeling.peft_format import save_adapter
from ollatune.modeling.trained import lora_settings

HF_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DEFAULT_HF_DTYPE = "bf16"
CONFIG_NAME, INDEX_NAME = "config.json", "model.safetensors.index.json"
ADAPTER_FOLDER = "adapter"
"""Below the model: Transformers would put an adapter beside config.json on the merged weights once more."""

_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class HFFolder:
    """What was written."""

    folder: Path
    files: tuple[Path, ...]
    size_bytes: int
    notes: tuple[str, ...]


def hf_dtype(tensor_type: str) -> torch.dtype:
    """The dtype of a `--type` for this format. Raises UsageError for quantised ones."""
    found = HF_DTYPES.get(tensor_type.lower())
    if found is None:
        raise UsageError(
            f"--format hf cannot store weights as `{tensor_type}`.",
            hint=f"Choose one of {', '.join(HF_DTYPES)} with --type.",
        )
    return found


def write_hf_folder(
    base: OpenBase,
    checkpoint: Checkpoint,
    config: Config,
    folder: Path,
    *,
    dtype: torch.dtype,
    context: int,
    shard_bytes: int = _SHARD_BYTES,
) -> HFFolder:
    """Write the merged model. `config.json` comes last: without it nothing loads a folder that is not complete.

    Raises InputError where Transformers' configuration cannot say what llama.cpp computes, or a weight is too large
    for `dtype`; StorageError.
    """
    architecture = architecture_of(base.gguf.metadata, base.gguf.tensors)
    model_config = _model_config(architecture, base, context)
    updates = tensor_updates(architecture, checkpoint, config)
    tensors = _tensors(architecture, model_config, base.gguf, updates, dtype)
    notes = []
    make_folder(folder)
    for stale in (folder / CONFIG_NAME, folder / INDEX_NAME):
        stale.unlink(missing_ok=True)
    report = {
        "format": "hf",
        "dtype": str(dtype).removeprefix("torch."),
        **origin_facts(base, checkpoint),
        "tuned": sorted(update.name for update in updates),
    }
    write_json(folder / REPORT_NAME, report)
    files = _write_shards(folder, tensors, dtype, shard_bytes)
    notes += _write_tokenizer(base, folder)
    if has_lora(checkpoint):
        state, settings = checkpoint.model_state_dict, lora_settings(config)
        save_adapter(folder / ADAPTER_FOLDER, state, settings, base_name=base.source.name)
    write_json(folder / "generation_config.json", _generation_config(base))
    model_config.dtype = dtype
    write_json(folder / CONFIG_NAME, readable_by_older(model_config.to_dict()))
    size_bytes = sum(path.stat().st_size for path in files)
    write_json(folder / REPORT_NAME, {**report, "size_bytes": size_bytes, "notes": notes})
    for note in notes:
        get_logger("export").warning("%s", note)
    return HFFolder(folder, tuple(files), size_bytes, tuple(notes))


def _model_config(architecture: Architecture, base: OpenBase, context: int) -> Any:
    def read(name: str) -> Tensor:
        return decode_tensor(base.gguf, name)

    config: Any = architecture.config(read, serving_context=context)
    rope = config.rope_parameters
    if ROPE_FACTORS in base.gguf.tensors and rope.get("rope_type") == "default":
        raise InputError(
            f"{base.source.name} has rotary factors (`{ROPE_FACTORS}`) that no Transformers configuration names.",
            hint="Export to GGUF, which keeps them: --format gguf.",
        )
    return config


def _tensors(
    architecture: Architecture,
    model_config: Any,
    gguf: GGUFFile,
    updates: Sequence[TensorUpdate],
    dtype: torch.dtype,
) -> list[LazyTensor]:
    """Every parameter of the Transformers model, in its order and under the names that all releases read."""
    with torch.device("meta"):
        model = architecture.model_class()(model_config)
    by_hf_name: dict[str, list[TensorRule]] = {}
    for rule in architecture.present_rules():
        by_hf_name.setdefault(rule.hf_name, []).append(rule)
    by_gguf_name = {update.name: update for update in updates}
    tensors: list[LazyTensor] = []
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and model_config.tie_word_embeddings:
            continue
        rules = by_hf_name.get(name, [])
        if not rules:
            # A file may have the biases of query, key and value alone; Transformers has one switch for all of them.
            assert name.endswith(".bias"), f"no tensor of the file fills {name}"
        tensors += _Parameter(gguf, rules, by_gguf_name, dtype, parameter).published(name)
    return tensors


@dataclass(frozen=True)
class _Parameter:
    """One Transformers parameter, put together from its GGUF tensors when asked for."""

    gguf: GGUFFile
    rules: Sequence[TensorRule]
    updates: Mapping[str, TensorUpdate]
    dtype: torch.dtype
    empty: Tensor

    def published(self, name: str) -> list[LazyTensor]:
        """Under its own name; the experts of a stack one by one, as Mixtral was published."""
        shape = tuple(self.empty.shape)
        stem, _, kind = name.rpartition(".mlp.")
        if ".mlp.experts." not in name:
            if kind == "gate.weight":
                name = f"{stem}.block_sparse_moe.gate.weight"
            return [LazyTensor(name, shape, self.values)]
        num_experts, rows, columns = shape
        is_fused = name.endswith("gate_up_proj")
        found: list[LazyTensor] = []
        for expert in range(num_experts):
            prefix = f"{name.partition('.mlp.')[0]}.block_sparse_moe.experts.{expert}"
            parts = (("w1", 0), ("w3", 1)) if is_fused else (("w2", 0),)
            size = rows // len(parts)
            for part, index in parts:

                def make(
                    expert: int = expert, start: int = index * size, size: int = size
                ) -> Tensor:
                    return self.values()[expert, start : start + size]

                found.append(LazyTensor(f"{prefix}.{part}.weight", (size, columns), make))
        return found

    def values(self) -> Tensor:
        """The trained values in Transformers' order, float32."""
        if not self.rules:
            return torch.zeros(self.empty.shape)
        whole = torch.empty(self.empty.shape)
        for rule in self.rules:
            weights = decode_tensor(self.gguf, rule.gguf_name)
            update = self.updates.get(rule.gguf_name)
            tuned = weights if update is None else updated(weights, update)
            rule.transform.part(whole).copy_(rule.transform.gguf_to_hf(tuned))
            self.gguf.release_pages(rule.gguf_name)
        limit = torch.finfo(self.dtype).max
        if (largest := float(whole.abs().max())) > limit:
            raise InputError(
                f"`{self.rules[0].gguf_name}` holds {largest:g}, more than {limit:g}, the most that f16 can.",
                hint="Choose --type bf16 or f32.",
            )
        return whole


def _write_shards(
    folder: Path, tensors: Sequence[LazyTensor], dtype: torch.dtype, shard_bytes: int
) -> list[Path]:
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.size_bytes(dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        path = folder / "model.safetensors"
        write_safetensors(path, tensors, dtype)
        return [path]
    weight_map: dict[str, str] = {}
    paths: list[Path] = []
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path, shard, dtype)
        weight_map |= {tensor.name: path.name for tensor in shard}
        paths.append(path)
    total = sum(tensor.size_bytes(dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_NAME, index)
    return paths


def _write_tokenizer(base: OpenBase, folder: Path) -> list[str]:
    """Tokenizer files; returns notes on what could not be written."""
    is_jinja = base.template.source == "jinja"
    notes = []
    if not is_jinja:
        notes.append(
            "The model was trained with Ollama's TEMPLATE, which Transformers cannot run: no chat template is written. "
            "Prompt it with the TEMPLATE's text."
        )
    vocabulary = base.tokenizer.vocabulary
    if vocabulary.pre_tokenizer is None:
        notes.append(
            "No tokenizer is written: a SentencePiece vocabulary cannot be said exactly in tokenizer.json. Take the "
            f"tokenizer of the model that {base.source.name} was made from."
        )
        return notes
    save_hf_tokenizer(vocabulary, folder, base.template.text if is_jinja else None)
    return notes


def _generation_config(base: OpenBase) -> dict[str, Any]:
    tokenizer = base.tokenizer
    ends = sorted(tokenizer.end_of_generation_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}
