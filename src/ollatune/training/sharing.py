"""What the processes of a run share: who holds which weights, and how gradients become one update.

The loop asks a `Sharing` for everything that differs between one process, `ddp`, `fsdp` and `deepspeed`. This one
holds the whole model on every process (also on the only one): gradients are summed over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ollatune.base.errors import UsageError
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.modeling.fast.forward import CausalStep, generate_greedy
from ollatune.modeling.lora import adapter_state, load_adapter_state, lora_layers
from ollatune.training.distributed import Processes
from ollatune.training.optimizer import load_optimizer_state, set_learning_rate

Result = TypeVar("Result")
Named = Sequence[tuple[str, nn.Parameter]]


class Sharing:
    """The whole model on every process.

    Attributes:
        model: the Transformers model; step_function: what computes its losses.
        parameters: what is trained, as this process holds it; optimizer: over these.
        num_trained_bytes: size of what is trained, on all processes together.
        may_fail_alone: whether one process can run out of memory and the step still be repeated on all.
        needs_all: whether reading the weights takes every process.
        saves_shards: whether checkpoints are folders to which every process adds its part.
    """

    may_fail_alone = True
    needs_all = False
    saves_shards = False

    def __init__(
        self,
        step_function: CausalStep,
        named: Named,
        make_optimizer: Callable[[Named], Optimizer],
        processes: Processes,
        config: Config,
    ) -> None:
        self.processes = processes
        self.config = config
        self.model = step_function.model
        self.num_trained_bytes = sum(p.numel() * p.element_size() for _, p in named)
        self.step_function, self.named, self.optimizer = self._share(
            step_function, named, make_optimizer
        )
        self.parameters = [parameter for _, parameter in self.named]

    def _share(
        self, step_function: CausalStep, named: Named, make_optimizer: Callable[[Named], Optimizer]
    ) -> tuple[CausalStep, Named, Optimizer]:
        return step_function, named, make_optimizer(named)

    def within(self, compute: Callable[[], Result]) -> Result:
        """`compute()` where the model's weights can be read. Every process calls it."""
        return compute()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of `loss`, this process's share; `is_last` before the update."""
        loss.backward()

    def reduce_gradients(self) -> None:
        """Sum what the processes have computed."""
        self.processes.sum_gradients(self.parameters)

    def clip(self, limit: float | None) -> float:
        """Norm of the whole gradient, which is scaled down to `limit` where it is larger."""
        return float(nn.utils.clip_grad_norm_(self.parameters, limit or math.inf))

    def step(self, rate: float) -> None:
        """One update with the learning rate `rate`."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()

    def trained_state(self) -> dict[str, Tensor]:
        """The tensors that training changes, whole and on the CPU; complete on the main process at least."""
        return {name: t.detach().cpu().contiguous() for name, t in self._trained().items()}

    def _trained(self) -> dict[str, Tensor]:
        """The adapter, or every trained weight once, as this process holds them."""
        if lora_layers(self.model):
            return adapter_state(self.model)
        return {name: parameter.detach() for name, parameter in self.named}

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `trained_state`. Raises UsageError where names or shapes differ."""
        if lora_layers(self.model):
            load_adapter_state(self.model, state)
            return
        own = self._trained()
        check_names(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's whole state, in torch's form."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, state)

    def continues_optimizer(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` is of the same kind of optimiser: another one's state means nothing to it."""
        return bool(checkpoint.config["training"]["optimizer"] == self.config.training.optimizer)

    def optimizer_settings(self) -> dict[str, Any]:
        """The optimiser's state without its tensors."""
        return self.optimizer.state_dict() | {"state": {}}

    def load(self, checkpoint: Checkpoint) -> None:
        """Weights and optimiser as `checkpoint` has them. Raises InputError or UsageError."""
        if checkpoint.shards is not None:
            from ollatune.checkpoint.shards import with_all_tensors

            checkpoint = with_all_tensors(checkpoint)
        self.load_trained_state(checkpoint.model_state_dict)
        if self.continues_optimizer(checkpoint):
            self.load_optimizer_state(checkpoint.optimizer_state_dict)

    def write_shards(self, folder: Path) -> None:
        """Write this process's part of weights and optimiser into `folder`. Raises StorageError."""
        raise NotImplementedError("only where saves_shards")

    def is_finite(self) -> bool:
        """Whether every trained weight is finite, on all processes."""
        parts = (local_part(tensor) for tensor in self._trained().values())
        return not self.processes.any(any(not bool(torch.isfinite(p).all()) for p in parts))

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """The likeliest answer to each prompt, on every process; each process finds some of them."""
        count, rank = self.processes.count, self.processes.rank
        mine = [
            generate_greedy(
                self.model, list(prompt), max_new_tokens=max_new_tokens, stop_ids=stop_ids
            )
            for prompt in prompts[rank::count]
        ]
        found = self.processes.gather(mine)
        return [found[number % count][number // count] for number in range(len(prompts))]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())


def check_names(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise UsageError unless `state` has the names and shapes of `own`."""
    differing = sorted(own.keys() ^ state.keys())
    differing += [n for n in own if n in state and own[n].shape != state[n].shape]
    if differing:
        raise UsageError(
            f"The checkpoint does not fit this model: {len(differing)} weights differ, such as {differing[0]}.",
            hint="Resume with the base model and method it was trained with.",
        )
