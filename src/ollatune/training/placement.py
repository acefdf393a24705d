"""Whether the base is held packed or dense, from the configuration and the memory there is."""

from __future__ import annotations

import math

import psutil
import torch

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.config.schema import Config
from ollatune.gguf.inspect import file_type_name
from ollatune.modeling.opened import OpenBase

_DENSE_SHARE = 0.5
"""Dense weights are comfortable up to this share of the free memory: the rest is for activations and the system."""
_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for this process now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def dense_bytes(base: OpenBase, dtype: str) -> int:
    """Size of all weights decoded."""
    return sum(math.prod(info.shape) for info in base.gguf.tensors.values()) * _DTYPE_BYTES[dtype]


def choose_mode(config: Config, base: OpenBase, dtype: str, device: torch.device) -> str:
    """`packed` or `dense`, with the reason logged. Raises UsageError for a quantisation nobody knows."""
    setting = (config.model.quantization or "none").lower()
    logger = get_logger("training")
    if setting == "none":
        return "dense"
    if setting == "nf4":
        raise UsageError(
            "model.quantization: nf4 is not available in this version.",
            hint="Use as-served: it trains on the 4-bit weights that Ollama serves.",
        )
    dense, free = dense_bytes(base, dtype), free_memory_bytes(device)
    if setting == "auto":
        if not config.advanced.lora_enabled:
            return "dense"
        mode = "dense" if dense <= _DENSE_SHARE * free else "packed"
        logger.info(
            "Base weights %s: dense they take %s in %s, %s are free.",
            mode, format_bytes(dense), dtype, format_bytes(free),
        )  # fmt: skip
        return mode
    if setting == "as-served":
        return "packed"
    return _served_in(setting, base)


def _served_in(setting: str, base: OpenBase) -> str:
    if not setting.startswith(("q", "iq", "f16", "f32", "bf16")):
        raise UsageError(
            f"model.quantization: `{setting}` is not known.",
            hint="Use auto, as-served, none, nf4, or a GGUF type such as q4_K_M.",
        )
    found = file_type_name(base.gguf.metadata.get("general.file_type")) or "an unknown type"
    if setting != found.lower():
        get_logger("training").info(
            "model.quantization is %s; %s is served in %s and trained as it is.",
            setting, base.source.name, found,
        )  # fmt: skip
    return "packed" if setting.startswith(("q", "iq")) else "dense"
