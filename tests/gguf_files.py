"""Build GGUF files by hand, field by field, so that a test can get any field wrong.

Independent of `ollatune.gguf.writer` on purpose: the reader is tested against the format, not against our writer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT = 32

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = range(10)
UINT64, INT64, FLOAT64 = 10, 11, 12
_FORMATS = {
    UINT8: "<B", INT8: "<b", UINT16: "<H", INT16: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f",
    BOOL: "<B", UINT64: "<Q", INT64: "<q", FLOAT64: "<d",
}  # fmt: skip

F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q4_K: (256, 144)}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(value: Any, value_type: int) -> bytes:
    if value_type == STRING:
        return text(value)
    return struct.pack(_FORMATS[value_type], value)


def record(key: str | bytes, value: Any, value_type: int, element_type: int | None = None) -> bytes:
    head = text(key) + struct.pack("<I", value_type)
    if value_type == ARRAY:
        assert element_type is not None
        elements = b"".join(scalar(element, element_type) for element in value)
        return head + struct.pack("<IQ", element_type, len(value)) + elements
    return head + scalar(value, value_type)


def tensor_bytes(dimensions: tuple[int, ...], tensor_type: int) -> int:
    block_size, block_bytes = _BLOCKS[tensor_type]
    num_weights = 1
    for size in dimensions:
        num_weights *= size
    return num_weights // block_size * block_bytes


@dataclass
class Tensor:
    """`dimensions` in the file's order: columns first."""

    name: str | bytes
    dimensions: tuple[int, ...]
    type: int
    offset: int | None = None
    content: bytes | None = None

    @property
    def data(self) -> bytes:
        if self.content is not None:
            return self.content
        return bytes(i * 7 % 251 for i in range(tensor_bytes(self.dimensions, self.type)))


@dataclass
class Draft:
    """A file to be; every number that a header states can be overridden."""

    records: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = ALIGNMENT
    num_records: int | None = None
    num_tensors: int | None = None

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_records = len(self.records) if self.num_records is None else self.num_records
        header = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_records)
        header += b"".join(self.records)
        next_offset = 0
        for tensor in self.tensors:
            offset = next_offset if tensor.offset is None else tensor.offset
            header += text(tensor.name) + struct.pack("<I", len(tensor.dimensions))
            header += struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions)
            header += struct.pack("<IQ", tensor.type, offset)
            next_offset += len(_padded(tensor.data, self.alignment))
        return header

    def build(self) -> bytes:
        content = _padded(self.header(), self.alignment)
        return content + b"".join(_padded(tensor.data, self.alignment) for tensor in self.tensors)


def _padded(content: bytes, alignment: int) -> bytes:
    return content + bytes(-len(content) % alignment)


def small_model(version: int = 3) -> Draft:
    """A file with every value type, array of every element type, several tensor types and one vocabulary."""
    records = [
        record("general.architecture", "llama", STRING),
        record("general.name", "kleines Modell · 小", STRING),
        record("llama.context_length", 2048, UINT32),
        record("llama.rope.freq_base", 10000.0, FLOAT32),
        record("test.u8", 200, UINT8),
        record("test.i8", -100, INT8),
        record("test.u16", 60_000, UINT16),
        record("test.i16", -30_000, INT16),
        record("test.i32", -2_000_000_000, INT32),
        record("test.bool", True, BOOL),
        record("test.u64", 2**63 + 1, UINT64),
        record("test.i64", -(2**62), INT64),
        record("test.f64", 1e-300, FLOAT64),
        record("test.empty", "", STRING),
        record("test.empty_list", [], ARRAY, INT32),
        record("test.u8s", [1, 2, 255], ARRAY, UINT8),
        record("test.i16s", [-5, 5], ARRAY, INT16),
        record("test.bools", [True, False, True], ARRAY, BOOL),
        record("test.u64s", [0, 2**64 - 1], ARRAY, UINT64),
        record("test.f64s", [0.5, -0.25], ARRAY, FLOAT64),
        record("tokenizer.ggml.tokens", ["<s>", "▁the", "é", "", "x" * 40], ARRAY, STRING),
        record("tokenizer.ggml.scores", [0.0, -1.5, -2.0, -3.0, -4.0], ARRAY, FLOAT32),
        record("tokenizer.ggml.token_type", [3, 1, 1, 1, 1], ARRAY, INT32),
    ]
    tensors = [
        Tensor("token_embd.weight", (64, 5), Q8_0),
        Tensor("blk.0.attn_norm.weight", (64,), F32),
        Tensor("blk.0.attn_q.weight", (64, 3), Q4_0),
        Tensor("blk.0.ffn_up.weight", (256, 2), Q4_K),
        Tensor("blk.0.ffn_gate_exps.weight", (32, 2, 3), F16),
    ]
    return Draft(records, tensors, version=version)
