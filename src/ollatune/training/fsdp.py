"""`distributed.backend: fsdp`: each process holds a part of every weight, of its gradient and of the optimiser's state.

A decoder layer's weights are gathered while it computes, forward and backward, and let go afterwards. The fused
forward pass goes past the layers' own one, where that happens, so Transformers' runs instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ollatune.base.errors import InputError
from ollatune.checkpoint.format import Checkpoint
from ollatune.checkpoint.shards import (
    joined_names,
    read_parts,
    split_names,
    stored_tensors,
    write_parts,
)
from ollatune.modeling.fast.forward import CausalStep, generate_greedy
from ollatune.training.gathered import GatheredStep, Reach
from ollatune.training.optimizer import load_optimizer_state
from ollatune.training.sharing import Named, Result, Sharing, check_names


class FSDPSharing(Sharing):
    """Weights, gradients and optimiser state in parts (FSDP2)."""

    may_fail_alone = False  # the others wait in the middle of a layer
    needs_all = True
    saves_shards = True

    def _share(
        self, step_function: CausalStep, named: Named, make_optimizer: Callable[[Named], Optimizer]
    ) -> tuple[CausalStep, Named, Optimizer]:
        names = [name for name, _ in named]
        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        for layer in cast(Any, self.model).model.layers:
            fully_shard(layer, mesh=mesh)
        # FSDP makes a subclass of the module's own class, which no type can say.
        reach = fully_shard(Reach(self.model), mesh=mesh, reshard_after_forward=False)
        self.reach = cast(Any, reach)
        for module in self.reach.modules():
            if isinstance(module, FSDPModule):
                # The loss is divided already: gradients are summed.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        sharded = dict(self.model.named_parameters())
        trained = [(name, sharded[name]) for name in names]
        return (
            GatheredStep(step_function, self.reach, self.within),
            trained,
            make_optimizer(trained),
        )

    def within(self, compute: Callable[[], Result]) -> Result:
        result: Result = self.reach(compute)
        self.reach.reshard()
        return result

    def reduce_gradients(self) -> None:
        """Every backward pass has summed its own."""

    def clip(self, limit: float | None) -> float:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(self.parameters, limit or math.inf, norm)
        return float(norm)

    @torch.no_grad()
    def trained_state(self) -> dict[str, Tensor]:
        state = {}
        for name, tensor in self._trained().items():
            whole = cast(DTensor, tensor).full_tensor()
            if self.processes.is_main:  # one tensor at a time on the others
                state[name] = whole.cpu().contiguous()
        return state

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        own = self._trained()
        check_names(own, state)
        for name, tensor in own.items():
            tensor.copy_(_like(state[name], cast(DTensor, tensor)))

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """`state` may hold whole tensors; each process keeps its part of them."""
        own = self._by_number()
        parts = {
            number: {
                key: _like(value, own[number]) if _fits(value, own[number]) else value
                for key, value in values.items()
            }
            for number, values in state["state"].items()
        }
        load_optimizer_state(self.optimizer, state | {"state": parts})

    def _by_number(self) -> dict[int, DTensor]:
        """The trained parameters by the number that torch gives them in an optimiser's state."""
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        return dict(enumerate(ordered))

    def write_shards(self, folder: Path) -> None:
        state = self.optimizer.state_dict()["state"]
        write_parts(folder, joined_names(self._trained(), state))

    def load(self, checkpoint: Checkpoint) -> None:
        if checkpoint.shards is None:
            super().load(checkpoint)
        else:
            self._load_shards(checkpoint, checkpoint.shards)

    @torch.no_grad()
    def _load_shards(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Each process reads its own part, however many wrote them."""
        stored = stored_tensors(folder)
        own, numbered = self._trained(), self._by_number()
        names, states = split_names(dict.fromkeys(stored, torch.empty(0)))
        check_names({name: torch.empty(0) for name in own}, names)
        if not self.continues_optimizer(checkpoint):
            states = {}
        if states.keys() - numbered.keys():
            raise InputError(f"{folder} holds the optimiser state of other weights than these.")
        room = {
            number: {
                key: _room_for(stored[f"optimizer.{number}.{key}"], numbered[number])
                for key in values
            }
            for number, values in states.items()
        }
        read_parts(folder, joined_names(own, room))
        if self.continues_optimizer(checkpoint):
            saved = checkpoint.optimizer_state_dict
            load_optimizer_state(
                self.optimizer, {"state": room, "param_groups": saved["param_groups"]}
            )

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """All processes find the same answers in step: no one has the weights for itself."""

        def compute() -> list[list[int]]:
            return [
                generate_greedy(
                    self.model, list(prompt), max_new_tokens=max_new_tokens, stop_ids=stop_ids
                )
                for prompt in prompts
            ]

        return self.within(compute)


def _fits(value: Any, parameter: DTensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _like(whole: Tensor, sharded: DTensor) -> Tensor:
    """This process's part of a tensor that every process has whole."""
    if isinstance(whole, DTensor):
        return whole
    return distribute_tensor(
        whole.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def _room_for(stored: Any, parameter: DTensor) -> Tensor:
    """An empty tensor to read `stored` into: sharded like its parameter where it has that shape."""
    if stored.size == parameter.shape and len(stored.size):
        return torch.zeros_like(parameter, dtype=stored.properties.dtype)
    return torch.zeros(stored.size, dtype=stored.properties.dtype)
