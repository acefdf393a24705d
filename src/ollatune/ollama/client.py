"""The client: Ollama's HTTP API as the rest of Ollatune uses it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from typing_extensions import Self

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.ollama.answers import (
    Generation,
    ListedModel,
    Progress,
    ProgressCallback,
    RunningModel,
    ShownModel,
)
from ollatune.ollama.endpoint import Endpoint, api_key_for, resolve_endpoint
from ollatune.ollama.failures import ModelMissing, OllamaError, ServerDown, VersionTooOld, garbled
from ollatune.ollama.names import ModelName, digest_hex
from ollatune.ollama.session import Call, Limits, Session
from ollatune.ollama.upload import upload_blob
from ollatune.ollama.versions import ServerVersion

_Made = TypeVar("_Made")


class OllamaClient:
    """A server named by `host` (default: OLLAMA_HOST, else this machine). Every failure is a ServiceError.

    Nothing is sent before the first call. `transport`, `sleep` and `clock` are for tests.
    """

    def __init__(
        self,
        host: str | None = None,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint: Endpoint = resolve_endpoint(host, environment)
        self.session = Session(
            self.endpoint,
            api_key=api_key or api_key_for(self.endpoint, environment),
            limits=limits,
            transport=transport,
            sleep=sleep,
            clock=clock,
        )
        self._version: ServerVersion | None = None
        if api_key and not self.endpoint.may_carry_key:
            raise UsageError(
                f"The API key is not sent to {self.endpoint.url}: the connection is not encrypted.",
                hint="Use https://, or leave the key out.",
            )
        if not self.endpoint.is_loopback:
            get_logger("ollama").info("Using the Ollama server at %s", self.endpoint.url)

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OllamaClient({self.endpoint.url!r})"

    # --- the server ---

    def version(self) -> ServerVersion:
        """The server's version, asked once; a version with known security holes is warned of."""
        if self._version is None:
            doing = "tell its version"
            answer = self.session.fetch(Call("GET", "/api/version", doing))
            if not isinstance(answer.get("version"), str):
                raise garbled("has no version", str(answer), doing=doing)
            self._version = ServerVersion.parse(answer["version"])
            if warning := self._version.security_warning:
                get_logger("ollama").warning("%s", warning)
        return self._version

    def is_running(self) -> bool:
        """Whether a server answers. Other failures than an absent server are raised."""
        try:
            self.version()
        except ServerDown:
            return False
        return True

    def require(self, is_offered: bool, what: str, since: str) -> None:
        """Raise VersionTooOld unless `is_offered`."""
        if not is_offered:
            raise VersionTooOld(
                f"Ollama {self.version()} cannot {what}: that came with {since}.",
                hint="Update Ollama (https://ollama.com/download).",
            )

    # --- models ---

    def list(self) -> Sequence[ListedModel]:
        """The models the server has, newest first."""
        call = Call("GET", "/api/tags", "list its models")
        answer = self.session.fetch(call)
        return _made(lambda: [ListedModel.of(row) for row in answer["models"] or []], call.doing)

    def ps(self) -> Sequence[RunningModel]:
        """The models that are loaded now."""
        call = Call("GET", "/api/ps", "list the loaded models")
        answer = self.session.fetch(call)
        return _made(lambda: [RunningModel.of(row) for row in answer["models"] or []], call.doing)

    def show(self, name: str) -> ShownModel:
        """What the server knows of a model. Raises ModelMissing."""
        call = Call("POST", "/api/show", f"show `{name}`", body={"model": _sent(name)})
        answer = self.session.fetch(call)
        return _made(lambda: ShownModel.of(name, answer), call.doing)

    def has(self, name: str) -> bool:
        """Whether the server has the model."""
        try:
            self.show(name)
        except ModelMissing:
            return False
        return True

    def pull(self, name: str, *, progress: ProgressCallback | None = None) -> None:
        """Download a model. A transfer that is cut is taken up where it was, as long as it advances.

        Raises ModelMissing where the registry does not have it.
        """
        body = {"model": _sent(name), "stream": True}
        call = Call("POST", "/api/pull", f"pull `{name}`", body=body, is_work=True)
        self._until_success(
            call, progress, attempts=1 + len(self.session.limits.retry_waits_seconds)
        )

    def create(
        self, request: Mapping[str, Any], *, progress: ProgressCallback | None = None
    ) -> None:
        """`/api/create` with `request` as its JSON. Raises OllamaError unless the server says `success` at the end.

        It is sent once: an error of the model's making would be the same again.
        """
        self.require(self.version().has_json_create, "create models from JSON", "0.5.5")
        call = Call(
            "POST", "/api/create", f"create `{request.get('model')}`",
            body={**request, "stream": True}, is_work=True, may_repeat=False,
        )  # fmt: skip
        self._until_success(call, progress, attempts=1)

    def push(
        self, name: str, *, progress: ProgressCallback | None = None, insecure: bool = False
    ) -> None:
        """Upload a model to the registry in its name; only where the user asked for just that."""
        body = {"model": _sent(name), "stream": True, "insecure": insecure}
        call = Call("POST", "/api/push", f"push `{name}`", body=body, is_work=True)
        self._until_success(
            call, progress, attempts=1 + len(self.session.limits.retry_waits_seconds)
        )

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name, replacing what had it. Raises ModelMissing."""
        body = {"source": _sent(source), "destination": _sent(destination)}
        self.session.fetch(
            Call("POST", "/api/copy", f"copy `{source}` to `{destination}`", body=body)
        )

    def delete(self, name: str) -> None:
        """Remove a model from the server. Raises ModelMissing."""
        body = {"model": _sent(name)}
        self.session.fetch(
            Call("DELETE", "/api/delete", f"delete `{name}`", body=body, may_repeat=False)
        )

    # --- blobs ---

    def blob_exists(self, digest: str) -> bool:
        """Whether the server has a blob. Raises InputError for what is no digest."""
        path = f"/api/blobs/sha256:{digest_hex(digest)}"
        return self.session.status(Call("HEAD", path, "look for a blob")) == 200

    def upload_blob(
        self, path: Path, *, digest: str | None = None, progress: ProgressCallback | None = None
    ) -> str:
        """Send a file unless the server has it; returns its digest. See `upload.upload_blob`."""
        return upload_blob(self.session, self.blob_exists, path, digest=digest, progress=progress)

    # --- generation ---

    def generate(self, model: str, prompt: str, **options: Any) -> Generation:
        """Complete a prompt; the whole answer. Keywords as for `stream_generate`."""
        parts = list(self.stream_generate(model, prompt, **options))
        return _made(lambda: Generation.of(parts), f"generate with `{model}`")

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer a conversation; the whole answer. Keywords as for `stream_chat`."""
        parts = list(self.stream_chat(model, messages, **options))
        return _made(lambda: Generation.of(parts), f"chat with `{model}`")

    def stream_generate(
        self, model: str, prompt: str, *, logprobs: int | None = None, **fields: Any
    ) -> Iterator[Mapping[str, Any]]:
        """The parts of a completion as they come. `logprobs` asks for so many alternatives per token (0 to 20).

        Other keywords are fields of the request: options, system, template, raw, format, think, keep_alive, …
        """
        body = {"model": _sent(model), "prompt": prompt, **fields}
        return self._parts("/api/generate", body, logprobs, f"generate with `{model}`")

    def stream_chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        logprobs: int | None = None,
        **fields: Any,
    ) -> Iterator[Mapping[str, Any]]:
        """The parts of an answer as they come. Keywords as for `stream_generate`, and tools."""
        body = {"model": _sent(model), "messages": list(messages), **fields}
        return self._parts("/api/chat", body, logprobs, f"chat with `{model}`")

    def render_chat(self, model: str, messages: Sequence[Mapping[str, Any]], **fields: Any) -> str:
        """The prompt that the server would give the model, nothing being run. Raises VersionTooOld before 0.11.5."""
        self.require(self.version().has_render_only, "show the prompt it makes", "0.11.5")
        doing = f"render a prompt with `{model}`"
        body = {
            "model": _sent(model), "messages": list(messages), "stream": False,
            "_debug_render_only": True, **fields,
        }  # fmt: skip
        answer = self.session.fetch(Call("POST", "/api/chat", doing, body=body))
        rendered = _made(lambda: answer["_debug_info"]["rendered_template"], doing)
        if not isinstance(rendered, str):
            raise garbled("has no rendered prompt", str(answer), doing=doing)
        return rendered

    def load(self, model: str, **fields: Any) -> None:
        """Load a model without generating. Raises OllamaError where it does not run."""
        body = {"model": _sent(model), "messages": [], "stream": False, **fields}
        call = Call("POST", "/api/chat", f"load `{model}`", body=body, starts_slowly=True)
        self.session.fetch(call)

    def unload(self, model: str) -> None:
        """Free the memory that a model takes."""
        body = {"model": _sent(model), "keep_alive": 0, "stream": False}
        self.session.fetch(Call("POST", "/api/generate", f"unload `{model}`", body=body))

    # --- inside ---

    def _parts(
        self, path: str, body: dict[str, Any], logprobs: int | None, doing: str
    ) -> Iterator[Mapping[str, Any]]:
        if logprobs is not None:
            self.require(self.version().has_logprobs, "give log-probabilities", "0.12.11")
            body = {**body, "logprobs": True, "top_logprobs": logprobs}
        is_done = False
        call = Call("POST", path, doing, body={**body, "stream": True}, starts_slowly=True)
        for part in self.session.events(call):
            is_done = bool(part.get("done"))
            yield part
        if not is_done:
            raise garbled("ended before it was complete", "", doing=doing)

    def _until_success(
        self, call: Call, progress: ProgressCallback | None, *, attempts: int
    ) -> None:
        """Follow a stream of events to its `success`. After a cut, try again; attempts count anew if it advanced."""
        furthest, left = 0, attempts
        while True:
            try:
                status = ""
                for event in self.session.events(call):
                    status = str(event.get("status") or "")
                    completed, total = _count(event, "completed"), _count(event, "total")
                    if completed > furthest:
                        furthest, left = completed, attempts
                    if progress:
                        digest = str(event.get("digest") or "")
                        progress(Progress(status, digest, completed, total))
                if status == "success":
                    return
                raise garbled(
                    f"ended after `{status or 'nothing'}` instead of `success`",
                    "",
                    doing=call.doing,
                    is_cut=True,
                )
            except OllamaError as error:
                left -= 1
                if not error.is_cut or left <= 0:  # what the server itself reports is final
                    raise
                waits = self.session.limits.retry_waits_seconds
                self.session.pause(waits[min(attempts - left, len(waits)) - 1])


def _sent(name: str) -> str:
    """`name` as it is given to the server. Raises UsageError for what is no model name."""
    ModelName.parse(name)
    return name


def _count(event: Mapping[str, Any], key: str) -> int:
    value = event.get(key)
    return value if isinstance(value, int) else 0


def _made(make: Callable[[], _Made], doing: str) -> _Made:
    """What `make` makes of an answer. Raises GarbledAnswer where the answer's parts are not of the right kind."""
    try:
        return make()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise garbled(f"lacks something or has it wrong ({error!r})", "", doing=doing) from error
