"""What a server of a given version does and does not do; every number with a version in it lives here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollatune.base.errors import ServiceError
from ollatune.base.text import printable

_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[-+].*)?")

# Architectures that servers before 0.30.0 run on an engine without LoRA, and since when they do.
_NO_LORA_SINCE = {
    "gemma3": (0, 6, 0), "mistral3": (0, 6, 8), "llama4": (0, 6, 8), "mllama": (0, 7, 0), "qwen25vl": (0, 7, 0),
    "gemma3n": (0, 9, 6), "gptoss": (0, 11, 0), "gpt-oss": (0, 11, 0), "qwen3": (0, 12, 0), "qwen3moe": (0, 12, 4),
    "qwen3vl": (0, 12, 11), "deepseek2": (0, 13, 0), "bert": (0, 13, 5), "olmo3": (0, 13, 5), "lfm2": (0, 15, 0),
    "glm4moelite": (0, 15, 0), "qwen3next": (0, 17, 0), "gemma4": (0, 20, 0), "qwen35": (0, 20, 0),
    "nemotron_h": (0, 20, 0),
}  # fmt: skip
_OLDEST_TRIED_LORA = (0, 3, 7)
_LLAMA_SERVER = (0, 30, 0)
_NO_ADAPTERS = (0, 34, 1)
_SAFE = (0, 17, 1)


@dataclass(frozen=True)
class ServerVersion:
    """A server's version and its abilities. A development build (0.0.0) counts as newer than any release."""

    numbers: tuple[int, int, int]
    text: str

    @classmethod
    def parse(cls, text: str) -> ServerVersion:
        """Read `0.24.0`, `v0.5`, `0.32.15-rc1`. Raises ServiceError for anything else."""
        found = _VERSION.fullmatch(text.strip())
        if not found:
            raise ServiceError(
                f"The server says that its version is `{printable(text, limit=60)}`, a number such as 0.24.0 was"
                " expected.",
                hint="Check that OLLAMA_HOST names an Ollama server.",
            )
        major, minor, patch = (int(part or 0) for part in found.groups())
        return cls((major, minor, patch), text.strip())

    def __str__(self) -> str:
        return self.text

    def at_least(self, major: int, minor: int, patch: int) -> bool:
        """Whether this version is `major.minor.patch` or newer."""
        return self.numbers == (0, 0, 0) or self.numbers >= (major, minor, patch)

    @property
    def has_json_create(self) -> bool:
        """Whether `/api/create` takes JSON with digests; before, it took a Modelfile as text."""
        return self.at_least(0, 5, 5)

    @property
    def has_render_only(self) -> bool:
        """Whether `_debug_render_only` shows the prompt; older servers ignore it and generate."""
        return self.at_least(0, 11, 5)

    @property
    def has_renderers(self) -> bool:
        return self.at_least(0, 12, 0)

    @property
    def has_logprobs(self) -> bool:
        return self.at_least(0, 12, 11)

    @property
    def has_context_in_ps(self) -> bool:
        return self.at_least(0, 10, 0)

    @property
    def runs_jinja(self) -> bool:
        """Whether a GGUF's Jinja template is executed (and may beat a Go template)."""
        return self.at_least(*_LLAMA_SERVER)

    @property
    def rewrites_ggufs(self) -> bool:
        """Whether an imported GGUF is stored rewritten, under another digest, twice its size until pruned."""
        return self.at_least(*_LLAMA_SERVER)

    @property
    def accepts_adapters(self) -> bool:
        """Whether `/api/create` takes LoRA adapters at all; for one architecture ask `adapter_refusal`."""
        return not self.at_least(*_NO_ADAPTERS)

    @property
    def quantizes_ggufs(self) -> bool:
        """Whether `/api/create` quantises a GGUF."""
        return not self.at_least(*_NO_ADAPTERS)

    @property
    def default_repeat_penalty(self) -> float:
        """What applies where a model does not say: always write the parameter."""
        if self.at_least(0, 32, 10) or (self.at_least(0, 17, 5) and not self.at_least(0, 18, 0)):
            return 1.0
        return 1.1

    def adapter_refusal(self, architecture: str) -> str | None:
        """Why a GGUF adapter for `architecture` would not be served correctly here, or None if it would."""
        if not self.accepts_adapters:
            return f"Ollama {self} no longer takes LoRA adapters (since {_dotted(_NO_ADAPTERS)})"
        if not self.at_least(*_OLDEST_TRIED_LORA):
            oldest = _dotted(_OLDEST_TRIED_LORA)
            return (
                f"Ollama {self} is older than {oldest}, the first whose adapters are known to work"
            )
        since = _NO_LORA_SINCE.get(architecture)
        if since and self.at_least(*since) and not self.at_least(*_LLAMA_SERVER):
            return (
                f"Ollama {self} runs {architecture} on an engine without LoRA"
                f" (from {_dotted(since)} up to {_dotted(_LLAMA_SERVER)})"
            )
        return None

    @property
    def security_warning(self) -> str | None:
        """What to tell the user of a server with known holes, or None."""
        if self.at_least(*_SAFE):
            return None
        return (
            f"Ollama {self} has known security holes when it loads model files (CVE-2026-7482 among them):"
            f" update it to {_dotted(_SAFE)} or newer."
        )


def _dotted(numbers: tuple[int, int, int]) -> str:
    return ".".join(str(number) for number in numbers)
