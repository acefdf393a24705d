"""Write a GGUF file (version 3, little endian) tensor by tensor, atomically, hashing on the way.

Metadata records are taken as bytes, so that those of another file are copied exactly
(`GGUFFile.metadata_record`); `encode_metadata` makes new ones.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import GGUFError, StorageError, UsageError
from ollatune.base.files import free_bytes, staged_file
from ollatune.base.text import format_bytes
from ollatune.gguf.types import (
    DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    SCALAR_FORMATS,
    GGMLType,
    ValueType,
)

WRITTEN_VERSION = 3
MAX_TENSOR_NAME_BYTES = 63
"""GGML_MAX_NAME of ggml.h, less its closing zero; llama.cpp refuses longer names."""

Chunk: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[np.uint8]"


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor to come: `shape` in numpy order; `produce()` yields its stored bytes when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    produce: Callable[[], Iterable[Chunk]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the stored tensor. Raises UsageError where the type's blocks do not divide a row."""
        columns = self.shape[-1] if self.shape else 1
        num_rows = 1
        for size in self.shape[:-1]:
            num_rows *= size
        return num_rows * self.type.row_bytes(columns)


def encode_metadata(
    key: str, value: Any, value_type: ValueType, *, element_type: ValueType | None = None
) -> bytes:
    """One metadata record: key, type, value. Arrays name their `element_type`.

    Raises UsageError where the value does not fit the type.
    """
    record = [_encode_string(key), struct.pack("<I", value_type)]
    try:
        if value_type is ValueType.ARRAY:
            if element_type is None or element_type is ValueType.ARRAY:
                raise UsageError(f"{key}: an array needs the type of its elements, and not ARRAY.")
            record.append(struct.pack("<IQ", element_type, len(value)))
            record += [_encode_value(element, element_type) for element in value]
        else:
            record.append(_encode_value(value, value_type))
    except (struct.error, OverflowError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{key}: {value!r:.80} is no {value_type.name} value ({error})."
        ) from error
    return b"".join(record)


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(value: Any, value_type: ValueType) -> bytes:
    if value_type is ValueType.STRING:
        return _encode_string(value)
    if isinstance(value, bool) is not (value_type is ValueType.BOOL):
        raise TypeError(f"{type(value).__name__} given")
    return struct.pack(SCALAR_FORMATS[value_type], value)


def record_key(record: bytes) -> str:
    """The key of an encoded metadata record."""
    (length,) = struct.unpack_from("<Q", record)
    return record[8 : 8 + length].decode("utf-8")


def write_gguf(
    path: str | Path,
    records: Sequence[bytes],
    tensors: Sequence[TensorToWrite],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    before_commit: Callable[[str, int], None] | None = None,
) -> str:
    """Write `path` and return the hex SHA-256 of the whole file.

    The file takes its name only when complete and on disk. One tensor's chunk is in memory at a time.
    `before_commit` is called with digest and size in bytes when all is on disk and only the name is missing; where it
    raises, the file never gets it.

    Raises GGUFError where names repeat or a tensor yields the wrong number of bytes, StorageError where
    the disk is full or the folder cannot be written.
    """
    path = Path(path)
    _require_alignment(path, records, alignment)
    header = _header(path, records, tensors, alignment)
    total_bytes = len(header) + sum(_padded(tensor.size_bytes, alignment) for tensor in tensors)
    if total_bytes > (free := free_bytes(path.parent)):
        raise StorageError(
            f"Not enough room for {path}: {format_bytes(total_bytes)} needed, {format_bytes(free)} free.",
            hint="Free some space or choose another folder with --output.",
        )
    with staged_file(path, needed_bytes=total_bytes) as stream:
        output = _HashingStream(stream)
        output.write(header)
        for tensor in tensors:
            _write_tensor(path, output, tensor, alignment)
        digest = output.hexdigest()
        if before_commit is not None:
            stream.flush()
            os.fsync(stream.fileno())
            before_commit(digest, total_bytes)
        return digest


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment


def _require_alignment(path: Path, records: Sequence[bytes], alignment: int) -> None:
    """The alignment in force must be the one that the records tell the reader."""
    default = encode_metadata("general.alignment", DEFAULT_ALIGNMENT, ValueType.UINT32)
    expected = encode_metadata("general.alignment", alignment, ValueType.UINT32)
    keys = [record_key(record) for record in records]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise GGUFError(path, None, twice, "this metadata key occurs twice")
    stated = dict(zip(keys, records, strict=True)).get("general.alignment", default)
    if stated != expected:
        reason = (
            f"the metadata do not state the alignment {alignment} that the file is written with"
        )
        raise GGUFError(path, None, "general.alignment", reason)


def _header(
    path: Path, records: Sequence[bytes], tensors: Sequence[TensorToWrite], alignment: int
) -> bytes:
    header = bytearray(GGUF_MAGIC)
    header += struct.pack("<IQQ", WRITTEN_VERSION, len(tensors), len(records))
    for record in records:
        header += record
    names: set[str] = set()
    offset = 0
    for tensor in tensors:
        if tensor.name in names:
            raise GGUFError(path, None, tensor.name, "this tensor name occurs twice")
        if len(tensor.name.encode("utf-8")) > MAX_TENSOR_NAME_BYTES:
            reason = f"the name is longer than {MAX_TENSOR_NAME_BYTES} bytes"
            raise GGUFError(path, None, tensor.name, reason)
        names.add(tensor.name)
        header += _encode_string(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.type, offset)
        offset += _padded(tensor.size_bytes, alignment)
    return bytes(header.ljust(_padded(len(header), alignment), b"\0"))


class _HashingStream:
    """Writes chunks and hashes them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def write(self, chunk: Chunk) -> int:
        view = memoryview(chunk).cast("B")  # type: ignore[arg-type]  # buffers have no common type before 3.12
        self._stream.write(view)
        self._digest.update(view)
        return view.nbytes

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _write_tensor(
    path: Path, output: _HashingStream, tensor: TensorToWrite, alignment: int
) -> None:
    written = 0
    for chunk in tensor.produce():
        written += output.write(chunk)
        if written > tensor.size_bytes:
            break
    if written != tensor.size_bytes:
        reason = f"{written} bytes came, {tensor.size_bytes} were expected for {tensor.type.name} {tensor.shape}"
        raise GGUFError(path, None, tensor.name, reason)
    output.write(bytes(_padded(written, alignment) - written))
