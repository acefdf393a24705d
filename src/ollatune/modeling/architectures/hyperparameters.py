"""A model's sizes as its GGUF metadata states them, with llama.cpp's defaults for keys that may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ollatune.base.errors import InputError

ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


class TensorShape(Protocol):
    """What is needed of a tensor's entry in the file: its shape, rows first."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary embedding is stretched beyond the context it was trained on."""

    type: str
    factor: float
    original_context_length: int
    attention_factor: float | None


@dataclass(frozen=True)
class Hyperparameters:
    """The sizes every architecture here shares; lengths in tokens, widths in weights."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_dims: int
    rope_scaling: RopeScaling
    is_tied: bool
    num_experts: int
    num_experts_used: int


class Metadata:
    """Typed access to `<architecture>.<key>`. Raises InputError for a missing key or a value of another type."""

    def __init__(
        self,
        values: Mapping[str, Any],
        architecture: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self.architecture = architecture
        self.defaults = defaults or {}

    def with_defaults(self, defaults: Mapping[str, Any]) -> Metadata:
        """The same, with values for keys (without the architecture) that the file does not have."""
        return Metadata(self.values, self.architecture, defaults)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; a list (one value a layer) is taken if all its entries are equal."""
        value = self._get(key, default)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise InputError(
                    f"{self.architecture}.{key} differs between layers ({_short(value)}); one value was expected.",
                    hint="Models with layers of different sizes cannot be trained here.",
                )
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong_type(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong_type(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong_type(key, value, "text")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.values

    def raw(self, key: str) -> Any:
        """The value as it is, or None."""
        return self._value(key, None)

    def _get(self, key: str, default: Any) -> Any:
        value = self._value(key, default)
        if value is None:
            raise InputError(
                f"The file's metadata has no {self.architecture}.{key}, which every {self.architecture} model needs.",
                hint="The file is damaged, or was written by a converter that left it out; fetch the model again.",
            )
        return value

    def _value(self, key: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{key}", self.defaults.get(key, default))

    def _wrong_type(self, key: str, value: Any, expected: str) -> InputError:
        return InputError(
            f"{self.architecture}.{key} is {_short(value)}; {expected} was expected.",
            hint="The file's metadata is damaged; fetch the model again.",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_hyperparameters(metadata: Metadata, tensors: Mapping[str, TensorShape]) -> Hyperparameters:
    """Read the sizes and check that they fit together. Raises InputError.

    Defaults as in llama.cpp's `load_hparams`: rope base 10000, key length = hidden size / heads, KV heads = heads.
    """
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(
            "The file has no tensor `token_embd.weight`: it holds no language model weights.",
            hint="Choose the file of the model itself, not of a projector, an adapter or a vocabulary.",
        )
    hidden_size = metadata.integer("embedding_length")
    num_heads = metadata.integer("attention.head_count")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size or num_heads == 0:
        raise InputError(
            f"Token embeddings have shape {embedding.shape} with {num_heads} heads; "
            f"(vocabulary, {hidden_size}) and at least one head were expected.",
            hint="The file's metadata does not belong to its tensors; fetch the model again.",
        )
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    value_dim = metadata.integer("attention.value_length", hidden_size // num_heads)
    num_kv_heads = metadata.integer("attention.head_count_kv", num_heads)
    if value_dim != head_dim or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise InputError(
            f"Attention with {num_heads} heads, {num_kv_heads} key/value heads, key length {head_dim} and value "
            f"length {value_dim} was found; equal lengths and whole groups of heads were expected.",
            hint="Models of this shape cannot be trained here.",
        )
    context_length = metadata.integer("context_length")
    return Hyperparameters(
        architecture=metadata.architecture,
        num_layers=metadata.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=context_length,
        rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.number("rope.freq_base", 10000.0),
        rope_dims=metadata.integer("rope.dimension_count", head_dim),
        rope_scaling=_read_rope_scaling(metadata, context_length),
        is_tied="output.weight" not in tensors,
        num_experts=metadata.integer("expert_count", 0),
        num_experts_used=metadata.integer("expert_used_count", 0),
    )


def _read_rope_scaling(metadata: Metadata, context_length: int) -> RopeScaling:
    kind = metadata.text("rope.scaling.type", "linear")
    if kind not in ROPE_SCALINGS:
        raise InputError(
            f"Rope scaling `{kind}` was found; one of {', '.join(ROPE_SCALINGS)} was expected.",
            hint="This kind of context extension cannot be trained here.",
        )
    # llama.cpp still reads the older key, and takes 0 and a missing key as "no scaling".
    factor = (
        metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0)) or 1.0
    )
    has_attention_factor = metadata.has("rope.scaling.attn_factor")
    return RopeScaling(
        type="none" if kind == "linear" and factor == 1.0 else kind,
        factor=factor,
        original_context_length=metadata.integer(
            "rope.scaling.original_context_length", context_length
        ),
        attention_factor=metadata.number("rope.scaling.attn_factor")
        if has_attention_factor
        else None,
    )
