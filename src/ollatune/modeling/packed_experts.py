"""Mixtral's experts computed from the file's own blocks: one expert's matrix is decoded at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.gguf.codecs import dequantize
from ollatune.gguf.types import GGMLType


class _ExpertLinear(torch.autograd.Function):
    """x Wᵀ with W decoded in the forward pass and once more in the backward pass; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs_TI: Tensor, blocks: Tensor, type: GGMLType) -> Tensor:
        ctx.save_for_backward(blocks)
        ctx.type = type
        return inputs_TI @ dequantize(blocks, type, dtype=inputs_TI.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> Any:
        (blocks,) = ctx.saved_tensors
        return gradient_TO @ dequantize(blocks, ctx.type, dtype=gradient_TO.dtype), None, None


class PackedExperts(nn.Module):
    """In place of Transformers' `MixtralExperts`, same call. Frozen: experts are not trained while packed.

    Stacks by part (`gate`, `up`, `down`): blocks uint8 [experts, rows, row_bytes] and their type. `act` is the
    activation of the module that is replaced.
    """

    def __init__(
        self,
        stacks: dict[str, tuple[Tensor, GGMLType]],
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.types = {part: type for part, (_, type) in stacks.items()}
        for part, (blocks, _) in stacks.items():
            self.register_buffer(f"{part}_blocks", blocks, persistent=False)
        self.act_fn = act

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, D], their experts [T, K] and weights [T, K] → [T, D]."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, choice = torch.where(top_k_index == expert)
            inputs = hidden_states[tokens]
            inner = self.act_fn(self._linear("gate", expert, inputs)) * self._linear(
                "up", expert, inputs
            )
            weighted = self._linear("down", expert, inner) * top_k_weights[tokens, choice, None]
            output = output.index_add(0, tokens, weighted.to(output.dtype))
        return output

    def _linear(self, part: str, expert: int, inputs: Tensor) -> Tensor:
        blocks = cast(Tensor, getattr(self, f"{part}_blocks"))[expert]
        outputs: Tensor = _ExpertLinear.apply(inputs, blocks, self.types[part])  # type: ignore[no-untyped-call]
        return outputs
