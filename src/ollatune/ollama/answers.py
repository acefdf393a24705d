"""What a server's answers mean, as small frozen values. Unknown fields are ignored, missing ones are neutral."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ollatune.ollama.modelfile import sources
from ollatune.ollama.parameters import shown_parameters

ProgressCallback = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """One event of a pull, an upload or a create. `total` is 0 where the status has no size."""

    status: str
    digest: str = ""
    completed: int = 0
    total: int = 0


@dataclass(frozen=True)
class ListedModel:
    """A row of `ollama list`. `digest` is the manifest's, hex."""

    name: str
    digest: str
    size_bytes: int
    modified_at: str
    details: Mapping[str, Any]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> ListedModel:
        return cls(
            name=str(answer.get("model") or answer.get("name") or ""),
            digest=str(answer.get("digest") or ""),
            size_bytes=int(answer.get("size") or 0),
            modified_at=str(answer.get("modified_at") or ""),
            details=answer.get("details") or {},
        )


@dataclass(frozen=True)
class RunningModel:
    """A row of `ollama ps`. `context_tokens` is 0 where the server does not tell (before 0.10)."""

    name: str
    size_bytes: int
    vram_bytes: int
    context_tokens: int
    expires_at: str

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> RunningModel:
        return cls(
            name=str(answer.get("model") or answer.get("name") or ""),
            size_bytes=int(answer.get("size") or 0),
            vram_bytes=int(answer.get("size_vram") or 0),
            context_tokens=int(answer.get("context_length") or 0),
            expires_at=str(answer.get("expires_at") or ""),
        )


@dataclass(frozen=True)
class ShownModel:
    """`/api/show`. `metadata` is the GGUF's, long arrays left out; `modelfile` the generated text."""

    name: str
    modelfile: str
    template: str
    system: str
    license: str
    parameters_text: str
    messages: tuple[Mapping[str, Any], ...]
    details: Mapping[str, Any]
    metadata: Mapping[str, Any]
    capabilities: tuple[str, ...]
    modified_at: str

    @classmethod
    def of(cls, name: str, answer: Mapping[str, Any]) -> ShownModel:
        return cls(
            name=name,
            modelfile=str(answer.get("modelfile") or ""),
            template=str(answer.get("template") or ""),
            system=str(answer.get("system") or ""),
            license=str(answer.get("license") or ""),
            parameters_text=str(answer.get("parameters") or ""),
            messages=tuple(answer.get("messages") or ()),
            details=answer.get("details") or {},
            metadata=answer.get("model_info") or {},
            capabilities=tuple(answer.get("capabilities") or ()),
            modified_at=str(answer.get("modified_at") or ""),
        )

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture") or self.details.get("family") or "")

    @property
    def blob_path(self) -> str:
        """The GGUF's path on the server's own disk, or ""."""
        return next(iter(sources(self.modelfile)), "")

    @property
    def adapter_paths(self) -> tuple[str, ...]:
        """Paths of the LoRA adapters on the server's own disk."""
        return tuple(sources(self.modelfile, "ADAPTER"))

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters with their types, as `shown_parameters` reads them."""
        return shown_parameters(self.parameters_text)


@dataclass(frozen=True)
class TokenLogprob:
    """A token the model chose or could have chosen; `raw` its bytes (a token may be part of a character)."""

    text: str
    logprob: float
    raw: bytes
    alternatives: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> TokenLogprob:
        text = str(answer.get("token") or "")
        given = answer.get("bytes")
        return cls(
            text=text,
            logprob=float(answer["logprob"]),
            raw=bytes(given) if given else text.encode("utf-8", errors="replace"),
            alternatives=tuple(cls.of(item) for item in answer.get("top_logprobs") or ()),
        )


@dataclass(frozen=True)
class Generation:
    """A complete answer of generate or chat. `logprobs` may lack tokens: the server leaves out some (partial UTF-8)."""

    text: str
    done_reason: str
    prompt_tokens: int
    output_tokens: int
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    durations_ns: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: list[Mapping[str, Any]]) -> Generation:
        """Join the parts of a stream; the last one carries the counts. Parts hold `response` or `message`."""
        messages = [part.get("message") or {} for part in parts]
        last = parts[-1]
        return cls(
            text="".join(
                str(part.get("response") or message.get("content") or "")
                for part, message in zip(parts, messages, strict=True)
            ),
            done_reason=str(last.get("done_reason") or ""),
            prompt_tokens=int(last.get("prompt_eval_count") or 0),
            output_tokens=int(last.get("eval_count") or 0),
            thinking="".join(
                str(part.get("thinking") or message.get("thinking") or "")
                for part, message in zip(parts, messages, strict=True)
            ),
            tool_calls=tuple(
                call for message in messages for call in message.get("tool_calls") or ()
            ),
            logprobs=tuple(
                TokenLogprob.of(item) for part in parts for item in part.get("logprobs") or ()
            ),
            durations_ns={
                key.removesuffix("_duration"): int(value)
                for key, value in last.items()
                if key.endswith("_duration")
            },
        )
