"""What running out of memory looks like, and what can be done about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ollatune.base.errors import OllatuneError, OutOfMemoryError

OUT_OF_MEMORY_HINT = (
    "Use a smaller model, `--set model.quantization=as-served`, a shorter model.context_window, or "
    "training.activation_checkpointing."
)
UPDATE_HINT = (
    "The optimiser's moments do not fit: train an adapter (advanced.lora_enabled) of a lower rank, use "
    "training.optimizer: sgd or adafactor, or a smaller model."
)
VALIDATION_HINT = (
    "Lower validation.batch_size (or samples and max_new_tokens there), then --resume auto."
)
_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: torch reports it on a CPU as a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(known in text for known in _TEXTS)


@contextlib.contextmanager
def out_of_memory_ends(where: str, hint: str) -> Iterator[None]:
    """Turn memory that runs out in the block into an OutOfMemoryError that says `where`."""
    try:
        yield
    except OllatuneError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"Out of memory {where}.", hint=hint) from error
