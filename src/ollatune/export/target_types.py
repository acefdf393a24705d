"""Which type each tensor of an export is stored as.

Tuned tensors take the type asked for, with three exceptions: vectors and norms keep their floating-point type; a
tensor whose base is stored at 8 bits or more is not made coarser; rows that are no whole number of blocks take
llama.cpp's fall-back type. Untouched tensors keep their bytes.

A mix for the whole file (`q4_K_M`, …) gives every tensor the type that llama.cpp's quantiser would; untouched tensors
that are no larger than that keep their bytes, because storing them anew could only lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ollatune.base.errors import UsageError
from ollatune.base.text import did_you_mean
from ollatune.export.metadata_edits import MetadataEdit, SetKey
from ollatune.gguf.codecs import ENCODABLE
from ollatune.gguf.mixes import (
    FALLBACK_TYPES,
    MIXES,
    Mix,
    ModelTraits,
    mix_named,
    tensor_type_for,
)
from ollatune.gguf.reader import GGUFFile, TensorInfo
from ollatune.gguf.types import GGMLType, ValueType

TENSOR_TYPES = ("q8_0", "q6_K", "f16", "bf16", "f32")
"""The types that keep an update whatever the base; any type that can be encoded is taken."""
AUTO_TYPE = "auto"
"""In place of a type: the first of TENSOR_TYPES, and a larger one where measurement says so."""
BASE_TYPE = "base"
"""In place of a type: every tuned tensor keeps the type it has."""

WHOLE_FILE_PREFIX = "all_"
"""`all_q8_0` is the whole file as q8_0, where `q8_0` is the tuned tensors only."""
WHOLE_FILE_TYPES = tuple(
    f"{WHOLE_FILE_PREFIX}{mix.name}" if mix.name == mix.type.name.replace("Q", "q", 1) else mix.name
    for mix in MIXES.values()
)

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
_FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_FINE_BITS_PER_WEIGHT = 8.0
_FINER_TYPES = (GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16, GGMLType.F32)


@dataclass(frozen=True, slots=True)
class TypeChoice:
    type: GGMLType
    note: str = ""


@dataclass(frozen=True, slots=True)
class TypeChoices:
    """The type of every tensor by name, and the metadata that must follow."""

    by_name: Mapping[str, TypeChoice]
    metadata_edits: tuple[MetadataEdit, ...] = ()


def choose_types(base: GGUFFile, tuned: frozenset[str], tensor_type: str) -> TypeChoices:
    """The type of every tensor of `base`, of which those named in `tuned` are written anew.

    Raises UsageError where `tensor_type` names no type that can be written.
    """
    mix = _whole_file_mix(tensor_type)
    if mix is not None:
        return _choose_by_mix(base, tuned, mix)
    requested = _requested_type(tensor_type)
    return TypeChoices(
        {
            name: tuned_type(info, requested) if name in tuned else TypeChoice(info.type)
            for name, info in base.tensors.items()
        }
    )


def _whole_file_mix(name: str) -> Mix | None:
    folded = {known.casefold(): known for known in WHOLE_FILE_TYPES}
    found = folded.get(name.casefold())
    return None if found is None else mix_named(found.removeprefix(WHOLE_FILE_PREFIX))


def _choose_by_mix(base: GGUFFile, tuned: frozenset[str], mix: Mix) -> TypeChoices:
    traits = _traits(base)
    choices: dict[str, TypeChoice] = {}
    for name, info in base.tensors.items():
        wanted = tensor_type_for(mix, name, info.shape, traits)
        if name in tuned:
            choices[name] = tuned_type(info, None) if wanted is None else TypeChoice(wanted)
        elif wanted is None or info.type.bits_per_weight <= wanted.bits_per_weight:
            choices[name] = TypeChoice(info.type)
        else:
            choices[name] = TypeChoice(wanted)
    edits = [SetKey("general.file_type", mix.file_type, ValueType.UINT32)]
    if "general.quantization_version" not in base.metadata:
        version = SetKey("general.quantization_version", _QUANTIZATION_VERSION, ValueType.UINT32)
        edits.append(version)
    return TypeChoices(choices, tuple(edits))


def _traits(base: GGUFFile) -> ModelTraits:
    def number(key: str) -> int:
        value = base.metadata.get(f"{base.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    num_layers = number("block_count")
    shares_heads = number("attention.head_count") != number("attention.head_count_kv")
    return ModelTraits(
        num_layers=num_layers,
        num_experts=number("expert_count"),
        is_tied="output.weight" not in base.tensors,
        is_grouped_70b=num_layers == 80 and shares_heads,
    )


def _requested_type(name: str) -> GGMLType | None:
    """The type called `name`; None for `base`."""
    if name.casefold() == BASE_TYPE:
        return None
    if name.casefold() == AUTO_TYPE:
        name = TENSOR_TYPES[0]
    by_name = {known.name.casefold(): known for known in sorted(ENCODABLE)}
    found = by_name.get(name.casefold())
    if found is None:
        choices = [AUTO_TYPE, *TENSOR_TYPES, BASE_TYPE]
        raise UsageError(
            f"Tensors cannot be stored as {name!r}.{did_you_mean(name, [*by_name, *choices, *WHOLE_FILE_TYPES])}",
            hint=f"Choose one of {', '.join(choices)}; or for the whole file {', '.join(WHOLE_FILE_TYPES)}.",
        )
    return found


def tuned_type(info: TensorInfo, requested: GGMLType | None) -> TypeChoice:
    """The type of one tuned tensor; `requested` None keeps the base's."""
    if is_kept_float(info):
        kept = info.type if info.type in _FLOAT_TYPES else GGMLType.F32
        return TypeChoice(kept, "" if kept is requested else "vectors stay floating point")
    if requested is None:
        return fitting_type(info, info.type if info.type in ENCODABLE else GGMLType.Q8_0)
    is_fine = info.type.bits_per_weight >= _FINE_BITS_PER_WEIGHT and info.type in ENCODABLE
    if is_fine and requested.bits_per_weight < info.type.bits_per_weight:
        return TypeChoice(info.type, "not made coarser than the base")
    return fitting_type(info, requested)


def is_kept_float(info: TensorInfo) -> bool:
    """Vectors (norms, biases, rope factors) and stacked norms are read as floating point by llama.cpp."""
    return len(info.shape) < 2 or info.name.endswith("_norm.weight")


def fitting_type(info: TensorInfo, requested: GGMLType) -> TypeChoice:
    """`requested`, or the first fall-back whose blocks divide the rows of `info`."""
    columns = info.shape[-1] if info.shape else 1
    chosen = requested
    while columns % chosen.block_size:
        chosen = FALLBACK_TYPES.get(chosen, GGMLType.F16)
    note = "" if chosen is requested else f"{columns} columns do not fit {requested.name}"
    return TypeChoice(chosen, note)


def next_larger_type(stored: GGMLType) -> GGMLType | None:
    """The next finer type to store a tuned tensor in; None above all of them.

    bf16 is followed by f16: as large, and finer for every weight that it can hold.
    """
    if stored is GGMLType.BF16:
        return GGMLType.F16
    finer = [kind for kind in _FINER_TYPES if kind.bits_per_weight > stored.bits_per_weight]
    return finer[0] if finer else None
