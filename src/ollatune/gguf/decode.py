"""The weights of one tensor of a file, as a server computes with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import GGUFFile


def decode_tensor(base: GGUFFile, name: str) -> Tensor:
    """The weights of a tensor: float32 in the tensor's shape."""
    info = base.tensor(name)
    columns = info.shape[-1] if info.shape else 1
    # A copy of this one tensor: torch has no read-only tensors, and the mapped pages can then be let go.
    stored = torch.from_numpy(base.tensor_data(name).copy())
    blocks = stored.reshape(-1, info.type.row_bytes(columns))
    return dequantize(blocks, info.type).reshape(info.shape)
