"""What an export will write, decided from names, shapes and types alone: no weight is read.

plan (here) → check (here: every problem of the updates is collected, then raised at once) → `apply.apply_export`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.base.text import did_you_mean, format_bytes, printable
from ollatune.export.metadata_edits import MetadataEdit, edited_records
from ollatune.export.target_types import AUTO_TYPE, TypeChoice, choose_types
from ollatune.gguf.codecs import DECODABLE
from ollatune.gguf.reader import GGUFFile, TensorInfo
from ollatune.gguf.types import GGMLType

Action = Literal["copy", "update", "requantize"]


class TensorUpdate(Protocol):
    """The tuned values of one GGUF tensor, rows in the file's order; `modeling.architectures.updates` makes them.

    `apply` takes the base's values decoded to float32 in `shape` and returns the tuned ones, float32, same shape;
    it leaves its argument as it was.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...

    @property
    def apply(self) -> Callable[[Tensor], Tensor]: ...


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file to be: where its bytes come from and how they are stored."""

    base: TensorInfo
    type: GGMLType
    action: Action
    update: TensorUpdate | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def size_bytes(self) -> int:
        columns = self.base.shape[-1] if self.base.shape else 1
        return self.base.num_weights // columns * self.type.row_bytes(columns)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.base.shape),
            "action": self.action,
            "kind": self.update.kind if self.update else None,
            "type_before": self.base.type.name,
            "type_after": self.type.name,
            "size_bytes_before": self.base.size_bytes,
            "size_bytes": self.size_bytes,
            "note": self.note,
        }


@dataclass(frozen=True)
class ExportPlan:
    """A checked plan: every update belongs to one tensor, every shape and type fits."""

    base: GGUFFile
    tensor_type: str
    tensors: tuple[PlannedTensor, ...]
    records: tuple[bytes, ...]
    edited_keys: tuple[str, ...]
    is_settled: bool = True
    """False where the types of tuned tensors may still grow (`settle.settle_types`)."""

    @property
    def num_updates(self) -> int:
        return sum(tensor.action == "update" for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def size_bytes_before(self) -> int:
        return sum(tensor.base.size_bytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The plan as `--dry-run --json` prints it."""
        return {
            "base": str(self.base.path),
            "tensor_type": self.tensor_type,
            "num_updates": self.num_updates,
            "size_bytes_before": self.size_bytes_before,
            "size_bytes": self.size_bytes,
            "edited_keys": list(self.edited_keys),
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }

    def table(self) -> str:
        """The plan as `--dry-run` prints it: a line for every tensor that is not copied, then the sums."""
        changed = [tensor for tensor in self.tensors if tensor.action != "copy"]
        rows = [("tensor", "shape", "action", "type", "size")]
        rows += [_table_row(tensor) for tensor in changed]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        num_copied = len(self.tensors) - len(changed)
        lines.append(
            f"{self.num_updates} tensors updated, {len(changed) - self.num_updates} stored anew, "
            f"{num_copied} copied byte for byte; tensors take {format_bytes(self.size_bytes)} "
            f"({format_bytes(self.size_bytes_before)} before)."
        )
        if not self.is_settled:
            lines.append("A tensor whose update such a type would lose takes the next larger one.")
        if self.edited_keys:
            lines.append(f"Metadata changed: {', '.join(map(printable, self.edited_keys))}.")
        return "\n".join(line.rstrip() for line in lines)


def _table_row(tensor: PlannedTensor) -> tuple[str, str, str, str, str]:
    shape = "×".join(map(str, tensor.base.shape))
    kept = tensor.base.type is tensor.type
    types = tensor.type.name if kept else f"{tensor.base.type.name} → {tensor.type.name}"
    if tensor.note:
        types += f" ({tensor.note})"
    action = tensor.update.kind if tensor.update else tensor.action
    return printable(tensor.name), shape, action, types, format_bytes(tensor.size_bytes)


def plan_export(
    base: GGUFFile,
    updates: Sequence[TensorUpdate],
    *,
    tensor_type: str = "q8_0",
    metadata_edits: Sequence[MetadataEdit] = (),
) -> ExportPlan:
    """Decide what becomes of every tensor of `base`.

    `tensor_type` is the type of the tuned tensors (`target_types.TENSOR_TYPES`), or the name of a mix for the whole
    file (`target_types.WHOLE_FILE_TYPES`).

    Raises:
        UsageError: there is no such type.
        InputError: updates that the base has no tensor for, of another shape, or given twice; a base tensor that
            cannot be decoded; a metadata edit that cannot be made.
    """
    _check_updates(base, updates)
    by_name = {update.name: update for update in updates}
    choices = choose_types(base, frozenset(by_name), tensor_type)
    tensors = tuple(
        _planned(info, choices.by_name[name], by_name.get(name))
        for name, info in base.tensors.items()
    )
    _check_decodable(base, tensors)
    edits = [*choices.metadata_edits, *metadata_edits]
    return ExportPlan(
        base=base,
        tensor_type=tensor_type,
        tensors=tensors,
        records=tuple(edited_records(base, edits)),
        edited_keys=tuple(edit.key for edit in edits),
        is_settled=tensor_type.casefold() != AUTO_TYPE,
    )


def _planned(info: TensorInfo, choice: TypeChoice, update: TensorUpdate | None) -> PlannedTensor:
    if update is not None:
        return PlannedTensor(info, choice.type, "update", update, choice.note)
    if choice.type is not info.type:
        return PlannedTensor(info, choice.type, "requantize", None, choice.note)
    return PlannedTensor(info, info.type, "copy")


def _check_updates(base: GGUFFile, updates: Sequence[TensorUpdate]) -> None:
    problems: list[str] = []
    seen: set[str] = set()
    for update in updates:
        info = base.tensors.get(update.name)
        if info is None:
            problems.append(
                f"`{update.name}` is not in the base.{did_you_mean(update.name, base.tensors)}"
            )
        elif tuple(update.shape) != info.shape:
            problems.append(
                f"`{update.name}` has shape {tuple(update.shape)}, the base has {info.shape}."
            )
        if update.name in seen:
            problems.append(f"`{update.name}` is updated twice.")
        seen.add(update.name)
    _raise_collected(f"The updates do not fit {base.path}", problems)


def _check_decodable(base: GGUFFile, tensors: Sequence[PlannedTensor]) -> None:
    problems = [
        f"`{tensor.name}` is stored as {tensor.base.type.name}, which cannot be decoded."
        for tensor in tensors
        if tensor.action != "copy" and tensor.base.type not in DECODABLE
    ]
    _raise_collected(f"Not every tensor of {base.path} can be written anew", problems)


def _raise_collected(heading: str, problems: Sequence[str], *, shown: int = 5) -> None:
    if not problems:
        return
    rest = f" And {len(problems) - shown} more." if len(problems) > shown else ""
    raise InputError(
        f"{heading}: {' '.join(problems[:shown])}{rest}",
        hint="Nothing was written. Export with the base model that the run was trained on.",
    )
