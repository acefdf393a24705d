"""Whether the base is held packed or dense, from the configuration and the memory there is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil
import torch

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.config.schema import Config
from ollatune.gguf.inspect import file_type_name
from ollatune.gguf.reader import GGUFFile
from ollatune.modeling.fast.native import kernels
from ollatune.modeling.fast.native.weights import DECODED, sizes_fit
from ollatune.modeling.load import Mode
from ollatune.modeling.memory import DTYPE_BYTES
from ollatune.modeling.nf4 import require_bitsandbytes
from ollatune.modeling.opened import OpenBase

_DENSE_SHARE = 0.5
"""Dense weights are comfortable up to this share of the free memory: the rest is for activations and the system."""


@dataclass(frozen=True)
class Placement:
    """Where and in which number type the model computes; `mode` as in `modeling.load`."""

    device: torch.device
    dtype: str
    mode: Mode


def free_memory_bytes(device: torch.device) -> int:
    """Memory free for this process now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def dense_bytes(base: OpenBase, dtype: str) -> int:
    """Size of all weights decoded."""
    return sum(math.prod(info.shape) for info in base.gguf.tensors.values()) * DTYPE_BYTES[dtype]


def choose_mode(config: Config, base: OpenBase, dtype: str, device: torch.device) -> Mode:
    """`packed`, `dense` or `nf4`, with the reason logged. Raises UsageError for a quantisation nobody knows."""
    setting = (config.model.quantization or "none").lower()
    if setting == "none":
        return "dense"
    if setting == "nf4":
        require_bitsandbytes(
            "model.quantization: nf4", "as-served, which trains on the blocks that Ollama serves"
        )
        get_logger("training").info(
            "Base weights re-quantised to NF4. The adapter learns on these and is merged into the served ones; "
            "as-served trains on the served ones themselves."
        )
        return "nf4"
    if setting == "auto":
        if not config.advanced.lora_enabled:
            return "dense"
        if not config.training.torch_compile and computes_on_blocks(
            config, base.gguf, dtype, device
        ):
            get_logger("training").info(
                "Base weights packed: the compiled kernels read them as they lie."
            )
            return "packed"
        return comfortable_mode(base, dtype, device, "Base")
    if setting == "as-served":
        return "packed"
    return _served_in(setting, base)


def kernels_compute(config: Config, dtype: str, device: torch.device) -> bool:
    """Whether the compiled kernels are used where they fit."""
    is_fit = device.type == "cpu" and dtype == "bf16" and config.training.native_kernels
    return is_fit and kernels.available()


def computes_on_blocks(config: Config, gguf: GGUFFile, dtype: str, device: torch.device) -> bool:
    """Whether packed weights cost nothing: the compiled kernels take every matrix of the file in blocks.

    They give the same bits as on decoded weights, as fast, in less memory.
    """
    blocks = [info for info in gguf.tensors.values() if info.type.is_quantized]
    return (
        bool(blocks)
        and kernels_compute(config, dtype, device)
        and all(
            info.type in DECODED and len(info.shape) == 2 and sizes_fit(*info.shape)
            for info in blocks
        )
    )


def comfortable_mode(base: OpenBase, dtype: str, device: torch.device, what: str) -> Mode:
    """`dense` where the decoded weights leave half of the free memory to others, else `packed`; logged."""
    dense, free = dense_bytes(base, dtype), free_memory_bytes(device)
    mode: Mode = "dense" if dense <= _DENSE_SHARE * free else "packed"
    get_logger("training").info(
        "%s weights %s: dense they take %s in %s, %s are free.",
        what, mode, format_bytes(dense), dtype, format_bytes(free),
    )  # fmt: skip
    return mode


def checking_mode(config: Config, base: OpenBase, *, num_models: int) -> Mode:
    """How `num_models` at once of a base are held to compute in fp32: dense where that leaves half of the memory free.

    However an adapter's base was held in training: packed weights give the same numbers, and take longer in fp32.
    """
    if not config.advanced.lora_enabled:
        return "dense"
    dense = num_models * dense_bytes(base, "fp32")
    is_small = dense <= _DENSE_SHARE * free_memory_bytes(torch.device("cpu"))
    return "dense" if is_small else "packed"


def _served_in(setting: str, base: OpenBase) -> Mode:
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
