"""What running out of memory looks like, and what can be done about it."""

from __future__ import annotations

import torch

OUT_OF_MEMORY_HINT = (
    "Use a smaller model, `--set model.quantization=as-served`, a shorter model.context_window, or "
    "training.activation_checkpointing."
)
_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: torch reports it on a CPU as a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(known in text for known in _TEXTS)
