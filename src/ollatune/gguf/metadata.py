"""Metadata values, decoded from the header's bytes when they are asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ollatune.base.errors import GGUFError
from ollatune.base.text import did_you_mean, printable
from ollatune.gguf.types import DEFAULT_ALIGNMENT, SCALAR_FORMATS, ValueType

MetadataValue: TypeAlias = (
    "bool | int | float | str | list[bool] | list[int] | list[float] | list[str]"
)

MAX_ALIGNMENT = 1 << 20

_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Record:
    """Where one metadata record lies. `start` is its key's first byte, `value_start` its first value byte."""

    start: int
    value_start: int
    end: int
    value_type: ValueType
    element_type: ValueType | None
    num_elements: int


class Metadata(Mapping[str, MetadataValue]):
    """The metadata in file order. A value is decoded when first asked for, then kept.

    Asking for a text that is not UTF-8 raises GGUFError.
    """

    def __init__(self, path: Path, header: bytes, records: dict[str, Record]) -> None:
        self._path = path
        self._header = header
        self._records = records
        self._values: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._values:
            self._values[key] = self._decode(key, self._records[key])
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def without(self, prefix: str) -> Metadata:
        """The same metadata without the keys that begin with `prefix`."""
        kept = {key: value for key, value in self._records.items() if not key.startswith(prefix)}
        return Metadata(self._path, self._header, kept)

    def record(self, key: str) -> Record:
        """Where `key` lies. Raises GGUFError with the nearest key where there is none."""
        found = self._records.get(key)
        if found is None:
            near = did_you_mean(key, self._records).strip()
            raise GGUFError(self._path, None, printable(key), "no such metadata key", hint=near)
        return found

    def record_bytes(self, key: str) -> bytes:
        """Key, type and value of `key` as they stand in the file. Raises GGUFError where there is none."""
        record = self.record(key)
        return self._header[record.start : record.end]

    def alignment(self) -> int:
        """`general.alignment`, or the format's default. Raises GGUFError where it is impossible."""
        value: Any = self.get("general.alignment", DEFAULT_ALIGNMENT)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if not is_number or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            reason = f"{printable(str(value))}, a power of two up to {MAX_ALIGNMENT} was expected"
            raise GGUFError(self._path, None, "general.alignment", reason)
        return int(value)

    def _decode(self, key: str, record: Record) -> MetadataValue:
        raw = self._header[record.value_start : record.end]
        if record.element_type is ValueType.STRING:
            return self._strings(key, record, raw)
        if record.element_type is not None:
            numbers: list[int] | list[float] | list[bool]
            numbers = np.frombuffer(raw, SCALAR_FORMATS[record.element_type]).tolist()
            return numbers
        if record.value_type is ValueType.STRING:
            try:
                return raw[8:].decode("utf-8")
            except UnicodeDecodeError:
                raise self._not_utf8(key, record.value_start) from None
        number: bool | int | float = struct.unpack(SCALAR_FORMATS[record.value_type], raw)[0]
        return number

    def _strings(self, key: str, record: Record, raw: bytes) -> list[str]:
        unpack = _U64.unpack_from
        texts: list[str] = []
        append = texts.append
        position = 0
        try:
            for _ in range(record.num_elements):
                start = position + 8
                position = start + unpack(raw, position)[0]
                append(raw[start:position].decode())
        except UnicodeDecodeError:
            raise self._not_utf8(f"{key}[{len(texts)}]", record.value_start + start) from None
        return texts

    def _not_utf8(self, field: str, offset: int) -> GGUFError:
        return GGUFError(self._path, offset, printable(field), "a text that is not UTF-8")
