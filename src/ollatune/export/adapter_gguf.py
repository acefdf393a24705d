"""LoRA factors as a GGUF adapter, as llama.cpp reads it (src/llama-adapter.cpp).

llama.cpp computes W + alpha/rank · B·A with one `adapter.lora.alpha` per file and the rank of each pair. The scales
of our factors (alpha/r, alpha/√r for rsLoRA, patterns by layer) are folded so that this gives the same: alpha is
chosen for the commonest scale · rank, and only pairs that differ have their B multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ollatune.base.errors import DivergedError, InputError, UsageError
from ollatune.base.text import did_you_mean
from ollatune.gguf.codecs import quantize
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf

LoraFactors: TypeAlias = tuple[Tensor, Tensor, float]
"""A [rank, in], B [out, rank], scale: the layer computes with W + scale·B·A, B's rows in the file's order."""

ADAPTER_TYPES = (GGMLType.F32, GGMLType.F16)
"""What every server that takes adapters reads."""

_FILE_TYPES = {GGMLType.F32: 0, GGMLType.F16: 1}  # llama_ftype of llama.h


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """A written adapter. `sha256` is that of the whole file."""

    path: Path
    sha256: str
    size_bytes: int
    alpha: float
    num_pairs: int
    num_folded: int


def write_adapter(
    base: GGUFFile,
    lora: Mapping[str, LoraFactors],
    output: Path,
    *,
    tensor_type: GGMLType = GGMLType.F32,
    name: str = "",
) -> AdapterResult:
    """Write `lora`, by GGUF tensor name, as an adapter for `base`.

    Raises:
        InputError: no factors, or factors that the base has no tensor of that shape for.
        DivergedError: a factor holds NaN or infinity.
        UsageError: a type other than F32 and F16.
        StorageError: disk full, no permission. `output` is then as it was before.
    """
    if tensor_type not in ADAPTER_TYPES:
        raise UsageError(
            f"Adapters cannot be stored as {tensor_type.name}.",
            hint=f"Choose one of {', '.join(kind.name.lower() for kind in ADAPTER_TYPES)}.",
        )
    _check_factors(base, lora)
    alpha = _common_alpha(lora)
    tensors: list[TensorToWrite] = []
    num_folded = 0
    for tensor, (a, b, scale) in lora.items():
        rank = a.shape[-2]
        factor = 1.0 if _stored_alpha(scale * rank) == alpha else scale * rank / alpha
        num_folded += factor != 1.0
        a_stored, b_stored = a.detach().float(), b.detach().float() * factor
        if is_token_embedding(tensor):
            # llama.cpp looks rows up in lora_a here and multiplies with lora_b: the pair is flipped.
            a_stored, b_stored = b_stored, a_stored.T
        tensors.append(_tensor(f"{tensor}.lora_a", a_stored, tensor_type))
        tensors.append(_tensor(f"{tensor}.lora_b", b_stored, tensor_type))
    digest = write_gguf(output, _records(base, alpha, tensor_type, name), tensors)
    size_bytes = output.stat().st_size
    return AdapterResult(output, digest, size_bytes, alpha, len(lora), num_folded)


def is_token_embedding(tensor: str) -> bool:
    return tensor == "token_embd.weight"


def _stored_alpha(alpha: float) -> float:
    """`alpha` as the file's float32 holds it."""
    return float(np.float32(alpha))


def _common_alpha(lora: Mapping[str, LoraFactors]) -> float:
    """The scale · rank of most pairs; never 0, which llama.cpp reads as "no scaling"."""
    alphas = Counter(_stored_alpha(scale * a.shape[-2]) for a, _, scale in lora.values())
    del alphas[0.0]
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _records(base: GGUFFile, alpha: float, tensor_type: GGMLType, name: str) -> list[bytes]:
    records = [
        encode_metadata("general.type", "adapter", ValueType.STRING),
        encode_metadata("general.architecture", base.architecture, ValueType.STRING),
        encode_metadata("adapter.type", "lora", ValueType.STRING),
        encode_metadata("adapter.lora.alpha", alpha, ValueType.FLOAT32),
        encode_metadata("general.file_type", _FILE_TYPES[tensor_type], ValueType.UINT32),
    ]
    if name:
        records.append(encode_metadata("general.name", name, ValueType.STRING))
    return records


def _tensor(name: str, values: Tensor, tensor_type: GGMLType) -> TensorToWrite:
    if not values.isfinite().all():
        raise DivergedError(
            f"`{name}` holds NaN or infinity; nothing was written.",
            hint="Export an earlier checkpoint.",
        )
    stored = quantize(values.cpu().contiguous(), tensor_type).reshape(-1).numpy()
    return TensorToWrite(name, tuple(values.shape), tensor_type, lambda: [stored])


def _is_pair_for(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether A [..., rank, in] and B [..., out, rank] belong to a tensor [..., out, in]."""
    if not len(shape) == len(a) == len(b) >= 2:
        return False
    *stack, num_rows, num_columns = shape
    rank = a[-2]
    return a == (*stack, rank, num_columns) and b == (*stack, num_rows, rank)


def _check_factors(base: GGUFFile, lora: Mapping[str, LoraFactors]) -> None:
    problems: list[str] = []
    for name, (a, b, _) in lora.items():
        info = base.tensors.get(name)
        if info is None:
            problems.append(f"`{name}` is not in the base.{did_you_mean(name, base.tensors)}")
            continue
        if not _is_pair_for(info.shape, tuple(a.shape), tuple(b.shape)):
            problems.append(
                f"`{name}` {info.shape} has factors A {tuple(a.shape)} and B {tuple(b.shape)}."
            )
        if is_token_embedding(name) and "output.weight" not in base.tensors:
            problems.append(
                f"`{name}` is also this model's output layer, which an adapter cannot change along with it."
            )
    if not lora:
        problems.append("There are no factors.")
    if problems:
        raise InputError(
            f"The adapter cannot be written for {base.path}: {' '.join(problems[:5])}",
            hint="Export the merged model instead, or use the base that the adapter was trained on.",
        )
