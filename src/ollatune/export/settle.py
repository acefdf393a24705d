"""Let each tuned tensor of an `auto` plan take the smallest type that keeps its update, by measurement.

A base of 8 bits swallows small updates that go back onto its own grid, just as one of 4 bits does, so no single type
suits every base. Costs one more pass over the tuned tensors; nothing is written.
"""

from __future__ import annotations

from dataclasses import replace

from ollatune.export.plan import ExportPlan, PlannedTensor
from ollatune.export.target_types import fitting_type, next_larger_type
from ollatune.export.weights import updated
from ollatune.gguf.codecs import quantize
from ollatune.gguf.decode import decode_tensor
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.recovery import is_accepted, measure_recovery


def settle_types(plan: ExportPlan) -> ExportPlan:
    """`plan` with the types of tuned tensors grown until each recovery is accepted, or the largest type reached."""
    tensors = tuple(
        _settled(plan.base, tensor) if tensor.action == "update" else tensor
        for tensor in plan.tensors
    )
    return replace(plan, tensors=tensors, is_settled=True)


def _settled(base: GGUFFile, planned: PlannedTensor) -> PlannedTensor:
    assert planned.update is not None
    weights = decode_tensor(base, planned.name)
    tuned = updated(weights, planned.update)
    base.release_pages(planned.name)
    chosen = planned
    while True:
        recovery = measure_recovery(weights, tuned, quantize(tuned, chosen.type), chosen.type)
        larger = next_larger_type(chosen.type)
        if recovery is None or is_accepted(recovery) or larger is None:
            return chosen
        note = f"{planned.type.name} would store {recovery:.2f} of the update"
        if chosen is not planned:
            note = chosen.note
        chosen = replace(planned, type=fitting_type(planned.base, larger).type, note=note)
