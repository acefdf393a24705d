"""`distributed.backend: deepspeed`: DeepSpeed's ZeRO shards the optimiser's state (1), gradients (2) and weights (3).

Checkpoints are the same files that one process writes: DeepSpeed's own are pickles. So any backend and any number of
processes can go on from them. The whole state passes through the main process's memory while it is written.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ollatune.modeling.fast.forward import CausalStep, generate_greedy
from ollatune.training.gathered import GatheredStep, Reach
from ollatune.training.optimizer import set_learning_rate
from ollatune.training.sharing import Named, Result, Sharing, check_names

_BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced at a time; DeepSpeed's default reserves 2 GB for them."""


class ZeroSharing(Sharing):
    """Optimiser state, gradients and weights in parts, by stage."""

    may_fail_alone = False  # gradients are reduced in the middle of a backward pass
    needs_all = True

    def _share(
        self, step_function: CausalStep, named: Named, make_optimizer: Callable[[Named], Optimizer]
    ) -> tuple[CausalStep, Named, Optimizer]:
        settings = self.config.distributed
        deepspeed = _import_deepspeed(self.processes.device)
        optimizer = make_optimizer(named)
        names = {id(parameter): name for name, parameter in named}
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        self._numbered = [(names[id(parameter)], parameter) for parameter in ordered]
        self._groups = optimizer.state_dict()["param_groups"]
        reach = Reach(self.model)
        if settings.zero_stage == 3:
            # Our layers read each other's weights: a decoder layer's are gathered together.
            layers = {type(layer) for layer in cast(Any, self.model).model.layers}
            deepspeed.utils.set_z3_leaf_modules(reach, list(layers))
        self.engine, *_ = deepspeed.initialize(
            model=reach,
            optimizer=optimizer,
            model_parameters=ordered,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only multiplied with the next one, for its log
                "gradient_accumulation_steps": 1,
                "gradient_clipping": self.config.training.max_grad_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": settings.zero_stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": _BUCKET_ELEMENTS,
                    "stage3_param_persistence_threshold": 0,
                },
            },
            dist_init_required=False,
        )
        if settings.zero_stage == 3:
            # DeepSpeed reduces a layer's gradients as soon as its input's are known. With frozen embeddings the first
            # layer's input has none: its gradients would be taken before they exist.
            cast(Any, self.model).enable_input_require_grads()
        self._zero = self.engine.optimizer
        # Every loss comes out of the engine: its backward pass is prepared there.
        step = GatheredStep(step_function, self.engine, self.within)
        return step, named, cast(Optimizer, self._zero.optimizer)

    def within(self, compute: Callable[[], Result]) -> Result:
        if self.config.distributed.zero_stage < 3:
            return compute()
        result: Result = self.engine(compute)
        return result

    def zero_grad(self) -> None:
        """DeepSpeed lets gradients go with its step; a run does not go on without one."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        # It takes the mean over processes; our loss is divided already.
        self.engine.backward(loss * self.processes.count, scale_wrt_gas=False)

    def reduce_gradients(self) -> None:
        """The backward passes have."""

    def clip(self, limit: float | None) -> float:
        """The norm that DeepSpeed will clip by, before it updates anything."""
        if self.config.distributed.zero_stage == 3:
            norms = self._zero._get_norm_groups()
        else:
            norms = [self._zero.scaled_global_norm()]
        values = [float(norm) for norm in norms]
        if any(value < 0 for value in values):  # how it says infinite or NaN
            return float("inf")
        return float(sum(value**2 for value in values) ** 0.5)

    def step(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        self.engine.step()

    @torch.no_grad()
    def trained_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        keys = self._state_names()
        for name, parameter in self.named:
            whole = safe_get_full_fp32_param(parameter)
            if self.processes.is_main:
                state[keys[name]] = whole.detach().cpu().contiguous().clone()
        return state

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        keys = self._state_names()
        check_names(
            {keys[name]: state.get(keys[name], torch.empty(0)) for name, _ in self.named}, state
        )
        for name, parameter in self.named:
            whole = state[keys[name]].to(self.processes.device)
            safe_set_full_fp32_param(parameter, whole)
            self._set_working_copy(parameter, whole)

    def _set_working_copy(self, parameter: Any, whole: Tensor) -> None:
        """The weights that compute, beside those that the optimiser updates."""
        if self.config.distributed.zero_stage < 3:
            parameter.data.copy_(whole)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if self.processes.is_main:
                parameter.data.copy_(whole)

    def _state_names(self) -> dict[str, str]:
        """From parameter names to those in a checkpoint: an adapter's are PEFT's."""
        names = {}
        for name, _ in self.named:
            layer, _, last = name.rpartition(".")
            peft = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
            peft["lora_magnitude"] = "lora_magnitude_vector"
            names[name] = f"{layer}.{peft[last]}" if last in peft else name
        return names

    def optimizer_settings(self) -> dict[str, Any]:
        current = self.optimizer.param_groups
        groups = [
            saved | {"lr": now["lr"]} for saved, now in zip(self._groups, current, strict=True)
        ]
        return {"state": {}, "param_groups": groups}

    @torch.no_grad()
    def optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        states: dict[int, dict[str, Any]] = {}
        kept = self.optimizer.state.get(self._flat_parts()[0], {})
        for number, (_, parameter) in enumerate(self._numbered):
            states[number] = {}
            for key, value in kept.items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    # Each its own step: one tensor for all would be counted up once for each of them.
                    states[number][key] = _copied(value)
                    continue
                whole = safe_get_full_optimizer_state(parameter, key)
                if self.processes.is_main:
                    states[number][key] = whole.detach().cpu().contiguous().clone()
        return self.optimizer_settings() | {"state": states if kept else {}}

    def _link_states(self) -> None:
        """Let every parameter find its state: below stage 3 DeepSpeed does so for the first group alone."""
        if self.config.distributed.zero_stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_parts(self) -> list[Tensor]:
        """What the optimiser sees: this process's parts of the weights, end to end."""
        zero = self._zero
        stage_3 = self.config.distributed.zero_stage == 3
        parts = (
            zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
        )
        return list(parts)

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state["state"]:
            return
        for flat in self._flat_parts():
            for key, value in state["state"][0].items():
                is_shared = not isinstance(value, Tensor) or value.dim() == 0
                own = _copied(value) if is_shared else torch.zeros_like(flat)
                self.optimizer.state[flat][key] = own
        self._link_states()
        for number, (_, parameter) in enumerate(self._numbered):
            for key, value in state["state"][number].items():
                if isinstance(value, Tensor) and value.dim():
                    whole = value.to(self.processes.device)
                    safe_set_full_optimizer_state(parameter, whole, key)

    def answers(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        if self.config.distributed.zero_stage < 3:
            return super().answers(prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)

        def compute() -> list[list[int]]:
            return [
                generate_greedy(
                    self.model, list(prompt), max_new_tokens=max_new_tokens, stop_ids=stop_ids
                )
                for prompt in prompts
            ]

        return self.within(compute)


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise look for, and quiet on standard output, which belongs to results."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It calls what torch has given new names; only the first process may speak, and of other things.
    warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning)
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    if device.type == "cpu":
        # Or it compiles a kernel for inference, which nothing here uses, at the start of every run.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed
