"""The decoder's forward pass over a packed row, on the modules of a Transformers model but not through their code.

It is used where it is exact: adapters (not DoRA) on the dense families below. Everything else runs Transformers' own
forward pass with the attention of `attention.py`. Shapes: T tokens of the row, N targets, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ollatune.modeling.fast.blocks import Norm, gated_mlp, projections, rms_norm
from ollatune.modeling.fast.linear_group import LinearGroup, fuse_weights
from ollatune.modeling.fast.packed_attention import AttentionShape, tree_attention
from ollatune.modeling.fast.segments import Segment, SegmentTable
from ollatune.modeling.fast.workspace import Workspace, kept_bytes
from ollatune.modeling.lora import LoRALinear

SUPPORTED_MODELS = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM",
)  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_BEFORE_ATTENTION, _AFTER_ATTENTION, _BEFORE_MLP = (
    f"gradient {place}" for place in ("before attention", "after attention", "before the MLP")
)

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its groups of linear layers, norms (None where the family has none) and attention."""

    kind: str
    before_attention: Norm
    qkv: LinearGroup
    query_norm: Norm | None
    key_norm: Norm | None
    output: LinearGroup
    after_attention: Norm | None
    before_mlp: Norm
    gate_up: LinearGroup
    down: LinearGroup
    after_mlp: Norm | None
    shape: AttentionShape

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.qkv, self.output, self.gate_up, self.down

    def kept_bytes(self, num_tokens: int) -> int:
        """What the compiled kernels keep of a workspace at most."""
        shape = self.shape
        attended = kept_bytes((num_tokens, shape.num_heads * shape.head_size), torch.bfloat16)
        attended += kept_bytes((num_tokens, shape.num_heads), torch.float32)
        return attended + sum(group.plan.kept_bytes(num_tokens) for group in self.groups)


def is_supported(model: nn.Module) -> bool:
    """Whether the fast forward pass equals the model's own: known family, nothing but plain adapters trained."""
    if type(model).__name__ not in SUPPORTED_MODELS:
        return False
    activation = _activation_name(cast(Any, model).config)
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    if activation not in _ACTIVATIONS or any(a.lora_magnitude is not None for a in adapters):
        return False
    own = {id(p) for a in adapters for p in (a.lora_A, a.lora_B)}
    return all(id(p) in own for p in model.parameters() if p.requires_grad)


