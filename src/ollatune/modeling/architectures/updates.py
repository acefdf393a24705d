"""What training changed, named and ordered as the GGUF file has it: the input of every export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.base.text import did_you_mean
from ollatune.modeling.architectures.base import Architecture
from ollatune.modeling.architectures.rules import TensorRule

LoraFactors = tuple[Tensor, Tensor, float]
"""A [rank, in], B [out, rank] and the scale: the layer computes with W + scale·B·A."""


@dataclass(frozen=True)
class TunedTensor:
    """The new values of one GGUF tensor, computed only when asked for.

    `apply` takes the base's values decoded to float32 in `shape` and returns the tuned ones, float32, same shape.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["lora", "full"]
    apply: Callable[[Tensor], Tensor]


def rules_of(architecture: Architecture, hf_name: str) -> list[TensorRule]:
    """The rules for a Transformers parameter: one, or two where it fuses two GGUF tensors.

    Raises InputError for a name the model does not have, and for an output layer that the file does not hold.
    """
    by_name: dict[str, list[TensorRule]] = {}
    for rule in architecture.tensor_map():
        by_name.setdefault(rule.hf_name, []).append(rule)
    found = [rule for rule in by_name.get(hf_name, []) if rule.gguf_name in architecture.tensors]
    if found:
        return found
    if hf_name == "lm_head.weight":
        raise InputError(
            "The output layer was trained on its own, but this model shares it with the token embedding: "
            "the file has no tensor `output.weight` to put it into.",
            hint="Leave lm_head out of the trained layers.",
        )
    raise InputError(
        f"The {architecture.name} model has no parameter `{hf_name}`.{did_you_mean(hf_name, by_name)}",
        hint="The adapter or checkpoint was made for another model.",
    )


def export_updates(
    architecture: Architecture,
    *,
    lora: Mapping[str, LoraFactors] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> list[TunedTensor]:
    """The updates for LoRA factors by module name and whole parameters by parameter name, each tensor once.

    Raises InputError for names and shapes the file does not have, and for a weight given in both ways.
    """
    updates = [
        _lora_update(architecture, module, factors) for module, factors in (lora or {}).items()
    ]
    for hf_name, values in (parameters or {}).items():
        is_tied_copy = hf_name == "lm_head.weight" and architecture.sizes.is_tied
        if is_tied_copy and _same_storage(parameters or {}, values):
            continue
        updates += [
            _full_update(architecture, rule, values) for rule in rules_of(architecture, hf_name)
        ]
    names = [update.name for update in updates]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"`{repeated[0]}` was given twice: as LoRA factors and as a whole parameter.",
            hint="Merge the adapter into the parameter, or leave one of them out.",
        )
    return updates


def lora_in_gguf_order(
    architecture: Architecture, lora: Mapping[str, LoraFactors]
) -> dict[str, LoraFactors]:
    """LoRA factors by GGUF tensor name, the rows of B in the file's order. Raises InputError as `export_updates`."""
    ordered: dict[str, LoraFactors] = {}
    for module, (a, b, scale) in lora.items():
        rule = _lora_rule(architecture, module, a, b)
        ordered[rule.gguf_name] = (*rule.transform.lora_hf_to_gguf(a, b), scale)
    return ordered


def _lora_rule(architecture: Architecture, module: str, a: Tensor, b: Tensor) -> TensorRule:
    rules = rules_of(architecture, f"{module}.weight")
    shape = tuple(architecture.tensors[rules[0].gguf_name].shape)
    if a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != shape:
        raise InputError(
            f"The LoRA factors of {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}; "
            f"[rank, {shape[-1]}] and [{shape[0]}, rank] were expected.",
            hint="The adapter was made for another model.",
        )
    return rules[0]


def _lora_update(architecture: Architecture, module: str, factors: LoraFactors) -> TunedTensor:
    a, b, scale = factors
    rule = _lora_rule(architecture, module, a, b)
    gguf_a, gguf_b = rule.transform.lora_hf_to_gguf(a.detach().float(), b.detach().float())

    def apply(base: Tensor) -> Tensor:
        return torch.addmm(base, gguf_b.to(base.device), gguf_a.to(base.device), alpha=scale)

    shape = tuple(architecture.tensors[rule.gguf_name].shape)
    return TunedTensor(rule.gguf_name, shape, "lora", apply)


def _full_update(architecture: Architecture, rule: TensorRule, parameter: Tensor) -> TunedTensor:
    values = rule.transform.part(parameter.detach())
    shape = tuple(architecture.tensors[rule.gguf_name].shape)
    if tuple(values.shape) != shape:
        raise InputError(
            f"{rule.hf_name} has shape {tuple(parameter.shape)}; {shape} was expected for `{rule.gguf_name}`.",
            hint="The checkpoint was made for another model.",
        )

    def apply(base: Tensor) -> Tensor:
        return rule.transform.hf_to_gguf(values.to(base.device, torch.float32))

    return TunedTensor(rule.gguf_name, shape, "full", apply)


def _same_storage(parameters: Mapping[str, Tensor], head: Tensor) -> bool:
    """Whether a tied head is the embedding itself, as state dictionaries list it, and not one trained apart."""
    embedding = parameters.get("model.embed_tokens.weight")
    return embedding is not None and (
        head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)
    )
