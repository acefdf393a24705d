"""The catalog of base models (`configs/model_registry.yaml`): families, sizes, needs, first settings, wrong names.

It knows names as plain text and no server: a name that it does not list may still be a model of the user's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ollatune.base.errors import UsageError
from ollatune.base.text import did_you_mean, nearest

TrainingMethod = Literal["lora-packed", "lora-bf16", "full"]
"""LoRA on the blocks as served, LoRA on bf16 weights, or every weight trained."""

REGISTRY_FILE_NAME = "model_registry.yaml"
DEFAULT_TOKENS = 2048
"""Tokens in memory at once (micro-batch × length) that `training_memory_bytes` assumes unless told otherwise."""

_EMBEDDED_PREFIX = "embedded:"
_OPTIMIZER_BYTES = 16  # per trained weight: fp32 weight, gradient and AdamW's two moments
_LOGIT_TOKENS = 512  # the loss takes the vocabulary for so many tokens at once
_LOGIT_BYTES = 12  # per logit: bf16 or fp32 value, fp32 softmax, gradient
_RUNTIME_BYTES = 1 << 30  # Python, PyTorch and buffers of the libraries

_Positive = Annotated[int, Field(gt=0)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recommended(_Row):
    """First settings for models of at most `max_parameters`. `batch_size` is examples per optimizer step."""

    max_parameters: Annotated[float, Field(gt=0)]
    lora_rank: _Positive
    lora_learning_rate: Annotated[float, Field(gt=0, lt=1)]
    full_learning_rate: Annotated[float, Field(gt=0, lt=1)]
    batch_size: _Positive


class Alias(_Row):
    """What a name that does not exist should be, and why."""

    name: str
    reason: str


class Size(_Row):
    """One size of a family: the shape of its language model; the optional fields replace the family's."""

    quantization: str
    download_gb: Annotated[float, Field(gt=0)]
    blocks: _Positive
    width: _Positive
    heads: _Positive
    kv_heads: _Positive
    head_width: _Positive
    feed_forward: _Positive
    experts: _Positive = 1
    architecture: str | None = None
    context_tokens: _Positive | None = None
    vocabulary: _Positive | None = None
    tied_embeddings: bool | None = None
    licence: str | None = None
    mmlu_percent: Annotated[float, Field(gt=0, lt=100)] | None = None


class Family(_Row):
    """Models that share an architecture, a tokenizer and a licence."""

    title: str
    publisher: str
    licence: str
    architecture: str
    context_tokens: _Positive
    vocabulary: _Positive
    tied_embeddings: bool = False
    use: str
    default_size: str
    tag_aliases: dict[str, str] = {}
    sizes: dict[str, Size]

    @model_validator(mode="after")
    def _sizes_exist(self) -> Family:
        for size in (self.default_size, *self.tag_aliases.values()):
            if size not in self.sizes:
                raise ValueError(f"size `{size}` is not among {', '.join(self.sizes)}")
        return self