def _activation_name(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


class FastDecoder:
    """The forward pass over the modules of `model` (see `is_supported`).

    Args:
        recompute: keep only each layer's input for the backward pass (activation checkpointing).
    """

    def __init__(self, model: nn.Module, *, recompute: bool = False) -> None:
        self.model = model
        self.recompute = recompute
        self.config = cast(Any, model).config
        self.backbone: Any = cast(Any, model).model
        self.activation = _ACTIVATIONS[_activation_name(self.config)]
        self.is_gemma = type(model).__name__.startswith("Gemma")
        self.layers = [self._read_layer(layer) for layer in self.backbone.layers]
        self.final_norm = self._norm(self.backbone.norm)
        self.workspace = Workspace()
        for layer in self.layers:
            fuse_weights(layer.qkv)
            fuse_weights(layer.gate_up)

    def _norm(self, module: Any) -> Norm:
        epsilon = getattr(module, "variance_epsilon", None)
        return Norm(
            module.weight, module.eps if epsilon is None else epsilon, 1.0 if self.is_gemma else 0.0
        )

    def _read_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (
            (attention.qkv_proj,)
            if hasattr(attention, "qkv_proj")
            else (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        gate_up = (
            (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
        )
        window = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window"):
            window = getattr(self.config, "sliding_window", None)
        shape = AttentionShape(
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            attention.head_dim,
            attention.scaling,
            window,
            getattr(attention, "attn_logit_softcapping", None),
        )
        after_attention = layer.post_attention_layernorm
        return _Layer(
            kind=str(getattr(attention, "layer_type", None) or "full_attention"),
            before_attention=self._norm(layer.input_layernorm),
            qkv=LinearGroup(qkv),
            query_norm=self._optional_norm(attention, "q_norm"),
            key_norm=self._optional_norm(attention, "k_norm"),
            output=LinearGroup((attention.o_proj,)),
            after_attention=self._norm(after_attention) if self.is_gemma else None,
            before_mlp=self._norm(
                layer.pre_feedforward_layernorm if self.is_gemma else after_attention
            ),
            gate_up=LinearGroup(gate_up),
            down=LinearGroup((mlp.down_proj,)),
            after_mlp=self._norm(layer.post_feedforward_layernorm) if self.is_gemma else None,
            shape=shape,
        )

    def _optional_norm(self, module: Any, name: str) -> Norm | None:
        return self._norm(getattr(module, name)) if hasattr(module, name) else None

    def hidden(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        segments: list[Segment],
        targets_N: Tensor,
    ) -> Tensor:
        """Final hidden states [N, D] at the row positions `targets_N`.

        The last layer computes its MLP at these positions only: nobody reads the others.
        """
        stream_TD = cast(Tensor, self.backbone.embed_tokens(input_ids_T[None]))[0]
        if self.recompute or not torch.is_grad_enabled() or not self._plans_fit(stream_TD):
            return self._final(stream_TD, position_ids_T, segments, targets_N)
        length = stream_TD.shape[0]
        with self.workspace.lend(sum(layer.kept_bytes(length) for layer in self.layers)):
            return self._final(stream_TD, position_ids_T, segments, targets_N)

    def _plans_fit(self, stream_TD: Tensor) -> bool:
        """Whether compiled kernels take some of the layers: others keep what torch allocates."""
        fits = [g.plan.fits(stream_TD) for layer in self.layers for g in layer.groups]
        return any(fits)

    def _final(
        self,
        stream_TD: Tensor,
        position_ids_T: Tensor,
        segments: list[Segment],
        targets_N: Tensor,
    ) -> Tensor:
        rotaries = self._rotaries(stream_TD, position_ids_T)
        table = SegmentTable(segments)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            chosen = targets_N if index == last else None
            arguments = (stream_TD, layer, rotaries[layer.kind], table, chosen)
            if self.recompute and torch.is_grad_enabled():
                stream_TD = cast(Tensor, checkpoint(self._layer, *arguments, use_reentrant=False))
            else:
                stream_TD = self._layer(*arguments)
        return rms_norm(stream_TD, self.final_norm)

    def _rotaries(self, stream_TD: Tensor, position_ids_T: Tensor) -> dict[str, Rotary]:
        """Cosine and sine [T, half] by kind of layer, as the model's own module computes them, in fp32."""
        rotary_module = self.backbone.rotary_emb
        kinds = sorted({layer.kind for layer in self.layers})
        by_kind = type(self.model).__name__ == "Gemma3ForCausalLM"
        rotaries: dict[str, Rotary] = {}
        for kind in kinds:
            extra = (kind,) if by_kind else ()
            like_T = stream_TD[:1].float()  # tells the module device and dtype only
            cosine, sine = rotary_module(like_T[None], position_ids_T[None], *extra)
            half = cosine.shape[-1] // 2
            rotaries[kind] = (cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous())
        return rotaries

    def _layer(
        self,
        stream_TD: Tensor,
        layer: _Layer,
        rotary: Rotary,
        table: SegmentTable,
        chosen_N: Tensor | None,
    ) -> Tensor:
        # Scratch: each of these gradients is read before the backward pass of the next layer makes its own.
        *outputs, stream_TD = projections(
            stream_TD, layer.before_attention, layer.qkv, scratch=_BEFORE_ATTENTION
        )
        query, key, value = self._query_key_value(layer, outputs)
        attended_TO = tree_attention(query, key, value, rotary, table, layer.shape)
        if chosen_N is not None:
            attended_TO = attended_TO.index_select(0, chosen_N)
            stream_TD = stream_TD.index_select(0, chosen_N)
        if layer.after_attention is None:
            (stream_TD,) = projections(
                attended_TO, None, layer.output, residual_TO=stream_TD, scratch=_AFTER_ATTENTION
            )
        else:
            (attention_TD,) = projections(attended_TO, None, layer.output, scratch=_AFTER_ATTENTION)
            stream_TD = stream_TD + rms_norm(attention_TD, layer.after_attention)
        mlp = (stream_TD, layer.before_mlp, layer.gate_up, layer.down, self.activation)
        if layer.after_mlp is None:
            return gated_mlp(*mlp, add_inputs=True, scratch=_BEFORE_MLP)
        return stream_TD + rms_norm(gated_mlp(*mlp, scratch=_BEFORE_MLP), layer.after_mlp)

    def _query_key_value(
        self, layer: _Layer, outputs: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = layer.shape
        if len(outputs) == 1:
            sizes = [shape.num_heads, shape.num_groups, shape.num_groups]
            query, key, value = torch.split(outputs[0], [n * shape.head_size for n in sizes], dim=1)
        else:
            query, key, value = outputs
        if layer.query_norm is not None and layer.key_norm is not None:
            query = _per_head(query, layer.query_norm, shape.head_size)
            key = _per_head(key, layer.key_norm, shape.head_size)
        return query, key, value


def _per_head(tensor_TO: Tensor, norm: Norm, head_size: int) -> Tensor:
    length = tensor_TO.shape[0]
    return rms_norm(tensor_TO.reshape(length, -1, head_size), norm).reshape(length, -1)
