"""Write a planned export tensor by tensor: one tensor in memory, the file takes its name only when complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ollatune.base.errors import InputError, VerificationError
from ollatune.base.faults import fault_point
from ollatune.base.files import write_json
from ollatune.base.log import get_logger
from ollatune.export.plan import ExportPlan, PlannedTensor
from ollatune.export.settle import settle_types
from ollatune.export.target_types import next_larger_type
from ollatune.export.weights import updated
from ollatune.gguf.codecs import quantize
from ollatune.gguf.decode import decode_tensor
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.recovery import (
    LARGEST_ACCEPTED_RECOVERY,
    SMALLEST_ACCEPTED_RECOVERY,
    is_accepted,
    measure_recovery,
)
from ollatune.gguf.types import GGMLType
from ollatune.gguf.writer import Chunk, TensorToWrite, write_gguf

REPORT_NAME = "export.json"

_COPY_CHUNK_BYTES = 8 << 20
_log = get_logger("export")


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of one tensor. `recovery` is None for tensors without an update, or with one of all zeros."""

    planned: PlannedTensor
    recovery: float | None

    @property
    def name(self) -> str:
        return self.planned.name

    def to_json(self) -> dict[str, Any]:
        return {**self.planned.to_json(), "recovery": self.recovery}


@dataclass(frozen=True)
class ExportResult:
    """A written export. `sha256` is that of the whole file."""

    path: Path
    sha256: str
    size_bytes: int
    tensors: list[TensorResult]
    base: Path
    tensor_type: str
    edited_keys: tuple[str, ...]
    accept_recovery: bool

    @property
    def smallest_recovery(self) -> float | None:
        return min((t.recovery for t in self.tensors if t.recovery is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """The content of `export.json`."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "base": str(self.base),
            "tensor_type": self.tensor_type,
            "edited_keys": list(self.edited_keys),
            "smallest_recovery": self.smallest_recovery,
            "accepted_recovery": [SMALLEST_ACCEPTED_RECOVERY, LARGEST_ACCEPTED_RECOVERY],
            "accept_recovery": self.accept_recovery,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def apply_export(
    plan: ExportPlan,
    output: Path,
    *,
    accept_recovery: bool = False,
    on_tensor: Callable[[TensorResult], None] | None = None,
) -> ExportResult:
    """Write the planned GGUF to `output`, and `export.json` beside it. `on_tensor` hears of each tensor's end.

    The types of an `auto` plan are settled first (`settle.settle_types`).

    Raises:
        VerificationError: an update would not survive (`accept_recovery` writes it all the same).
        DivergedError: an update holds NaN or infinity.
        InputError: `output` is the base itself, or a weight is too large for its type.
        StorageError: disk full, no permission.
    In every one of these cases `output` is as it was before.
    """
    _refuse_to_replace_the_base(plan.base, output)
    if not plan.is_settled:
        plan = settle_types(plan)
    results: list[TensorResult] = []
    export: ExportResult | None = None

    def finished(result: TensorResult) -> None:
        results.append(result)
        if on_tensor is not None:
            on_tensor(result)

    def check_and_report(digest: str, size_bytes: int) -> None:
        nonlocal export
        _check_recovery(results, accept_recovery)
        export = ExportResult(
            path=output,
            sha256=digest,
            size_bytes=size_bytes,
            tensors=results,
            base=plan.base.path,
            tensor_type=plan.tensor_type,
            edited_keys=plan.edited_keys,
            accept_recovery=accept_recovery,
        )
        # Before the model has its name: a model.gguf of ours is never without the report that says whose it is.
        write_json(output.with_name(REPORT_NAME), export.to_json())

    write_gguf(
        output,
        plan.records,
        [_to_write(plan.base, planned, finished) for planned in plan.tensors],
        alignment=plan.base.alignment,
        before_commit=check_and_report,
    )
    assert export is not None
    return export


def _refuse_to_replace_the_base(base: GGUFFile, output: Path) -> None:
    if output.exists() and any(output.samefile(path) for path in base.paths):
        raise InputError(
            f"{output} is the base model itself; an export does not replace it.",
            hint="Choose another output folder.",
        )


def _to_write(
    base: GGUFFile, planned: PlannedTensor, finished: Callable[[TensorResult], None]
) -> TensorToWrite:
    def produce() -> Iterator[Chunk]:
        fault_point("export.tensor")
        recovery: float | None = None
        if planned.action == "copy":
            stored = base.tensor_data(planned.name)
            for start in range(0, stored.size, _COPY_CHUNK_BYTES):
                yield stored[start : start + _COPY_CHUNK_BYTES]
        else:
            stored_u8, recovery = _store_anew(base, planned)
            yield stored_u8.reshape(-1).numpy()
        base.release_pages(planned.name)
        finished(TensorResult(planned, recovery))

    return TensorToWrite(planned.name, planned.base.shape, planned.type, produce)


def _store_anew(base: GGUFFile, planned: PlannedTensor) -> tuple[Tensor, float | None]:
    """The bytes of a tensor that is not copied, uint8 [..., row bytes], and the recovery of its update."""
    weights = decode_tensor(base, planned.name)
    if planned.update is None:
        return quantize(weights, planned.type), None
    tuned = updated(weights, planned.update)
    stored_u8 = quantize(tuned, planned.type)
    return stored_u8, measure_recovery(weights, tuned, stored_u8, planned.type)


def _check_recovery(results: Sequence[TensorResult], accept_recovery: bool) -> None:
    lost = [r for r in results if r.recovery is not None and not is_accepted(r.recovery)]
    if not lost:
        return
    worst = max(lost, key=lambda result: abs((result.recovery or 0.0) - 1.0))
    message = (
        f"`{worst.name}` stored as {worst.planned.type.name} would hold {worst.recovery:.2f} times its update; "
        f"{SMALLEST_ACCEPTED_RECOVERY} to {LARGEST_ACCEPTED_RECOVERY} is expected"
        + (f" ({len(lost)} tensors are outside)." if len(lost) > 1 else ".")
    )
    if accept_recovery:
        _log.warning("%s Written all the same, as asked.", message)
        return
    hint = _larger_type_hint(worst.planned.type)
    raise VerificationError(f"{message} Nothing was written.", hint=hint)


def _larger_type_hint(stored: GGMLType) -> str:
    larger = next_larger_type(stored)
    if larger is None:
        return "Accept the difference with --accept-recovery."
    return f"Store the tuned tensors as {larger.name.lower()}, or accept the difference with --accept-recovery."
