"""What every architecture gives: its sizes, its Transformers configuration and class, and its tensor map."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.base.imports import first_import_of
from ollatune.modeling.architectures.hyperparameters import (
    Hyperparameters,
    Metadata,
    TensorShape,
    read_hyperparameters,
)
from ollatune.modeling.architectures.rules import TensorRule

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ReadTensor = Callable[[str], Tensor]
"""Gives a tensor of the file decoded to float32, by its GGUF name."""


class Architecture(ABC):
    """One `general.architecture`, bound to a file's metadata and tensor shapes."""

    name: ClassVar[str]
    families: ClassVar[str]
    transformers_names: ClassVar[tuple[str, str, str]]
    """Transformers' name of the family, its configuration class and its model class."""
    attention_implementation: ClassVar[str] = "sdpa"
    ignored_prefixes: ClassVar[tuple[str, ...]] = ()
    """Tensors with these prefixes are not part of the language model, or are read into the configuration."""

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> None:
        self.metadata = Metadata(metadata, self.name)
        self.tensors = tensors
        self.sizes: Hyperparameters = self._read_sizes()

    def _read_sizes(self) -> Hyperparameters:
        return read_hyperparameters(self.metadata, self.tensors)

    # ----- what a subclass states --------------------------------------------------------------------------------

    @abstractmethod
    def layer_rules(self, layer: int) -> list[TensorRule]:
        """The rules for the tensors of one layer."""

    @abstractmethod
    def config_fields(self, read_tensor: ReadTensor, serving_context: int | None) -> dict[str, Any]:
        """The fields of the Transformers configuration that `common_config` does not have."""

    def prepare_rotary(self, model: PreTrainedModel, read_tensor: ReadTensor) -> None:  # noqa: B027
        """Put into the model's rotary buffers what the configuration cannot say. Nothing for most architectures."""

    # ----- what follows from it ----------------------------------------------------------------------------------

    def model_class(self) -> type[PreTrainedModel]:
        """The Transformers class, imported here and not before: of the whole package, only this family's modules."""
        family, _, name = self.transformers_names
        module = _family_module(family, "modeling")
        found: type[PreTrainedModel] = getattr(module, name)
        return found

    def config(
        self, read_tensor: ReadTensor, *, serving_context: int | None = None
    ) -> PretrainedConfig:
        """The Transformers configuration. `serving_context`: the context in tokens the model will be served with.

        Raises InputError where the file's model is not one that Transformers computes as llama.cpp does.
        """
        fields = self.common_config() | self.config_fields(read_tensor, serving_context)
        family, name, model_name = self.transformers_names
        module = _family_module(family, "configuration")
        try:
            config: PretrainedConfig = getattr(module, name)(**fields)
        except (
            Exception
        ) as error:  # strict configurations raise classes of their own, which are not public
            raise InputError(
                f"Transformers refuses the sizes of this {self.name} model: {error}",
                hint="Models of this shape cannot be trained here.",
            ) from error
        config.architectures = [model_name]
        config._attn_implementation = self.attention_implementation
        return config

    def tensor_map(self) -> list[TensorRule]:
        """The rules for every tensor the architecture may have, in no particular order."""
        rules = [
            TensorRule("token_embd.weight", "model.embed_tokens.weight"),
            self.norm_rule("output_norm.weight", "model.norm.weight"),
        ]
        if not self.sizes.is_tied:
            rules.append(TensorRule("output.weight", "lm_head.weight"))
        for layer in range(self.sizes.num_layers):
            rules.extend(self.layer_rules(layer))
        return rules

    def present_rules(self) -> list[TensorRule]:
        """The rules whose tensor is in the file. Raises InputError for a missing tensor, or one no rule covers."""
        rules = self.tensor_map()
        missing = [
            rule.gguf_name
            for rule in rules
            if not rule.is_optional and rule.gguf_name not in self.tensors
        ]
        if missing:
            raise InputError(
                f"The file lacks {_count(missing)} that every {self.name} model of this size has: {_some(missing)}.",
                hint="It is damaged, only a part of a split model, or of a layout this program does not know.",
            )
        covered = {rule.gguf_name for rule in rules}
        unknown = [
            name
            for name in self.tensors
            if name not in covered and not name.startswith(self.ignored_prefixes)
        ]
        if unknown:
            raise InputError(
                f"The file holds {_count(unknown)} that a {self.name} model as known here does not use: "
                f"{_some(unknown)}.",
                hint="Training without them would train another model than the one that is served.",
            )
        return [rule for rule in rules if rule.gguf_name in self.tensors]

    def norm_rule(self, gguf_name: str, hf_name: str) -> TensorRule:
        """The rule for a norm's weight."""
        return TensorRule(gguf_name, hf_name)

    def common_config(self) -> dict[str, Any]:
        """Configuration fields with the same name and meaning in every architecture."""
        sizes, token_ids = self.sizes, self.metadata.values
        return {
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "max_position_embeddings": sizes.context_length,
            "rms_norm_eps": sizes.rms_norm_eps,
            "tie_word_embeddings": sizes.is_tied,
            "bos_token_id": token_ids.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": token_ids.get("tokenizer.ggml.eos_token_id"),
            # A padding id would make the embedding ignore that token's gradient, and many models pad with EOS.
            "pad_token_id": None,
        }

    def rope_parameters(self) -> dict[str, Any]:
        """Transformers' `rope_parameters` for the scalings that all architectures share. Raises InputError."""
        sizes, scaling = self.sizes, self.sizes.rope_scaling
        parameters: dict[str, Any] = {"rope_theta": sizes.rope_theta, "rope_type": "default"}
        if scaling.type == "linear":
            parameters |= {"rope_type": "linear", "factor": scaling.factor}
        elif scaling.type == "yarn":
            parameters |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_context_length,
                # llama.cpp multiplies the paper's factor with the file's (llama-context.cpp, yarn_attn_factor).
                "attention_factor": (0.1 * math.log(scaling.factor) + 1.0)
                * (1.0 if scaling.attention_factor is None else scaling.attention_factor),
                "beta_fast": self.metadata.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self.metadata.number("rope.scaling.yarn_beta_slow", 1.0),
            }
        elif scaling.type == "longrope":
            raise InputError(
                f"Rope scaling `longrope` was found in a {self.name} model; it is known for phi3 only.",
                hint="This kind of context extension cannot be trained here.",
            )
        return parameters

    def require_whole_heads(self) -> None:
        """Raise InputError where only a part of each head is rotated."""
        dims, head_dim = self.sizes.rope_dims, self.sizes.head_dim
        self.require(
            dims == head_dim,
            f"rotary embeddings on {dims} of {head_dim} head weights",
            "rotation of whole heads",
        )

    def require(self, holds: bool, found: str, expected: str) -> None:
        """Raise InputError unless `holds`: the file is of this architecture, but not as llama.cpp computes it."""
        if not holds:
            raise InputError(
                f"This {self.name} model has {found}; {expected} was expected.",
                hint="Training it here would train another model than the one that is served.",
            )


def _family_module(family: str, part: str) -> ModuleType:
    """One module of a family in Transformers, of the whole package only what it needs."""
    name = f"transformers.models.{family}.{part}_{family}"
    with first_import_of(name):
        return importlib.import_module(name)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: list[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"`{name}`" for name in names[:limit]) + rest
