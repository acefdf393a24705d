"""Everything that can go wrong with a server, as typed errors that say what to do.

ServiceError
└── OllamaError               the server answered with an error, or not as it should
    ├── ServerDown            nobody listens there, or does not answer in time
    ├── ModelMissing          the server does not have the model, or the registry does not
    ├── AccessDenied          401 or 403
    ├── VersionTooOld         the server cannot do this yet
    ├── GarbledAnswer         not JSON, cut off, or from something else than Ollama
    └── ServerDiskFull        exit code 5: the server has no room left
"""

from __future__ import annotations

import json
import re

from ollatune.base.errors import ServiceError, StorageError
from ollatune.base.text import printable

_MISSING = re.compile(
    r"(?i)model ['\"].*['\"] not found|pull model manifest: file does not exist|model not found"
)
_DISK_FULL = re.compile(
    r"(?i)no space left on device|not enough space on the disk|disk quota exceeded"
)
_TITLE = re.compile(r"(?is)<title[^>]*>(.*?)</title>")
_MAX_TEXT = 300


class OllamaError(ServiceError):
    """An error of the server. `status` is the HTTP status (None: none came), `server_text` what it said, `is_cut`
    whether the connection was lost on the way, so that another try may succeed."""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        status: int | None = None,
        server_text: str = "",
        is_cut: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.is_cut = is_cut
        self.status = status
        self.server_text = server_text


class ServerDown(OllamaError):
    pass


class ModelMissing(OllamaError):
    pass


class AccessDenied(OllamaError):
    pass


class VersionTooOld(OllamaError):
    pass


class GarbledAnswer(OllamaError):
    pass


class ServerDiskFull(OllamaError, StorageError):
    exit_code = 5


def connection_lost(url: str, reason: str, *, doing: str) -> OllamaError:
    """The connection broke before the answer began."""
    return OllamaError(
        f"The connection to the Ollama server at {url} was lost when it was asked to {doing} ({reason}).",
        hint="Look at its log (`journalctl -u ollama`, or ~/.ollama/logs) and try again.",
        is_cut=True,
    )


def server_down(url: str, reason: str) -> ServerDown:
    """Nobody answers at `url`."""
    return ServerDown(
        f"No Ollama server answers at {url} ({reason}).",
        hint="Start it with `ollama serve` or the Ollama app, or name another with OLLAMA_HOST."
        " Export works without a server: leave out --create and import the written Modelfile later.",
    )


def server_silent(url: str, seconds: float, what: str) -> ServerDown:
    """The server took the request and then said nothing for `seconds`."""
    return ServerDown(
        f"The Ollama server at {url} sent nothing for {seconds:g} s while {what}.",
        hint="Look at its log (`journalctl -u ollama`, or ~/.ollama/logs); it may be out of memory or stuck.",
    )


def error_for(status: int | None, text: str, *, doing: str) -> OllamaError:
    """The typed error for an answer that says `text`. `doing` completes 'The server refused to …'."""
    said = printable(text.strip(), limit=_MAX_TEXT)
    if _DISK_FULL.search(text):
        return ServerDiskFull(
            f"The Ollama server has no disk space left to {doing}: {said}.",
            hint="Free space where it keeps its models (OLLAMA_MODELS of the server): `ollama list`, `ollama rm`.",
            status=status, server_text=text,
        )  # fmt: skip
    if _MISSING.search(text):
        where = "registry" if "manifest" in text else "server"
        return ModelMissing(
            f"Cannot {doing}: the {where} says: {said}.",
            hint="Check the name (`ollama list`, https://ollama.com/library), or pull it first with `ollama pull`.",
            status=status, server_text=text,
        )  # fmt: skip
    if status in (401, 403):
        return AccessDenied(
            f"The Ollama server does not let you {doing} (HTTP {status}: {said}).",
            hint="Set OLLAMA_API_KEY for the host it belongs to, or run `ollama signin`.",
            status=status, server_text=text,
        )  # fmt: skip
    code = f"HTTP {status}: " if status is not None and status >= 400 else ""
    return OllamaError(
        f"The Ollama server could not {doing} ({code}{said}).",
        hint=_hint(status, text), status=status, server_text=text,
    )  # fmt: skip


def error_for_answer(status: int, content_type: str, body: bytes, *, doing: str) -> OllamaError:
    """The typed error for a whole answer whose status is not 2xx."""
    text = body.decode("utf-8", errors="replace")
    if 300 <= status < 400:
        return GarbledAnswer(
            f"The server answered HTTP {status}, a redirect, when asked to {doing}; redirects are not followed.",
            hint="Set OLLAMA_HOST to the address where Ollama itself listens.",
            status=status,
        )
    if _is_html(content_type, text):
        return html_answer(status, text, doing=doing)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("error"):
        text = str(content["error"])
    elif status in (404, 405) and content is None:
        return VersionTooOld(
            f"The server cannot {doing} (HTTP {status}: {printable(text.strip(), limit=80)}).",
            hint="It is an old Ollama, or not Ollama at all: check `ollama --version` and OLLAMA_HOST.",
            status=status, server_text=text,
        )  # fmt: skip
    return error_for(status, text or "no explanation", doing=doing)


def html_answer(status: int, text: str, *, doing: str) -> GarbledAnswer:
    """Something sent a web page."""
    found = _TITLE.search(text)
    title = f" (`{printable(' '.join(found.group(1).split()), limit=60)}`)" if found else ""
    return GarbledAnswer(
        f"Asked to {doing}, the server sent a web page{title} with HTTP {status}: a proxy or another program"
        " answers in Ollama's place.",
        hint="Check OLLAMA_HOST, and add the host to NO_PROXY.",
        status=status,
    )


def garbled(reason: str, content: str, *, doing: str, is_cut: bool = False) -> GarbledAnswer:
    """An answer that is not what Ollama sends."""
    shown = f": `{printable(content, limit=60)}`" if content else ""
    return GarbledAnswer(
        f"Asked to {doing}, the server's answer {reason}{shown}.",
        hint="Try again; if it stays, check what listens at OLLAMA_HOST and its log.",
        is_cut=is_cut,
    )


def _is_html(content_type: str, text: str) -> bool:
    return "html" in content_type.lower() or text.lstrip()[:15].lower().startswith(
        ("<!doctype", "<html")
    )


def _hint(status: int | None, text: str) -> str:
    if "LoRA adapters are no longer supported" in text or "loras are not yet implemented" in text:
        return "Export the merged model instead: it works with every version."
    if "terminated" in text or "failed to load" in text:
        return "The model does not run: look at the server's log, and try a smaller num_ctx or a newer Ollama."
    if "digest mismatch" in text:
        return "The file changed or was damaged on its way: export it again."
    if status == 429:
        return "The server is busy: wait and try again."
    if status is not None and status >= 500:
        return "Look at the server's log (`journalctl -u ollama`, or ~/.ollama/logs)."
    return ""
