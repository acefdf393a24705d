"""What stands for the model runner: a function from a prompt to tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GenerationRequest:
    """A rendered prompt for a GGUF. `options` are the model's parameters overlaid with the request's."""

    model: Path
    adapters: tuple[Path, ...]
    prompt: str
    options: dict[str, Any]
    num_alternatives: int


@dataclass(frozen=True)
class GeneratedToken:
    raw: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class GenerationAnswer:
    tokens: tuple[GeneratedToken, ...]
    done_reason: str
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    num_output_tokens: int = field(default=0)


GenerateFunction = Callable[[GenerationRequest], GenerationAnswer]


def scripted_answer(*words: str, done_reason: str = "stop") -> GenerateFunction:
    """A model that always says `words`, each one token; the prompt counts one token per blank-separated word."""

    def generate(request: GenerationRequest) -> GenerationAnswer:
        limit = request.options.get("num_predict", -1)
        said = words if limit < 0 else words[:limit]
        reason = done_reason if len(said) == len(words) else "length"
        tokens = tuple(GeneratedToken(w.encode(), -0.5, ((w.encode(), -0.5),)) for w in said)
        return GenerationAnswer(
            tokens, reason, prompt_ids=tuple(range(len(request.prompt.split()))),
            output_ids=tuple(range(len(said))), num_output_tokens=len(said) + (reason == "stop"),
        )  # fmt: skip

    return generate
