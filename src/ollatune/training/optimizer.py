"""Optimisers and their parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from ollatune.config.schema import TrainingConfig
from ollatune.modeling.nf4 import require_bitsandbytes

_NO_DECAY_PARTS = ("bias", "norm", "embed", "layernorm", "magnitude")


def parameter_groups(
    parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices with decay; biases, norms, embeddings and other vectors without."""
    decayed = [p for name, p in parameters if _is_decayed(name, p)]
    plain = [p for name, p in parameters if not _is_decayed(name, p)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    lowered = name.lower()
    return parameter.dim() >= 2 and not any(part in lowered for part in _NO_DECAY_PARTS)


def build_optimizer(
    parameters: Sequence[tuple[str, nn.Parameter]], settings: TrainingConfig
) -> Optimizer:
    """The optimiser that `settings` asks for. Raises UsageError where its extra is not installed."""
    groups = parameter_groups(parameters, settings.weight_decay)
    rate = settings.learning_rate
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=rate, betas=betas, eps=settings.adam_epsilon, fused=True
        )
    if settings.optimizer == "adam":
        # The specification's Adam is the alternative without weight decay.
        plain = parameter_groups(parameters, 0.0)
        return torch.optim.Adam(plain, lr=rate, betas=betas, eps=settings.adam_epsilon, fused=True)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=settings.adam_beta1)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    require_bitsandbytes("training.optimizer: adamw_8bit", "adamw")
    from bitsandbytes.optim import AdamW8bit

    return cast(Optimizer, AdamW8bit(groups, lr=rate, betas=betas, eps=settings.adam_epsilon))


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, but for the settings of its groups: a resumed run may have changed them."""
    # Not the rate: it is set before every step, and where none follows it is the last one's.
    kept = ("params", "lr")
    settings = [{k: v for k, v in g.items() if k not in kept} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
