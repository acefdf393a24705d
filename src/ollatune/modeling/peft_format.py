"""Adapters in PEFT's file format: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ollatune.base.files import make_folder, write_bytes, write_json
from ollatune.modeling.lora import LoRASettings

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."


def save_adapter(
    folder: Path, state: dict[str, Tensor], settings: LoRASettings, *, base_name: str
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads. Raises StorageError.

    Args:
        state: tensors by the names of `modeling.lora.adapter_state`.
        base_name: goes into `base_model_name_or_path`.
    """
    from safetensors.torch import save

    make_folder(folder)
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in sorted(state.items())}
    write_bytes(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_NAME, peft_config(state, settings, base_name))


def peft_config(state: dict[str, Tensor], settings: LoRASettings, base_name: str) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that describe this adapter."""
    modules = sorted({name.split(".lora_")[0] for name in state})
    alpha = settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        # A JSON integer where it can be: some readers of this file accept nothing else.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": modules,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
