"""Write a `.safetensors` file tensor by tensor: no more than one tensor is in memory.

Format: https://huggingface.co/docs/safetensors - eight bytes of header length, a JSON header padded with blanks to a
multiple of eight, then the tensors one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ollatune.base.files import staged_file

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to write: its name and shape are known, `make` computes its values when it is its turn."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def size_bytes(self, dtype: torch.dtype) -> int:
        return prod(self.shape) * dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[LazyTensor], dtype: torch.dtype) -> int:
    """Write `tensors` as `dtype`; returns the file's size in bytes. Raises StorageError and what a `make` raises."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.size_bytes(dtype)
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    total = 8 + len(encoded) + start
    with staged_file(path, needed_bytes=total) as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = tensor.make().to(dtype).contiguous()
            assert tuple(values.shape) == tensor.shape, (tensor.name, values.shape, tensor.shape)
            stream.write(values.reshape(-1).view(torch.uint8).numpy().data)
    return total
