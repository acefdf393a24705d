"""A small model file and updates for it, for tests of the exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf

HIDDEN, FEED_FORWARD, VOCABULARY, LAYERS = 64, 96, 48, 2


@dataclass(frozen=True)
class Update:
    name: str
    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]
    kind: str = "lora"


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        found[f"{block}.attn_norm.weight"] = (HIDDEN,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"{block}.{name}.weight"] = (HIDDEN, HIDDEN)
        found[f"{block}.ffn_up.weight"] = (FEED_FORWARD, HIDDEN)
        found[f"{block}.ffn_down.weight"] = (HIDDEN, FEED_FORWARD)
        found[f"{block}.ffn_gate_exps.weight"] = (3, FEED_FORWARD, HIDDEN)
    found["output_norm.weight"] = (HIDDEN,)
    return found


def write_small_base(path: Path, stored_type: GGMLType = GGMLType.Q4_1, seed: int = 0) -> Path:
    """A llama-like file whose matrices are stored as `stored_type`, encoded by the reference."""
    rng = np.random.default_rng(seed)
    tensors: list[TensorToWrite] = []
    for name, shape in shapes().items():
        kind = GGMLType.F32 if len(shape) == 1 else stored_type
        weights = rng.standard_t(5, shape).astype(np.float32) * 0.05
        stored = quants.quantize(weights, GGMLQuantizationType(int(kind)))
        tensors.append(TensorToWrite(name, shape, kind, lambda s=stored: [s.tobytes()]))
    records = [
        encode_metadata("general.architecture", "llama", ValueType.STRING),
        encode_metadata("general.name", "small", ValueType.STRING),
        encode_metadata("general.file_type", 3, ValueType.UINT32),
        encode_metadata("llama.block_count", LAYERS, ValueType.UINT32),
        encode_metadata("tokenizer.chat_template", "{{ messages }}", ValueType.STRING),
        encode_metadata(
            "tokenizer.ggml.tokens",
            [f"t{i}" for i in range(VOCABULARY)],
            ValueType.ARRAY,
            element_type=ValueType.STRING,
        ),
    ]
    write_gguf(path, records, tensors)
    return path


def write_wide_base(path: Path, stored_type: GGMLType = GGMLType.F16) -> Path:
    """Eight layers of matrices whose rows the blocks of K-quants divide."""
    rng = np.random.default_rng(1)
    names = ["token_embd.weight", "output.weight"]
    names += [f"blk.{layer}.{part}.weight" for layer in range(8) for part in ("attn_v", "ffn_down")]
    tensors = [TensorToWrite("output_norm.weight", (256,), GGMLType.F32, lambda: [bytes(1024)])]
    for name in names:
        weights = rng.standard_normal((8, 256)).astype(np.float32) * 0.05
        stored = quants.quantize(weights, GGMLQuantizationType(int(stored_type)))
        tensors.append(TensorToWrite(name, (8, 256), stored_type, lambda s=stored: [s.tobytes()]))
    records = [
        encode_metadata("general.architecture", "llama", ValueType.STRING),
        encode_metadata("llama.block_count", 8, ValueType.UINT32),
        encode_metadata("general.file_type", 1, ValueType.UINT32),
    ]
    write_gguf(path, records, tensors)
    return path


def lora_factors(shape: tuple[int, ...], seed: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    """A [..., rank, in] and B [..., out, rank] for a tensor of `shape`."""
    generator = torch.Generator().manual_seed(seed)
    *stack, rows, columns = shape
    a = torch.randn(*stack, rank, columns, generator=generator)
    b = torch.randn(*stack, rows, rank, generator=generator)
    return a, b


def random_update(name: str, shape: tuple[int, ...], *, relative_size: float = 0.02) -> Update:
    """A low-rank update whose norm is `relative_size` of the tensor's."""
    a, b = lora_factors(shape, seed=sum(name.encode()))
    delta = b @ a

    def apply(base: Tensor) -> Tensor:
        return base + delta * (relative_size * base.norm() / delta.norm())

    return Update(name, shape, apply)


def reference_weights(file: GGUFFile, name: str) -> Tensor:
    """The tensor decoded by the reference implementation."""
    info = file.tensors[name]
    kind = GGMLQuantizationType(int(info.type))
    columns = info.shape[-1]
    stored = file.tensor_data(name).reshape(-1, info.type.row_bytes(columns))
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        dtype = np.float32 if kind == GGMLQuantizationType.F32 else np.float16
        return torch.from_numpy(stored.view(dtype).astype(np.float32)).reshape(info.shape)
    return torch.from_numpy(quants.dequantize(stored, kind)).reshape(info.shape)
