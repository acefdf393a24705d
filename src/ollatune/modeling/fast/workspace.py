"""Memory of a step that is used again by every step: what is kept from forward to backward, and large intermediates.

The allocator would put small tensors that live long into the gaps that large ones leave, and find other places for the
next large ones: the gaps come to a third of what is kept. Here what is kept stands one after another, and each
intermediate has its place.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
_active = threading.local()

LOGITS = GATE_UP_GRADIENTS = "logits, or gradients of gate and up"
"""Names of the two largest intermediates, which no moment has both of: one place."""


def kept_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU for what is kept: of the workspace in use on this thread, if there is one."""
    lease: _Lease | None = getattr(_active, "lease", None)
    found = None if lease is None else lease.take(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype) if found is None else found


def scratch_empty(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, valid until this thread asks for the same `name` again."""
    size = math.prod(shape) * dtype.itemsize
    scratch: dict[str, Tensor] = _active.__dict__.setdefault("scratch", {})
    if name not in scratch or scratch[name].numel() < size:
        scratch.pop(name, None)  # before there is another
        scratch[name] = torch.empty(size, dtype=torch.uint8)
    return scratch[name][:size].view(dtype).view(tuple(shape))


def maybe_scratch(name: str | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`scratch_empty`, or memory of its own without a name."""
    if name is None:
        return torch.empty(tuple(shape), dtype=dtype)
    return scratch_empty(name, shape, dtype)


def kept_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What `kept_empty` takes of a workspace."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class _Lease:
    """One forward pass's part of the memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        count, first = math.prod(shape), self.used
        size = kept_bytes(shape, dtype)
        if count == 0 or first + size > self.array.nbytes:
            return None
        self.used += size
        # Not a view of a tensor of all the memory: what is written to one would count as a change to all of them.
        tensor = torch.frombuffer(self.array, dtype=dtype, count=count, offset=first)
        return tensor.resize_(tuple(shape))


class Workspace:
    """Lends its memory to one forward pass at a time, until the last tensor in it is gone.

    A pass that begins earlier than that gets new memory, and the old is given back with its tensors. Pages that were
    never written to are not resident, so asking for more than is needed costs nothing.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._in_use: weakref.ref[np.ndarray] | None = None

    @contextmanager
    def lend(self, num_bytes: int) -> Iterator[None]:
        """Inside the block, `kept_empty` on this thread takes from `num_bytes` of this memory."""
        is_lent = self._in_use is not None and self._in_use() is not None
        if self._memory is None or is_lent or len(self._memory) < num_bytes:
            self._memory = None  # before there is another
            self._memory = _reserve(num_bytes)
        # Each tensor in it holds this array, saved for a backward pass or not.
        array = np.frombuffer(self._memory, np.uint8, num_bytes)
        self._in_use = weakref.ref(array)
        _active.lease = _Lease(array)
        del array
        try:
            yield
        finally:
            _active.lease = None


def _reserve(num_bytes: int) -> mmap.mmap:
    """At least `num_bytes`, with room for somewhat longer rows, in huge pages where there are any.

    Raises MemoryError.
    """
    size = max(mmap.PAGESIZE, num_bytes + num_bytes // 4)
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    try:
        memory = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"{size} bytes for activations: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
