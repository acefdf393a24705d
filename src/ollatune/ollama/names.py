"""Model names and blob digests, by Ollama's own rules (its `types/model/name.go`).

    [scheme://][host/][namespace/]model[:tag]      defaults: https, registry.ollama.ai, library, latest

A part begins with a letter, a digit or `_`; `-` and `.` may follow (no `.` in a namespace, `:` only in a host).
So no valid name can climb out of a folder, and no other check of paths is needed than this one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ollatune.base.errors import InputError, UsageError
from ollatune.base.text import printable

DEFAULT_SCHEME = "https"
DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_MAX_HOST_BYTES = 350
_MAX_PART_BYTES = 80
_PART_PATTERNS = {
    "host": re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.:-]{{0,{_MAX_HOST_BYTES - 1}}}"),
    "namespace": re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,{_MAX_PART_BYTES - 1}}}"),
    "model": re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_MAX_PART_BYTES - 1}}}"),
    "tag": re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{_MAX_PART_BYTES - 1}}}"),
}
_PART_RULES = {
    "host": f"letters, digits, `_`, `-`, `.` and `:`, at most {_MAX_HOST_BYTES}",
    "namespace": f"letters, digits, `_` and `-`, at most {_MAX_PART_BYTES}",
    "model": f"letters, digits, `_`, `-` and `.`, at most {_MAX_PART_BYTES}",
    "tag": f"letters, digits, `_`, `-` and `.`, at most {_MAX_PART_BYTES}",
}
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
# Names that Windows gives to devices, with or without an extension.
_WINDOWS_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)")


@dataclass(frozen=True)
class ModelName:
    """A complete model name. Make one with `ModelName.parse`; case is kept, comparison is up to `matches`."""

    host: str
    namespace: str
    model: str
    tag: str
    scheme: str = DEFAULT_SCHEME

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """The name `text` stands for, defaults filled in. Raises UsageError for what Ollama refuses too."""
        scheme, parts = _split(text)
        filled = {
            "host": DEFAULT_HOST if parts["host"] is None else parts["host"],
            "namespace": DEFAULT_NAMESPACE if parts["namespace"] is None else parts["namespace"],
            "model": parts["model"] or "",
            "tag": DEFAULT_TAG if parts["tag"] is None else parts["tag"],
        }
        for kind, part in filled.items():
            if not _PART_PATTERNS[kind].fullmatch(part):
                raise UsageError(
                    f"`{printable(text)}` is not a model name: its {kind} `{printable(part, limit=80)}` is not valid"
                    f" (it begins with a letter, a digit or `_`; {_PART_RULES[kind]}).",
                    hint="Names look like llama3.2, llama3.2:3b, someone/model:tag or hf.co/org/repo:Q4_K_M.",
                )
        return cls(scheme=scheme or DEFAULT_SCHEME, **filled)

    @classmethod
    def is_valid(cls, text: str) -> bool:
        """Whether Ollama accepts `text` as a model name."""
        try:
            cls.parse(text)
        except UsageError:
            return False
        return True

    def __str__(self) -> str:
        """The full form: host/namespace/model:tag."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """The form Ollama lists: default host and namespace left out, the tag always there."""
        if self.host.lower() != DEFAULT_HOST:
            return str(self)
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """host, namespace, model, tag: the path of the manifest below `manifests/`."""
        return self.host, self.namespace, self.model, self.tag

    @property
    def is_cloud(self) -> bool:
        """Whether the tag says that the model runs on Ollama's servers and has no local weights."""
        return self.tag.lower() == "cloud" or self.tag.lower().endswith("-cloud")

    @property
    def slug(self) -> str:
        """A file name on every system: `hf.co/org/repo:Q4_K_M` gives `hf.co-org-repo-Q4_K_M`."""
        short = self.short
        if self.tag.lower() == DEFAULT_TAG:
            short = short[: -len(self.tag) - 1]
        slug = re.sub(r"[^A-Za-z0-9._-]", "-", short).rstrip(".")
        return f"_{slug}" if _WINDOWS_DEVICES.match(slug) else slug

    def matches(self, other: ModelName) -> bool:
        """Whether both name the same model: Ollama compares without case."""
        return str(self).lower() == str(other).lower()


def _split(text: str) -> tuple[str, dict[str, str | None]]:
    """Scheme and the four parts; None where a part is not given, "" where a separator promises one that is missing."""
    parts: dict[str, str | None] = dict.fromkeys(("host", "namespace", "model", "tag"))
    rest = text
    if rest.rfind(":") > rest.rfind("/"):  # a `:` before the last `/` belongs to the host
        rest, _, parts["tag"] = rest.rpartition(":")
    rest, has_namespace, parts["model"] = rest.rpartition("/")
    if not has_namespace:
        return "", parts
    rest, has_host, parts["namespace"] = rest.rpartition("/")
    if not has_host:
        return "", parts
    scheme, has_scheme, host = rest.partition("://")
    parts["host"] = host if has_scheme else rest
    return scheme if has_scheme else "", parts


def digest_hex(digest: str) -> str:
    """The 64 hex digits of `sha256:…` or `sha256-…`. Raises InputError for anything else.

    Blob paths are made from digests that come out of files and answers: this check is what keeps them in the store.
    """
    found = _DIGEST.fullmatch(digest)
    if not found:
        raise InputError(
            f"`{printable(digest, limit=90)}` is not a blob digest: expected sha256: and 64 lower-case hex digits.",
            hint="The manifest or the answer it came from is damaged; pull the model again.",
        )
    return found.group(1)