@dataclass(frozen=True)
class Entry:
    """One model of the catalog, e.g. `llama3.2:3b`, family and size put together."""

    name: str
    family: str
    size: str
    title: str
    publisher: str
    licence: str
    architecture: str
    context_tokens: int
    vocabulary: int
    tied_embeddings: bool
    use: str
    quantization: str
    download_bytes: int
    shape: Size
    recommended: Recommended
    is_trainable: bool

    @property
    def parameters(self) -> int:
        """Weights of the language model, computed from its shape."""
        shape = self.shape
        attention, feed_forward = self._matrix_sizes()
        norms = {"gemma2": 4, "gemma3": 4}.get(self.architecture, 2) * shape.width
        if self.architecture in ("qwen3", "qwen3moe", "gemma3"):
            norms += 2 * shape.head_width
        biases = 0
        if self.architecture == "qwen2":
            biases = (shape.heads + 2 * shape.kv_heads) * shape.head_width
        router = shape.width * shape.experts if shape.experts > 1 else 0
        block = attention + feed_forward * shape.experts + router + norms + biases
        embeddings = self.vocabulary * shape.width * (1 if self.tied_embeddings else 2)
        return embeddings + shape.blocks * block + shape.width

    def lora_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on every linear layer of the blocks (attention only where there are experts)."""
        shape = self.shape
        query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        sides = 2 * (shape.width + query) + 2 * (shape.width + key)
        if shape.experts == 1:
            sides += 3 * (shape.width + shape.feed_forward)
        return rank * shape.blocks * sides

    def training_memory_bytes(
        self, method: TrainingMethod, *, rank: int | None = None, tokens: int = DEFAULT_TOKENS
    ) -> int:
        """Memory to expect for training with activation checkpointing: a first guess to choose a machine by.

        Weights as stored or in bf16, 16 bytes for each trained weight (fp32 with AdamW), the inputs of every block,
        the inside of one block, and the logits of a slice of the tokens. `ollatune train --dry-run` estimates better.
        """
        shape = self.shape
        block_inputs = 2 * shape.blocks * shape.width * tokens
        inside = 2 * tokens * (6 * shape.width + 6 * shape.feed_forward)
        logits = _LOGIT_BYTES * self.vocabulary * min(tokens, _LOGIT_TOKENS)
        if method == "full":
            weights = _OPTIMIZER_BYTES * self.parameters
        else:
            frozen = self.download_bytes if method == "lora-packed" else 2 * self.parameters
            trained = self.lora_parameters(rank or self.recommended.lora_rank)
            weights = frozen + _OPTIMIZER_BYTES * trained
        return weights + block_inputs + inside + logits + _RUNTIME_BYTES

    def _matrix_sizes(self) -> tuple[int, int]:
        """Weights of one block's attention and of one expert's feed-forward part."""
        shape = self.shape
        query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        return 2 * shape.width * (query + key), 3 * shape.width * shape.feed_forward


@dataclass(frozen=True)
class Resolution:
    """What a name stands for. `notice` is to be shown; `suggestion` is the nearest listed name, if this one is not."""

    name: str
    notice: str | None = None
    entry: Entry | None = None
    suggestion: str | None = None


class Catalog(_Row):
    """The registry file. `families` maps a family's name to its description."""

    trainable_architectures: tuple[str, ...]
    recommended: tuple[Recommended, ...]
    aliases: dict[str, Alias]
    families: dict[str, Family]

    def entry(self, name: str) -> Entry | None:
        """The entry of `family[:tag]`, or None. A tag such as `3b-instruct-q8_0` belongs to size `3b`.

        The quantisation and download are those of the plain tag.
        """
        family_name, tag = _normalise(name)
        family = self.families.get(family_name)
        if family is None:
            return None
        wanted = family.default_size if tag == "latest" else tag
        for size in (wanted, *_prefixes(wanted)):
            size = family.tag_aliases.get(size, size)
            if size in family.sizes:
                return self._entry(family_name, family, size)
        return None

    def entries(self) -> list[Entry]:
        """Every size of every family, in the file's order."""
        return [
            self._entry(name, family, size)
            for name, family in self.families.items()
            for size in family.sizes
        ]

    def resolve(self, name: str) -> Resolution:
        """What `name` stands for. Names that do not exist but are often written get the right one and a notice;
        unknown ones come back as they are, with the nearest listed name as `suggestion`."""
        if name.startswith(_EMBEDDED_PREFIX):
            embedded = name.removeprefix(_EMBEDDED_PREFIX)
            return Resolution(name, entry=self.entry(embedded.replace("-", ":")))
        family, tag = _normalise(name)
        for prefix in (tag, *_prefixes(tag)):
            if alias := self.aliases.get(f"{family}:{prefix}"):
                target = alias.name + name[len(name) - len(tag) + len(prefix) :]
                notice = f"`{name}` is not in Ollama's library; using `{target}`: {alias.reason}."
                return Resolution(target, notice=notice, entry=self.entry(target))
        entry = self.entry(name)
        return Resolution(name, entry=entry, suggestion=None if entry else self._suggest(name))

    def _suggest(self, name: str) -> str | None:
        family, tag = _normalise(name)
        if family in self.families:
            sizes = self.families[family].sizes
            return f"{family}:{nearest(tag, sizes) or self.families[family].default_size}"
        found = nearest(family, self.families) or nearest(family.replace("-", ""), self.families)
        if not found:
            return None
        return f"{found}:{tag}" if self.entry(f"{found}:{tag}") and tag != "latest" else found

    def _entry(self, family_name: str, family: Family, size: str) -> Entry:
        shape = family.sizes[size]
        tied = shape.tied_embeddings
        architecture = shape.architecture or family.architecture
        fields: dict[str, Any] = {
            "name": f"{family_name}:{size}",
            "family": family_name,
            "size": size,
            "title": f"{family.title} {size.upper()}",
            "publisher": family.publisher,
            "licence": shape.licence or family.licence,
            "architecture": architecture,
            "context_tokens": shape.context_tokens or family.context_tokens,
            "vocabulary": shape.vocabulary or family.vocabulary,
            "tied_embeddings": family.tied_embeddings if tied is None else tied,
            "use": family.use,
            "quantization": shape.quantization,
            "download_bytes": round(shape.download_gb * 1e9),
            "shape": shape,
            "is_trainable": architecture in self.trainable_architectures,
        }
        parameters = Entry(**fields, recommended=self.recommended[-1]).parameters
        chosen = next((r for r in self.recommended if parameters <= r.max_parameters), None)
        return Entry(**fields, recommended=chosen or self.recommended[-1])


def _normalise(name: str) -> tuple[str, str]:
    """Family and tag, lower case, Ollama's default host and namespace left out."""
    folded = name.strip().lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    family, has_tag, tag = folded.rpartition(":")
    if not has_tag or "/" in tag:
        return folded, "latest"
    return family, tag or "latest"


def _prefixes(tag: str) -> list[str]:
    """`3b-instruct-q8_0` gives `3b-instruct` and `3b`."""
    words = tag.split("-")
    return ["-".join(words[:count]) for count in range(len(words) - 1, 0, -1)]


def registry_path() -> Path:
    """The registry that belongs to this installation: beside the package, or in the checkout's `configs/`."""
    installed = Path(__file__).parent / REGISTRY_FILE_NAME
    return (
        installed
        if installed.is_file()
        else Path(__file__).parents[2] / "configs" / REGISTRY_FILE_NAME
    )


def load_catalog(path: Path | None = None) -> Catalog:
    """The catalog from `path`, or the one of this installation. Raises UsageError with file and line."""
    return _load(path or registry_path())


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> Catalog:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the model registry {path}: {error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    try:
        return Catalog.model_validate(content)
    except ValidationError as error:
        problems = [_describe(path, root, problem) for problem in error.errors()]
        raise UsageError("\n".join(problems)) from error


def _describe(path: Path, root: yaml.Node | None, problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    hint = ""
    if problem["type"] == "extra_forbidden":
        kinds: list[type[_Row]] = [Catalog, Family, Size, Alias, Recommended]
        hint = did_you_mean(
            str(problem["loc"][-1]), [f for kind in kinds for f in kind.model_fields]
        )
    return f"{path}:{_line_of(root, problem['loc'])}: {place}: {problem['msg']}.{hint}"


def _line_of(node: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """The line on which the deepest part of `location` that exists begins, counted from 1."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
