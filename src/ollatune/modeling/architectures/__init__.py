"""The model architectures that can be trained: GGUF metadata and tensors to Transformers and back, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ollatune.base.errors import InputError
from ollatune.modeling.architectures.base import Architecture, ReadTensor
from ollatune.modeling.architectures.gemma import Gemma2, Gemma3
from ollatune.modeling.architectures.hyperparameters import Hyperparameters, TensorShape
from ollatune.modeling.architectures.llama import Llama, Mixtral, llama_or_mixtral
from ollatune.modeling.architectures.phi3 import Phi3
from ollatune.modeling.architectures.qwen import Qwen2, Qwen3
from ollatune.modeling.architectures.rules import TensorRule

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Architecture",
    "Hyperparameters",
    "ReadTensor",
    "TensorRule",
    "architecture_of",
]

ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], Mapping[str, TensorShape]], Architecture]] = {
    "llama": llama_or_mixtral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma2": Gemma2,
    "gemma3": Gemma3,
    "phi3": Phi3,
}
"""By `general.architecture`."""

FAMILIES: dict[str, str] = {
    kind.families: kind.name for kind in (Llama, Mixtral, Qwen2, Qwen3, Gemma2, Gemma3, Phi3)
}
"""The families a user would name, and the architecture of their files."""


def architecture_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorShape]
) -> Architecture:
    """The architecture of a file, bound to its sizes. Raises InputError where it is unknown or its sizes do not fit."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        found = f"architecture `{name}`" if isinstance(name, str) else "no `general.architecture`"
        raise InputError(
            f"The model file has {found}, which cannot be trained here.",
            hint=f"Architectures that can: {', '.join(ARCHITECTURES)}.",
        )
    return ARCHITECTURES[name](metadata, tensors)
