"""Several processes on one optimiser batch: who computes what, exact sums over all of them, one error for all.

Gradients are summed, not averaged: the loss is already divided by the number of targets over all processes, so 1, 2
and 4 processes give the same update.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ollatune.base.errors import (
    DivergedError,
    EndedElsewhereError,
    Interrupted,
    OllatuneError,
    OutOfMemoryError,
    StorageError,
    UsageError,
)

_AGREED = (DivergedError, Interrupted, OutOfMemoryError)
"""Errors that all processes raise together: it does not matter which of them speaks."""


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
"""What torch says when a partner is gone."""


_STORE_SECONDS = 60


class Processes:
    """The processes of this run. With one process everything here is free of communication."""

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        device: torch.device | None = None,
        store: Any = None,
    ) -> None:
        self.rank = rank
        self.count = count
        self.device = device or torch.device("cpu")
        self._store = store
        self._ended: Exception | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: int) -> int:
        """Sum of an integer over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def max(self, value: int) -> int:
        """Largest of an integer over all processes."""
        return self._extreme(value, dist.ReduceOp.MAX)

    def min(self, value: int) -> int:
        """Smallest of an integer over all processes."""
        return self._extreme(value, dist.ReduceOp.MIN)

    def _extreme(self, value: int, operation: dist.ReduceOp.RedOpType) -> int:
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return int(tensor)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.count == 1 else self.sum(int(flag)) > 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over all processes; a process without samples in this step adds zeros."""
        if self.count == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def share(self, value: Any) -> Any:
        """The main process's `value` (what JSON can hold) on every process; the others' is not looked at."""
        return value if self.count == 1 else self.gather(value if self.is_main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process gives (what JSON can hold), in their order, on every process."""
        if self.count == 1:
            return [value]
        content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(content)], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return [
            json.loads(bytes(part[: int(size)].tolist()))
            for part, size in zip(parts, sizes, strict=True)
        ]

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def ended_by(self, error: Exception) -> Exception:
        """What this process raises for `error`: the error itself, or a silent one where another process failed first.

        The first failure is put where all processes see it. The others then fail for want of a partner, and say
        nothing: there is one message, whichever process it comes from.
        """
        if self.count == 1 or self._store is None or error is self._ended:
            return error
        if isinstance(error, EndedElsewhereError):
            return error
        if isinstance(error, Interrupted) and not self.is_main:
            # All stop at the same step: the first process says so.
            self._ended = EndedElsewhereError(error.message, exit_code=error.exit_code)
            return self._ended
        known = error if isinstance(error, OllatuneError) else _own_error(error)
        self._ended = self._first_error(known)
        return self._ended

    def _first_error(self, error: Exception) -> Exception:
        code = error.exit_code if isinstance(error, OllatuneError) else 1
        mine = json.dumps({"rank": self.rank, "code": code, "message": str(error)})
        key = f"ollatune/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            first = json.loads(self._store.compare_set(key, "", mine))
        except (RuntimeError, ValueError):  # the store is gone, and the process that held it
            if isinstance(error, OllatuneError):
                return error
            return EndedElsewhereError("The first process ended.", exit_code=1)
        if first["rank"] != self.rank:
            return EndedElsewhereError(
                f"Process {first['rank']}: {first['message']}", exit_code=first["code"]
            )
        if self.rank and isinstance(error, OllatuneError) and not isinstance(error, _AGREED):
            error.message = f"Process {self.rank}: {error.message}"
        return error


def _own_error(error: Exception) -> Exception:
    """What a user is told where the operating system or the connection to another process failed."""
    text = str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return StorageError(f"The operating system refused: {error.strerror or text}{where}.")
    if "timed out" in text.lower():
        return OllatuneError(
            "Waiting for another process of this run took longer than distributed.timeout_seconds.",
            hint="It hangs, or its machine is gone. Go on with --resume auto.",
        )
    if isinstance(error, RuntimeError) and any(word in text for word in _LOST):
        return OllatuneError(
            "The connection to another process of this run was lost: that one was killed, most likely because memory "
            "ran out, or its machine is gone.",
            hint="Go on with --resume auto.",
        )
    return error


def connect_processes(device: torch.device, *, timeout_seconds: int) -> Processes:
    """Join the processes that torchrun or `accelerate launch` started. Raises UsageError where none did."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "--distributed was given, but this process was not started by torchrun.",
            hint="For example: torchrun --nproc_per_node=2 src/models/train.py --config FILE --distributed",
        )
    from accelerate import PartialState

    timeout = timedelta(seconds=timeout_seconds)
    state = PartialState(cpu=device.type == "cpu", timeout=timeout)
    store = None
    if state.num_processes > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Asked only when a process ends: whoever holds it may be gone, and nobody should wait long for that.
        patience = min(timeout, timedelta(seconds=_STORE_SECONDS))
        store = cast(Any, dist).TCPStore(address, port, is_master=False, timeout=patience)
    return Processes(state.process_index, state.num_processes, device, store)


def disconnect_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
