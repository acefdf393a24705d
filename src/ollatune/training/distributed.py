"""Several processes on one optimiser batch: who computes what, and exact sums over all of them.

Gradients are summed, not averaged: the loss is already divided by the number of targets over all processes, so 1, 2
and 4 processes give the same update.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ollatune.base.errors import UsageError


class Processes:
    """The processes of this run. With one process everything here is free of communication."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.count = count
        self.device = device or torch.device("cpu")

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


def connect_processes(device: torch.device, *, timeout_seconds: int) -> Processes:
    """Join the processes that torchrun or `accelerate launch` started. Raises UsageError where none did."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "--distributed was given, but this process was not started by torchrun.",
            hint="For example: torchrun --nproc_per_node=2 src/models/train.py --config FILE --distributed",
        )
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(seconds=timeout_seconds))
    return Processes(state.process_index, state.num_processes, device)


def disconnect_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
