"""Walk the header of a GGUF file: every length is checked against the file before it is followed.

Layout (little endian): magic, version u32, tensor count u64, metadata count u64, the metadata records
(key, type, value), the tensor descriptions (name, dimensions, type, offset), padding, tensor data.
Source: docs/gguf.md of the ggml repository.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from ollatune.base.errors import GGUFError
from ollatune.base.text import printable
from ollatune.gguf.metadata import Record
from ollatune.gguf.types import (
    GGUF_MAGIC,
    REMOVED_TYPES,
    SCALAR_FORMATS,
    SUPPORTED_VERSIONS,
    GGMLType,
    ValueType,
)

# Limits far above any real file; they bound time and memory on a hostile one.
MAX_METADATA_RECORDS = 65_536
MAX_TENSORS = 65_536
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ELEMENTS = 1 << 24
MAX_DIMENSIONS = 4
MAX_TENSOR_WEIGHTS = 2**63 - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {value_type: struct.Struct(fmt) for value_type, fmt in SCALAR_FORMATS.items()}
_HEADER_BYTES = 24
_SMALLEST_RECORD_BYTES = 8 + 4 + 1
_SMALLEST_TENSOR_BYTES = 8 + 4 + 4 + 8


TRUNCATED_HINT = "The file is damaged or its download was cut short; fetch it again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` is in numpy order (rows, columns); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    size_bytes: int

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


class HeaderCursor:
    """Walks the header once, in order. Every step is bounded by the file's size before it is taken."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.size = len(content)
        self.position = 0

    def error(
        self, field: str, reason: str, *, offset: int | None = None, hint: str = ""
    ) -> GGUFError:
        where = self.position if offset is None else offset
        return GGUFError(self.path, where, printable(field), reason, hint=hint)

    def take(self, layout: struct.Struct, field: str) -> int:
        """The next number. Raises GGUFError at the end of the file."""
        if self.position + layout.size > self.size:
            raise self.error(field, "the file ends here", hint=TRUNCATED_HINT)
        (number,) = layout.unpack_from(self.content, self.position)
        self.position += layout.size
        return int(number)

    def take_string(self, field: str) -> str:
        start = self.position
        length = self.take(_U64, field)
        self._require_string(length, field, start)
        raw = self.content[self.position : self.position + length]
        self.position += length
        return self._text(raw, field, start)

    def _text(self, raw: bytes, field: str, offset: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(field, "a text that is not UTF-8", offset=offset) from None

    def _require_string(self, length: int, field: str, offset: int) -> None:
        if length > MAX_STRING_BYTES:
            reason = f"a text of {length} bytes, at most {MAX_STRING_BYTES} are allowed"
            raise self.error(field, reason, offset=offset)
        if offset + 8 + length > self.size:
            reason = f"a text of {length} bytes, {self.size - offset - 8} are left in the file"
            raise self.error(field, reason, offset=offset, hint=TRUNCATED_HINT)

    def header(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata records."""
        self.position = len(GGUF_MAGIC)
        version = self.take(_U32, "version")
        if version not in SUPPORTED_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in SUPPORTED_VERSIONS:
                raise self.error(
                    "version",
                    f"a big-endian file (version {swapped})",
                    offset=4,
                    hint="Only little-endian files can be read; download the ordinary build of the model.",
                )
            raise self.error(
                "version",
                f"version {version}, {' and '.join(map(str, SUPPORTED_VERSIONS))} can be read",
                offset=4,
                hint="Convert the file anew with a current llama.cpp, or download a newer build.",
            )
        num_tensors = self.take(_U64, "number of tensors")
        self._require_count("tensors", num_tensors, MAX_TENSORS, _SMALLEST_TENSOR_BYTES)
        num_records = self.take(_U64, "number of metadata records")
        self._require_count(
            "metadata records", num_records, MAX_METADATA_RECORDS, _SMALLEST_RECORD_BYTES
        )
        return version, num_tensors, num_records

    def _require_count(self, what: str, count: int, limit: int, smallest_bytes: int) -> None:
        if count > limit:
            raise self.error(f"number of {what}", f"{count}, at most {limit} are allowed")
        if count * smallest_bytes > self.size:
            reason = f"{count} cannot fit into {self.size} bytes"
            raise self.error(f"number of {what}", reason, hint=TRUNCATED_HINT)

    def records(self, num_records: int) -> dict[str, Record]:
        """Where every metadata record lies, by key, in file order."""
        found: dict[str, Record] = {}
        for index in range(num_records):
            start = self.position
            key = self.take_string(f"key of metadata record {index}")
            if key in found:
                raise self.error(key, "this metadata key occurs twice", offset=start)
            found[key] = self._skip_value(key, start)
        return found

    def _take_value_type(self, key: str) -> ValueType:
        offset = self.position
        number = self.take(_U32, key)
        try:
            return ValueType(number)
        except ValueError:
            raise self.error(key, f"unknown value type {number}", offset=offset) from None

    def _skip_value(self, key: str, start: int) -> Record:
        value_type = self._take_value_type(key)
        element_type: ValueType | None = None
        num_elements = 1
        if value_type is ValueType.ARRAY:
            element_type = self._take_value_type(key)
            num_elements = self.take(_U64, key)
        value_start = self.position
        stored_type = value_type if element_type is None else element_type
        self._skip_elements(key, stored_type, num_elements)
        return Record(start, value_start, self.position, value_type, element_type, num_elements)

    def _skip_elements(self, key: str, element_type: ValueType, num_elements: int) -> None:
        if element_type is ValueType.ARRAY:
            raise self.error(key, "an array of arrays, which no reader of GGUF supports")
        if num_elements > MAX_ARRAY_ELEMENTS:
            reason = f"{num_elements} elements, at most {MAX_ARRAY_ELEMENTS} are allowed"
            raise self.error(key, reason)
        smallest = 8 if element_type is ValueType.STRING else _SCALARS[element_type].size
        if num_elements * smallest > self.size - self.position:
            reason = (
                f"{num_elements} elements, {self.size - self.position} bytes are left in the file"
            )
            raise self.error(key, reason, hint=TRUNCATED_HINT)
        if element_type is ValueType.STRING:
            self._skip_strings(key, num_elements)
        else:
            self.position += num_elements * smallest

    def _skip_strings(self, key: str, num_strings: int) -> None:
        # The hot loop of a large vocabulary: one unpack, two comparisons and one addition a string.
        unpack, content, last = _U64.unpack_from, self.content, self.size - 8
        position = self.position
        for _ in range(num_strings):
            if position > last:
                raise self.error(key, "the file ends here", offset=position, hint=TRUNCATED_HINT)
            (length,) = unpack(content, position)
            if length > MAX_STRING_BYTES:
                self._require_string(length, key, position)
            position += 8 + length
        if position > self.size:
            reason = f"its text ends at byte {position}, the file at {self.size}"
            raise self.error(key, reason, hint=TRUNCATED_HINT)
        self.position = position

    def tensor_descriptions(self, num_tensors: int) -> list[TensorInfo]:
        """Every tensor with its offset still relative to the data section."""
        return [self._tensor_description(index) for index in range(num_tensors)]

    def _tensor_description(self, index: int) -> TensorInfo:
        start = self.position
        name = self.take_string(f"name of tensor {index}")
        num_dimensions = self.take(_U32, name)
        if num_dimensions > MAX_DIMENSIONS:
            reason = f"{num_dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed"
            raise self.error(name, reason, offset=start)
        sizes = [self.take(_U64, name) for _ in range(num_dimensions)]
        type_number = self.take(_U32, name)
        offset = self.take(_U64, name)
        num_weights = 1
        for size in sizes:
            num_weights *= size
        if not 0 < num_weights <= MAX_TENSOR_WEIGHTS:
            raise self.error(name, f"impossible dimensions {sizes}", offset=start)
        tensor_type = self._tensor_type(name, type_number, start)
        columns = sizes[0] if sizes else 1
        if columns % tensor_type.block_size:
            reason = f"rows of {columns} weights, {tensor_type.name} needs a multiple of {tensor_type.block_size}"
            raise self.error(name, reason, offset=start)
        size_bytes = num_weights // tensor_type.block_size * tensor_type.block_bytes
        return TensorInfo(name, tuple(reversed(sizes)), tensor_type, offset, size_bytes)

    def _tensor_type(self, name: str, number: int, start: int) -> GGMLType:
        try:
            return GGMLType(number)
        except ValueError:
            removed = REMOVED_TYPES.get(number)
            reason = f"tensor type {number} is unknown"
            if removed:
                reason = f"tensor type {removed}, which llama.cpp no longer reads"
            hint = "Download a current build of the model." if removed else ""
            raise self.error(name, reason, offset=start, hint=hint) from None
