"""Block codecs: GGUF tensor bytes to weights and back, vectorised in torch, on CPU and CUDA.

`dequantize` is bit-identical to `gguf.quants.dequantize` for every type of `DECODABLE`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.gguf.codecs import k_decode, k_encode, legacy_decode, legacy_encode
from ollatune.gguf.codecs.bits import begin_chunk, empty, temporary
from ollatune.gguf.codecs.floats import FLOAT_DTYPES, encode_float
from ollatune.gguf.codecs.legacy_decode import Quants
from ollatune.gguf.mixes import FALLBACK_TYPES
from ollatune.gguf.types import GGMLType

__all__ = ["DECODABLE", "ENCODABLE", "FALLBACK_TYPES", "check_columns", "dequantize", "quantize"]

_UNPACKERS: dict[GGMLType, Callable[[Tensor], Quants]] = {
    GGMLType.Q8_0: legacy_decode.unpack_q8_0,
    GGMLType.Q4_0: legacy_decode.unpack_q4_0,
    GGMLType.Q4_1: legacy_decode.unpack_q4_1,
    GGMLType.Q5_0: legacy_decode.unpack_q5_0,
    GGMLType.Q5_1: legacy_decode.unpack_q5_1,
    GGMLType.IQ4_NL: legacy_decode.unpack_iq4_nl,
    GGMLType.Q2_K: k_decode.unpack_q2_k,
    GGMLType.Q3_K: k_decode.unpack_q3_k,
    GGMLType.Q4_K: k_decode.unpack_q4_k,
    GGMLType.Q5_K: k_decode.unpack_q5_k,
    GGMLType.Q6_K: k_decode.unpack_q6_k,
    GGMLType.IQ4_XS: k_decode.unpack_iq4_xs,
}

_ENCODERS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q8_0: legacy_encode.encode_q8_0,
    GGMLType.Q4_0: legacy_encode.encode_q4_0,
    GGMLType.Q4_1: legacy_encode.encode_q4_1,
    GGMLType.Q5_0: legacy_encode.encode_q5_0,
    GGMLType.Q5_1: legacy_encode.encode_q5_1,
    GGMLType.Q2_K: k_encode.encode_q2_k,
    GGMLType.Q3_K: k_encode.encode_q3_k,
    GGMLType.Q4_K: k_encode.encode_q4_k,
    GGMLType.Q5_K: k_encode.encode_q5_k,
    GGMLType.Q6_K: k_encode.encode_q6_k,
}

DECODABLE = frozenset(_UNPACKERS) | frozenset(FLOAT_DTYPES)
ENCODABLE = frozenset(_ENCODERS) | frozenset(FLOAT_DTYPES)

# Weights a pass works on: enough to hide the cost of calling torch, few enough to stay in a CPU's last-level cache.
_CPU_DECODE_CHUNK_WEIGHTS = 1 << 21
# The passes over float32 are fewer and four times as wide.
_CPU_FILL_WEIGHTS = 1 << 19
# Encoders hold several float32 copies of a chunk, and transpose it, which is slow beyond the second-level cache.
_CPU_ENCODE_CHUNK_WEIGHTS = 1 << 18
# A GPU wants few large kernels; the bound keeps the temporaries small beside a model.
_CUDA_CHUNK_WEIGHTS = 1 << 25


def _chunk_blocks(type: GGMLType, device: torch.device, cpu_chunk_weights: int) -> int:
    chunk_weights = cpu_chunk_weights if device.type == "cpu" else _CUDA_CHUNK_WEIGHTS
    return chunk_weights // type.block_size


def check_columns(num_columns: int, type: GGMLType) -> None:
    """Raises InputError, which names the fall-back type, where rows of `num_columns` are no whole number of blocks."""
    if num_columns % type.block_size == 0:
        return
    fallback = FALLBACK_TYPES.get(type, GGMLType.F16)
    if num_columns % fallback.block_size:
        fallback = GGMLType.F16
    raise InputError(
        f"Rows of {num_columns} weights cannot be stored as {type.name}: "
        f"its blocks hold {type.block_size} weights.",
        hint=f"Use {fallback.name} for this tensor.",
    )


def dequantize(
    blocks_u8: Tensor,
    type: GGMLType,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Weights [..., columns] of the blocks [..., row_bytes], on their device.

    The float32 weights are those of ggml; another `dtype` holds them rounded to nearest even.
    `out`, a contiguous tensor of the result's shape, is filled and returned in place of a new one; it sets the dtype.

    Raises:
        InputError: no decoder for `type`, or the last dimension is no whole number of blocks.
    """
    if type not in DECODABLE:
        raise InputError(
            f"Tensors of type {type.name} cannot be decoded.",
            hint=f"Known: {', '.join(sorted(known.name for known in DECODABLE))}.",
        )
    num_blocks, rest = divmod(blocks_u8.shape[-1], type.block_bytes)
    if rest or blocks_u8.dtype != torch.uint8:
        raise InputError(
            f"Rows of {blocks_u8.shape[-1]} elements of {blocks_u8.dtype} are no {type.name} blocks: "
            f"expected uint8 and a multiple of {type.block_bytes} bytes."
        )
    shape = (*blocks_u8.shape[:-1], num_blocks * type.block_size)
    if out is None:
        out = empty(shape, dtype, blocks_u8.device)
    blocks_NB = _aligned(blocks_u8).view(-1, type.block_bytes)
    if type in FLOAT_DTYPES:
        out.view(-1).copy_(blocks_NB.view(FLOAT_DTYPES[type]).view(-1))
        return out
    _decode_chunks(blocks_NB, type, out.view(-1, type.block_size))
    return out


