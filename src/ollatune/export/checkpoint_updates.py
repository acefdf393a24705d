"""What a checkpoint changes in its base, named and ordered as in the GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.modeling.architectures import Architecture
from ollatune.modeling.architectures.updates import (
    LoraFactors,
    TunedTensor,
    export_updates,
    lora_in_gguf_order,
)
from ollatune.modeling.lora import LoRASettings
from ollatune.modeling.trained import lora_settings


def has_lora(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds an adapter (otherwise: whole weights)."""
    return any(name.endswith(".lora_A.weight") for name in checkpoint.model_state_dict)


def lora_factors(state: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, LoraFactors]:
    """A [r, in], B [out, r] and scale by module name, from a checkpoint's adapter tensors."""
    scale = settings.alpha / (settings.rank**0.5 if settings.use_rslora else settings.rank)
    modules = [
        name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")
    ]
    return {
        module: (state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"], scale)
        for module in modules
    }


def tensor_updates(
    architecture: Architecture, checkpoint: Checkpoint, config: Config
) -> list[TunedTensor]:
    """What the checkpoint changes, named and ordered as in the GGUF file. Raises InputError where it does not fit."""
    state = checkpoint.model_state_dict
    if not has_lora(checkpoint):
        return export_updates(architecture, parameters=state)
    settings = lora_settings(config)
    factors = lora_factors(state, settings)
    updates = export_updates(architecture, lora=factors)
    if not settings.use_dora:
        return updates
    # The magnitude of a row goes where the row goes: it is carried through the same mapping as a B of rank one.
    magnitudes = lora_in_gguf_order(
        architecture,
        {
            module: (
                torch.ones(1, a.shape[1]),
                state[f"{module}.lora_magnitude_vector"][:, None],
                1.0,
            )
            for module, (a, _, _) in factors.items()
        },
    )
    return [_with_magnitude(update, magnitudes[update.name][1][:, 0]) for update in updates]


def _with_magnitude(update: TunedTensor, magnitude_O: Tensor) -> TunedTensor:
    def apply(base_OI: Tensor) -> Tensor:
        merged_OI: Tensor = update.apply(base_OI)
        gain_O: Tensor = magnitude_O / merged_OI.norm(dim=1).clamp_min(1e-12)
        return merged_OI * gain_O[:, None]

    return replace(update, apply=apply)
