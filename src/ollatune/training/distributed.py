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
    UsageError,
)

_AGREED = (DivergedError, Interrupted, OutOfMemoryError)
"""Errors that all processes raise together: it does not matter which of them speaks."""


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

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def ended_by(self, error: Exception) -> Exception:
        """What this process raises for `error`: the error itself, or a silent one where another process failed first.

        The first failure is put where all processes see it. The others then fail for want of a partner, and say
        nothing: there is one message, whichever process it comes from.
        """
        if self.count == 1 or self._store is None or isinstance(error, EndedElsewhereError):
            return error
        code = error.exit_code if isinstance(error, OllatuneError) else 1
        mine = json.dumps({"rank": self.rank, "code": code, "message": str(error)})
        key = f"ollatune/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            first = json.loads(self._store.compare_set(key, "", mine))
        except (
            RuntimeError,
            ValueError,
        ):  # the store is gone, and with it the process that held it
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


def require_backend(name: str) -> None:
    """Raise UsageError for a way of sharing the work that this version does not have."""
    if name != "ddp":
        raise UsageError(
            f"distributed.backend: {name} is not available in this version.",
            hint="Use ddp. If the weights do not fit one device, keep them packed: model.quantization: as-served.",
        )


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
        store = cast(Any, dist).TCPStore(address, port, is_master=False, timeout=timeout)
    return Processes(state.process_index, state.num_processes, device, store)


def disconnect_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
