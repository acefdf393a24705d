"""Replace a model's linear layers, embedding and experts by ones that keep the file's blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import TensorInfo
from ollatune.gguf.types import GGMLType
from ollatune.modeling.architectures import TensorRule
from ollatune.modeling.packed import PackedEmbedding, PackedLinear
from ollatune.modeling.packed_experts import PackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_EXPERTS = ".mlp.experts"


class BlockSource(Protocol):
    """Gives a tensor's stored rows: copied, or as they lie in the mapped file."""

    def info(self, name: str) -> TensorInfo: ...

    def blocks(self, name: str) -> Tensor: ...

    def mapped(self, name: str) -> Tensor: ...


class ScaledPackedEmbedding(PackedEmbedding):
    """Gemma's embedding: rows times the square root of the width, rounded to the dtype as in Transformers."""

    def forward(self, token_ids: Tensor) -> Tensor:
        scale = torch.tensor(math.sqrt(self.embedding_dim), dtype=self.dtype).item()
        return super().forward(token_ids) * scale


def pack_model(
    model: PreTrainedModel,
    rules: list[TensorRule],
    source: BlockSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> set[str]:
    """Replace every linear layer, embedding and stack of experts that the file holds quantised.

    The rows of each are put into Transformers' order as they are, packed; biases are decoded to `dtype`. Returns the
    GGUF names of the tensors that have their place now; the others (norms, float matrices) are still to be filled.
    """
    packing = _Packing(model, rules, source, dtype, device)
    for rule in rules:
        is_packed = source.info(rule.gguf_name).type.is_quantized
        module = model.get_submodule(rule.hf_module)
        if not is_packed or not rule.hf_name.endswith((".weight", "_proj")):
            continue
        if rule.hf_module == EMBEDDING:
            packing.embedding(rule)
        elif rule.hf_module.endswith(_EXPERTS):
            packing.expert_stack(rule)
        elif isinstance(module, nn.Linear):
            packing.linear(rule, module)
    packing.experts()
    return packing.placed


class _Packing:
    """The replacements of one model, and what has been placed by them."""

    def __init__(
        self,
        model: PreTrainedModel,
        rules: list[TensorRule],
        source: BlockSource,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.source, self.dtype, self.device = model, source, dtype, device
        self.biases = {rule.hf_module: rule for rule in rules if rule.hf_name.endswith(".bias")}
        self.stacks: dict[str, list[TensorRule]] = {}
        self.placed: set[str] = set()

    def linear(self, rule: TensorRule, module: nn.Linear) -> None:
        bias = None
        if (bias_rule := self.biases.get(rule.hf_module)) is not None:
            info = self.source.info(bias_rule.gguf_name)
            values = dequantize(self.source.blocks(bias_rule.gguf_name), info.type).view(-1)
            bias = bias_rule.transform.gguf_to_hf(values).to(self.device, self.dtype)
            self.placed.add(bias_rule.gguf_name)
        sizes = module.in_features, module.out_features
        self._replace(rule, PackedLinear(self._blocks(rule), self._type(rule), *sizes, bias))

    def embedding(self, rule: TensorRule) -> None:
        module: Any = self.model.get_submodule(EMBEDDING)
        kind = ScaledPackedEmbedding if hasattr(module, "embed_scale") else PackedEmbedding
        sizes = module.num_embeddings, module.embedding_dim
        packed = kind(self._blocks(rule), self._type(rule), *sizes, dtype=self.dtype)
        self._replace(rule, packed)
        if self.model.config.tie_word_embeddings:
            self.model.set_submodule(HEAD, packed.tied_head())

    def expert_stack(self, rule: TensorRule) -> None:
        self.stacks.setdefault(rule.hf_module, []).append(rule)

    def experts(self) -> None:
        """Replace the stacks of experts whose three parts are all quantised."""
        for name, rules in self.stacks.items():
            if len(rules) != 3:
                continue
            experts: Any = self.model.get_submodule(name)
            stacks = {}
            for rule in rules:
                part = rule.gguf_name.split("ffn_")[1].split("_")[0]  # gate, up or down
                shape = self.source.info(rule.gguf_name).shape
                stacks[part] = (self._blocks(rule).view(*shape[:2], -1), self._type(rule))
                self.placed.add(rule.gguf_name)
            self.model.set_submodule(name, PackedExperts(stacks, experts.act_fn))

    def _type(self, rule: TensorRule) -> GGMLType:
        return self.source.info(rule.gguf_name).type

    def _blocks(self, rule: TensorRule) -> Tensor:
        """Rows in Transformers' order, uint8 [rows, row_bytes]; on a CPU the file's own memory where possible."""
        order = rule.transform.hf_order(self.source.info(rule.gguf_name).shape[0])
        if order is None and self.device.type == "cpu":
            return self.source.mapped(rule.gguf_name)
        blocks = self.source.blocks(rule.gguf_name)
        return (blocks if order is None else blocks[order]).to(self.device)

    def _replace(self, rule: TensorRule, module: nn.Module) -> None:
        self.model.set_submodule(rule.hf_module, module)
        self.placed.add(rule.gguf_name)
