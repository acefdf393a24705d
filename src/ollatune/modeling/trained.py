"""The trained model put together again from its base and a checkpoint, for export's proof and for questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ollatune.config.schema import Config
from ollatune.modeling.fast.forward import CausalStep, evaluation_mode
from ollatune.modeling.load import Mode, load_base_model
from ollatune.modeling.lora import LoRASettings, inject_lora, load_adapter_state
from ollatune.modeling.opened import OpenBase


def lora_settings(config: Config) -> LoRASettings:
    """The adapter's settings of a run's configuration."""
    advanced = config.advanced
    return LoRASettings(
        rank=advanced.lora_rank,
        alpha=advanced.lora_alpha,
        dropout=advanced.lora_dropout,
        target_modules=advanced.lora_target_modules,
        layers=advanced.lora_layers,
        use_rslora=advanced.use_rslora,
        use_dora=advanced.use_dora,
    )


class TrainedLogprobs:
    """log p of the next token [P, V] after each of P positions, by a model in fp32: the trainer's side of the proof."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._step = CausalStep(model, use_fast_path=False)

    def __call__(
        self, token_ids: Sequence[int], positions: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        with evaluation_mode(self.model):
            logprobs: Tensor = self._step.next_token_logprobs(list(token_ids), list(positions))
        values: npt.NDArray[np.float32] = logprobs.numpy()
        return values


def load_trained(
    base: OpenBase, state: Mapping[str, Tensor] | None, config: Config, *, mode: Mode = "dense"
) -> nn.Module:
    """The base in fp32 with a checkpoint's trained tensors on it (None: the base alone).

    Raises UsageError where the tensors do not fit the base.
    """
    model: nn.Module = load_base_model(base.gguf, mode=mode)
    if state is None:
        return model
    if any(".lora_A." in name for name in state):
        inject_lora(model, lora_settings(config), seed=0)
        load_adapter_state(model, dict(state))
        return model.eval()
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return model.eval()