def _aligned(blocks_u8: Tensor) -> Tensor:
    """The same bytes, contiguous, and beginning where any number may begin."""
    blocks_u8 = blocks_u8.contiguous()
    # Views as wider numbers need a multiple of their size as offset; tensors of a file have 32.
    return blocks_u8 if blocks_u8.storage_offset() % 8 == 0 else blocks_u8.clone()


def _decode_chunks(blocks_NB: Tensor, type: GGMLType, out_NW: Tensor) -> None:
    unpack = _UNPACKERS[type]
    chunk = _chunk_blocks(type, blocks_NB.device, _CPU_DECODE_CHUNK_WEIGHTS)
    for start in range(0, blocks_NB.shape[0], chunk):
        begin_chunk()
        _fill(out_NW[start : start + chunk], unpack(blocks_NB[start : start + chunk]))


def _fill(out_NW: Tensor, unpacked: Quants) -> None:
    """out = scale · quant - minimum, in float32, a piece at a time that stays in a core's own cache."""
    num_scales = unpacked.scale_S1.shape[0]
    out_SW, quants_SW = out_NW.view(num_scales, -1), unpacked.quants.view(num_scales, -1)
    piece = num_scales
    if out_NW.device.type == "cpu":
        piece = max(1, _CPU_FILL_WEIGHTS // out_SW.shape[1])
    scratch_SW: Tensor | None = None
    if out_SW.dtype != torch.float32:
        scratch_size = min(piece, num_scales), out_SW.shape[1]
        scratch_SW = temporary(scratch_size, torch.float32, out_NW.device)
    for start in range(0, num_scales, piece):
        part_SW = out_SW[start : start + piece]
        exact_SW = part_SW if scratch_SW is None else scratch_SW[: part_SW.shape[0]]
        exact_SW.copy_(quants_SW[start : start + piece])
        # Two roundings, as in the reference: a fused multiply-add would differ in the last bit.
        exact_SW.mul_(unpacked.scale_S1[start : start + piece])
        if unpacked.minimum_S1 is not None:
            exact_SW.sub_(unpacked.minimum_S1[start : start + piece])
        if scratch_SW is not None:
            part_SW.copy_(exact_SW)


@torch.no_grad()
def quantize(weights: Tensor, type: GGMLType) -> Tensor:
    """uint8 blocks [..., row_bytes] of the weights [..., columns], on their device.

    Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are bit-identical to ggml; Q2_K to Q6_K have a smaller error than ggml's.

    Raises:
        InputError: no encoder for `type`, columns that are no whole number of blocks (the fall-back type is named),
            or weights that are not finite or beyond the range of the type.
    """
    if type not in ENCODABLE:
        raise InputError(
            f"Weights cannot be stored as {type.name}.",
            hint=f"Known: {', '.join(sorted(known.name for known in ENCODABLE))}.",
        )
    if type in FLOAT_DTYPES:
        return encode_float(weights, FLOAT_DTYPES[type])
    check_columns(weights.shape[-1], type)
    weights_NW = weights.contiguous().view(-1, type.block_size)
    blocks_NB = torch.empty(
        weights_NW.shape[0], type.block_bytes, dtype=torch.uint8, device=weights.device
    )
    chunk = _chunk_blocks(type, weights.device, _CPU_ENCODE_CHUNK_WEIGHTS)
    for start in range(0, weights_NW.shape[0], chunk):
        part_NW = weights_NW[start : start + chunk].to(torch.float32)
        blocks_NB[start : start + chunk] = _ENCODERS[type](part_NW)
    return blocks_NB.view(*weights.shape[:-1], -1)
