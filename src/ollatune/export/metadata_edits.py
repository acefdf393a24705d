"""Changes to a file's metadata, stated one by one; every record not named keeps its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollatune.base.errors import InputError
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import ValueType
from ollatune.gguf.writer import encode_metadata


@dataclass(frozen=True, slots=True)
class SetKey:
    """Give `key` a value. The types may be left out where the base has the key."""

    key: str
    value: Any
    value_type: ValueType | None = None
    element_type: ValueType | None = None


@dataclass(frozen=True, slots=True)
class DropKey:
    """Leave `key` out; nothing happens where the base has no such key."""

    key: str


MetadataEdit = SetKey | DropKey


def edited_records(base: GGUFFile, edits: Sequence[MetadataEdit]) -> list[bytes]:
    """The base's records in their order with `edits` made; new keys come last.

    Raises InputError where a key is edited twice, or a new key comes without a type.
    """
    keys = [edit.key for edit in edits]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise InputError(f"The metadata key `{repeated[0]}` is edited twice.")
    by_key = {edit.key: edit for edit in edits}
    records: list[bytes] = []
    for key in base.metadata:
        edit = by_key.get(key)
        if edit is None:
            records.append(base.metadata_record(key))
        elif isinstance(edit, SetKey):
            records.append(_encoded(base, edit))
    added = [edit for edit in edits if isinstance(edit, SetKey) and edit.key not in base.metadata]
    return records + [_encoded(base, edit) for edit in added]


def _encoded(base: GGUFFile, edit: SetKey) -> bytes:
    value_type, element_type = edit.value_type, edit.element_type
    if value_type is None:
        if edit.key not in base.metadata:
            raise InputError(
                f"The metadata key `{edit.key}` is new to this file, so its value needs a type."
            )
        value_type = base.metadata_type(edit.key)
        element_type = base.metadata_element_type(edit.key)
    return encode_metadata(edit.key, edit.value, value_type, element_type=element_type)
