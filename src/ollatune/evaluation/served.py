"""What can be asked of a model that is served, alike for llama.cpp in process and for an Ollama server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ollatune.base.errors import UsageError
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.ollama.answers import TokenLogprob
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import VersionTooOld
from ollatune.templates import ChatTemplate, Message

LLAMA_CPP_TOP = 64
"""Alternatives asked for per token: they hold all but a trace of the probability, and cost little to send."""

OLLAMA_TOP = 20
"""The most that Ollama gives."""

_SEED = 0


@dataclass(frozen=True)
class ServedToken:
    """One position of an answer: the chosen token's bytes (its id where known), and the alternatives' logprobs.

    `top_logprobs` are by id from llama.cpp, by the token's bytes from Ollama. At the end of an answer `raw` is empty:
    the position where the model chose to stop.
    """

    raw: bytes | None
    token_id: int | None
    top_logprobs: Mapping[int, float] | Mapping[bytes, float]


@dataclass(frozen=True)
class ServedAnswer:
    """A greedy answer with what the server tells of it. `num_prompt_tokens` is None where it cannot be relied on."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int | None = None
    tokens: tuple[ServedToken, ...] = field(default=(), repr=False)


class ServedModel(Protocol):
    """A model behind a server, asked as its users ask it: by conversations, with its own template and stops."""

    @property
    def description(self) -> str:
        """For reports: which server, which version, which model."""

    def render(self, messages: Sequence[Message]) -> str | None:
        """The prompt the model is fed for a conversation; None where the server cannot tell."""

    def tokenize(self, prompt: str) -> list[int] | None:
        """The ids of a rendered prompt as the server feeds them, BOS included; None where it cannot tell."""

    def answer(
        self, messages: Sequence[Message], *, max_tokens: int, with_logprobs: bool = False
    ) -> ServedAnswer:
        """The greedy answer to a conversation."""

    def answer_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int
    ) -> list[ServedAnswer]:
        """The greedy answers to conversations, in order, without logprobs."""


class LlamaCppServed:
    """A GGUF in llama.cpp behind the template and stops of its Modelfile, as Ollama would apply them.

    `system` is the Modelfile's SYSTEM: put before conversations that do not begin with a system message.
    `template` must not take a beginning-of-text token out of the text (`adds_bos=False`), for servers do not either.
    `num_top` is how many alternatives are asked for per token.
    """

    def __init__(
        self,
        engine: LlamaCppEngine,
        template: ChatTemplate,
        *,
        stops: Sequence[str] = (),
        system: str = "",
        num_top: int = LLAMA_CPP_TOP,
    ) -> None:
        self.engine = engine
        self.template = template
        self.stops = tuple(stops)
        self.system = system
        self.num_top = min(num_top, engine.vocab_size)

    @property
    def description(self) -> str:
        return f"{self.engine.path.name} in {self.engine.description}"

    def render(self, messages: Sequence[Message]) -> str:
        return self.template.render_prompt(with_system(messages, self.system))

    def tokenize(self, prompt: str) -> list[int]:
        return self.engine.tokenize(prompt)

    def answer(
        self, messages: Sequence[Message], *, max_tokens: int, with_logprobs: bool = False
    ) -> ServedAnswer:
        generation = self.engine.greedy(
            self.render(messages),
            max_tokens=max_tokens,
            stop=self.stops,
            top=self.num_top if with_logprobs else 0,
        )
        tops = generation.top_logprobs
        tokens = [
            ServedToken(None, token, tops[index] if index < len(tops) else {})
            for index, token in enumerate(generation.token_ids)
        ]
        tokens += [ServedToken(b"", None, top) for top in tops[len(tokens) :]]
        return ServedAnswer(
            generation.text, generation.finish_reason, generation.num_prompt_tokens, tuple(tokens)
        )

    def answer_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int
    ) -> list[ServedAnswer]:
        prompts = [self.render(messages) for messages in conversations]
        generations = self.engine.greedy_many(prompts, max_tokens=max_tokens, stop=self.stops)
        return [ServedAnswer(g.text, g.finish_reason, g.num_prompt_tokens) for g in generations]


class OllamaServed:
    """A tag on an Ollama server. Only the temperature, the seed and the answer's length are set over the tag's own."""

    def __init__(self, client: OllamaClient, model: str) -> None:
        self.client = client
        self.model = model

    @property
    def description(self) -> str:
        return f"{self.model} in Ollama {self.client.version()}"

    def render(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.client.render_chat(self.model, wire_messages(messages))
        except VersionTooOld:
            return None

    def tokenize(self, prompt: str) -> list[int] | None:
        return None

    def answer(
        self, messages: Sequence[Message], *, max_tokens: int, with_logprobs: bool = False
    ) -> ServedAnswer:
        wants_logprobs = with_logprobs and self.client.version().has_logprobs
        reply = self.client.chat(
            self.model,
            wire_messages(messages),
            logprobs=OLLAMA_TOP if wants_logprobs else None,
            options={"temperature": 0, "seed": _SEED, "num_predict": max_tokens},
        )
        if reply.done_reason not in ("stop", "length"):
            raise UsageError(
                f"`{self.model}` did not answer: it ended with {reply.done_reason or 'no reason'!r}."
            )
        tokens = [
            ServedToken(token.raw, None, _by_bytes(token.alternatives)) for token in reply.logprobs
        ]
        return ServedAnswer(
            text=reply.thinking + reply.text,
            finish_reason="length" if reply.done_reason == "length" else "stop",
            num_prompt_tokens=reply.prompt_tokens or None,
            tokens=tuple(tokens),
        )

    def answer_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int
    ) -> list[ServedAnswer]:
        return [self.answer(messages, max_tokens=max_tokens) for messages in conversations]


def _by_bytes(alternatives: Sequence[TokenLogprob]) -> dict[bytes, float]:
    """Logprobs by bytes; of tokens with the same bytes the likeliest, which comes first."""
    found: dict[bytes, float] = {}
    for alternative in alternatives:
        found.setdefault(alternative.raw, alternative.logprob)
    return found


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The conversation with `system` before it unless it begins with one: what Ollama's chat does with SYSTEM."""
    if system and not (messages and messages[0].role == "system"):
        return [Message("system", system), *messages]
    return list(messages)


def wire_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as `/api/chat` takes them."""
    rows = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking:
            row["thinking"] = message.thinking
        if message.tool_calls:
            row["tool_calls"] = [dict(call) for call in message.tool_calls]
        if message.tool_name:
            row["tool_name"] = message.tool_name
        rows.append(row)
    return rows
