"""What this folder needs from a tokenizer and from a chat template; both live elsewhere and are passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class SegmentLike(Protocol):
    """A piece of a rendered conversation; `is_target` says whether the model learns to write it."""

    @property
    def text(self) -> str: ...
    @property
    def is_target(self) -> bool: ...


class PromptTemplate(Protocol):
    """The chat template the model is served with."""

    @property
    def digest(self) -> str: ...

    def render_training_examples(
        self, messages: Sequence[Any], tools: Any = None, targets: Any = "all"
    ) -> Sequence[Sequence[SegmentLike]]:
        """The conversation in pieces whose concatenation is the whole text: once, or once per answer where the template
        shows earlier answers otherwise than the model said them. Raises InputError."""
        ...


class Tokenizer(Protocol):
    """The base model's own tokenizer."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def eot_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def end_of_generation_ids(self) -> frozenset[int]: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def digest(self) -> str: ...

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]: ...

    def encode_segments(self, texts: Sequence[str], *, add_bos: bool = False) -> list[list[int]]:
        """Texts that follow one another, each encoded alone; no blank is put where text goes on."""
        ...

    def decode(self, ids: Sequence[int], /) -> str: ...


RendererParts = tuple[Tokenizer, PromptTemplate]
"""What rendering needs, as one value."""

MakeRendererParts = Callable[[], RendererParts]
"""Makes them anew in a worker process: a picklable, module-level callable (or `functools.partial` of one)."""
