"""One packed micro-batch through the model to its loss: the step that training, validation and probing share.

A row is T tokens of one or more examples end to end, each without its last token (nothing is predicted from it).
`target_positions_N` are the row positions from which `target_ids_N` are predicted. With shared beginnings (see
`segments.py`) a position may stand in `target_positions_N` more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.modeling.fast.attention import register_attention
from ollatune.modeling.fast.decoder import FastDecoder, is_supported
from ollatune.modeling.fast.loss import HeadSettings, head_evaluate, head_loss_sum
from ollatune.modeling.fast.segments import Segment


@dataclass(frozen=True)
class PackedRow:
    """Tensors of one micro-batch (see the module's docstring). `segments` cover the T tokens.

    `num_tokens_unshared` is what T would be without shared beginnings.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    segments: list[Segment]
    target_positions_N: Tensor
    target_ids_N: Tensor
    num_tokens_unshared: int

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_T.shape[0])

    @property
    def num_targets(self) -> int:
        return int(self.target_ids_N.shape[0])

    def to(self, device: torch.device) -> PackedRow:
        """On another device; from page-locked memory the copy overlaps with what is computed."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> PackedRow:
        """In page-locked memory."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> PackedRow:
        return PackedRow(
            change(self.input_ids_T),
            change(self.position_ids_T),
            self.segments,
            change(self.target_positions_N),
            change(self.target_ids_N),
            self.num_tokens_unshared,
        )


class CausalStep:
    """Runs packed rows through `model` (a Transformers causal language model, adapted or not).

    Args:
        model: its attention is switched to the packed one.
        label_smoothing: used by `loss_sum` only.
        use_fast_path: the fused forward pass where it is exact, else (or if False) Transformers' own.
        recompute: activation checkpointing of the fused forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        use_fast_path: bool = True,
        recompute: bool = False,
    ) -> None:
        self.model = model
        self.fast: FastDecoder | None = None
        if use_fast_path and is_supported(model):
            self.fast = FastDecoder(model, recompute=recompute)
        config = cast(Any, model).config
        config._attn_implementation = register_attention()
        self.backbone: nn.Module = cast(Any, model).model
        self.head: nn.Module = cast(Any, model).lm_head
        softcap = getattr(config, "final_logit_softcapping", None)
        self.settings = HeadSettings(softcap, label_smoothing)

    @property
    def can_share(self) -> bool:
        """Whether rows may hold shared beginnings: only the fused forward pass can compute them."""
        return self.fast is not None

    def hidden(self, row: PackedRow) -> Tensor:
        """Final hidden states at the target positions: [N, D]."""
        if self.fast is not None:
            return self.fast.hidden(
                row.input_ids_T, row.position_ids_T, row.segments, row.target_positions_N
            )
        assert not any(segment.ancestors for segment in row.segments), "needs the fused path"
        output = self.backbone(
            input_ids=row.input_ids_T[None],
            position_ids=row.position_ids_T[None],
            segment_lengths=[segment.length for segment in row.segments],
            use_cache=False,
        )
        hidden_TD = cast(Tensor, output[0])[0]
        return hidden_TD.index_select(0, row.target_positions_N)

    def loss_sum(self, row: PackedRow) -> Tensor:
        """Sum of the cross-entropy over the row's targets, with gradient."""
        return head_loss_sum(self.hidden(row), self.head, row.target_ids_N, self.settings)

    @torch.no_grad()
    def evaluate(self, row: PackedRow) -> tuple[float, int]:
        """Loss sum and number of correct next tokens over the row's targets."""
        return head_evaluate(self.hidden(row), self.head, row.target_ids_N, self.settings)

    @torch.no_grad()
    def next_token_logprobs(self, token_ids: list[int], positions: list[int]) -> Tensor:
        """log p of every next token after each of P positions: [P, V] in fp32, softcap applied."""
        device = next(self.model.parameters()).device
        ids_T = torch.tensor(token_ids, device=device)
        positions_T = torch.arange(len(token_ids), device=device)
        segments = [Segment(0, len(token_ids))]
        wanted_P = torch.tensor(positions, device=device)
        row = PackedRow(ids_T, positions_T, segments, wanted_P, ids_T[wanted_P], len(token_ids))
        logits_PV = cast(Tensor, self.head(self.hidden(row))).float()
        if self.settings.softcap is not None:
            logits_PV = torch.tanh(logits_PV / self.settings.softcap) * self.settings.softcap
        return torch.log_softmax(logits_PV, dim=-1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block, the earlier mode restored after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def generate_greedy(
    model: nn.Module, prompt_ids: list[int], *, max_new_tokens: int, stop_ids: frozenset[int]
) -> list[int]:
    """The likeliest continuation of `prompt_ids`, without the stop token that ended it."""
    from transformers import DynamicCache

    backbone, head = cast(Any, model).model, cast(Any, model).lm_head
    device = next(model.parameters()).device
    cache = DynamicCache(config=cast(Any, model).config)
    ids, generated = torch.tensor([prompt_ids], device=device), list[int]()
    position = 0
    with evaluation_mode(model):
        while len(generated) < max_new_tokens:
            positions = torch.arange(position, position + ids.shape[1], device=device)[None]
            hidden = backbone(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            )[0]
            position += ids.shape[1]
            # Soft-capping is monotone: it never changes which token is likeliest.
            token = int(head(hidden[:, -1]).argmax())
            if token in stop_ids:
                break
            generated.append(token)
            ids = torch.tensor([[token]], device=device)
    return generated
