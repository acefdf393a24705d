"""Model files with the shapes of well-known models and made-up weights, for benchmarks of memory and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ollatune.gguf.codecs import quantize
from ollatune.gguf.mixes import ModelTraits, mix_named, tensor_type_for
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf

# Rows of made-up weights that are quantised once and written over and over.
_TILE_ROWS = 64


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A llama model: sizes as in its `config.json`."""

    num_layers: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    rope_base: float
    is_tied: bool

    @property
    def num_parameters(self) -> int:
        return sum(_count(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF names and shapes (rows, columns) of all tensors."""
        kv = self.hidden // self.num_heads * self.num_kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary, self.hidden),
            "output_norm.weight": (self.hidden,),
        }
        if not self.is_tied:
            shapes["output.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.num_layers):
            shapes |= {
                f"blk.{layer}.attn_norm.weight": (self.hidden,),
                f"blk.{layer}.attn_q.weight": (self.hidden, self.hidden),
                f"blk.{layer}.attn_k.weight": (kv, self.hidden),
                f"blk.{layer}.attn_v.weight": (kv, self.hidden),
                f"blk.{layer}.attn_output.weight": (self.hidden, self.hidden),
                f"blk.{layer}.ffn_norm.weight": (self.hidden,),
                f"blk.{layer}.ffn_gate.weight": (self.inner, self.hidden),
                f"blk.{layer}.ffn_up.weight": (self.inner, self.hidden),
                f"blk.{layer}.ffn_down.weight": (self.hidden, self.inner),
            }
        return shapes


SHAPES = {
    "135m": ModelShape(30, 576, 1536, 9, 3, 49152, 100000.0, True),  # SmolLM2-135M
    "360m": ModelShape(32, 960, 2560, 15, 5, 49152, 100000.0, True),  # SmolLM2-360M
    "1b": ModelShape(16, 2048, 8192, 32, 8, 128256, 500000.0, True),  # Llama-3.2-1B
    "8b": ModelShape(32, 4096, 14336, 32, 8, 128256, 500000.0, False),  # Llama-3.1-8B
}


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _records(shape: ModelShape, file_type: int) -> list[bytes]:
    integers = {
        "general.file_type": file_type,
        "llama.block_count": shape.num_layers,
        "llama.context_length": 8192,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.inner,
        "llama.attention.head_count": shape.num_heads,
        "llama.attention.head_count_kv": shape.num_kv_heads,
        "llama.rope.dimension_count": shape.hidden // shape.num_heads,
        "llama.vocab_size": shape.vocabulary,
    }
    floats = {
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": shape.rope_base,
    }
    return [
        encode_metadata("general.architecture", "llama", ValueType.STRING),
        *(encode_metadata(key, value, ValueType.UINT32) for key, value in integers.items()),
        *(encode_metadata(key, value, ValueType.FLOAT32) for key, value in floats.items()),
    ]


def _tiled(type: GGMLType, num_rows: int, num_columns: int) -> Iterator[bytes]:
    """The rows of a matrix of small normally distributed weights, a tile repeated."""
    generator = torch.Generator().manual_seed(num_rows + num_columns)
    weights = torch.randn(_TILE_ROWS, num_columns, generator=generator) / num_columns**0.5
    tile = quantize(weights, type).numpy().tobytes()
    whole, rest = divmod(num_rows, _TILE_ROWS)
    for _ in range(whole):
        yield tile
    yield tile[: rest * type.row_bytes(num_columns)]


def _ones(num_columns: int) -> Iterator[bytes]:
    yield torch.ones(num_columns).numpy().tobytes()


def write_shaped_model(path: Path, shape: ModelShape, mix_name: str = "q4_K_M") -> int:
    """Write a GGUF file of `shape` with the types of a mix. Returns its size in bytes."""
    mix = mix_named(mix_name)
    traits = ModelTraits(shape.num_layers, is_tied=shape.is_tied)
    tensors = []
    for name, dimensions in shape.tensor_shapes().items():
        type = tensor_type_for(mix, name, dimensions, traits)
        produce: Callable[[], Iterator[bytes]]
        if type is None:
            type, produce = GGMLType.F32, partial(_ones, dimensions[0])
        else:
            produce = partial(_tiled, type, dimensions[0], dimensions[1])
        tensors.append(TensorToWrite(name, dimensions, type, produce))
    write_gguf(path, _records(shape, mix.file_type), tensors)
    return path.stat().st_size
