"""HTTP: routes, streams, blobs, pulls and scripted faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from ollatune.ollama.names import ModelName
from tests.fake_ollama.answering import Answering, openai_answer
from tests.fake_ollama.create import ApiError, Creation
from tests.fake_ollama.faults import Fault
from tests.fake_ollama.generation import GenerateFunction, scripted_answer
from tests.fake_ollama.show import ps_row, shown, tags_row
from tests.fake_ollama.store import FakeStore

JSON = "application/json; charset=utf-8"
STREAM_ERROR = "application/json"
NDJSON = "application/x-ndjson"
PULL_STEPS = 10

ROUTES = {
    "/": ("GET", "HEAD"), "/api/version": ("GET", "HEAD"), "/api/tags": ("GET", "HEAD"), "/api/ps": ("GET",),
    "/api/show": ("POST",), "/api/create": ("POST",), "/api/pull": ("POST",), "/api/copy": ("POST",),
    "/api/delete": ("DELETE",), "/api/generate": ("POST",), "/api/chat": ("POST",),
    "/v1/chat/completions": ("POST",),
}  # fmt: skip


class Cut(Exception):
    """The connection is to be closed at once."""


class FakeOllama:
    """A server on a free loopback port; a context manager.

    Attributes:
        url: where it listens. store: what is on its disk. requests: (method, path, body) of each request, blobs' bodies
        as their length. faults: the script, first match first. registry: the store that `/api/pull` pulls from.
    """

    def __init__(
        self,
        store_root: Path,
        version: str = "0.24.0",
        *,
        faults: Sequence[Fault] = (),
        generate: GenerateFunction | None = None,
        registry: FakeStore | None = None,
    ) -> None:
        self.version = version
        self.numbers = tuple(int(part) for part in version.split("-")[0].split("."))
        self.store = FakeStore(store_root)
        self.faults = list(faults)
        self.generate = generate or scripted_answer("hello")
        self.registry = registry
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.loaded: dict[str, int] = {}
        self.pulled_bytes: dict[str, int] = {}
        self.lock = threading.RLock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.fake = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def paths(self) -> list[str]:
        """`METHOD path` of each request so far, blob digests left out."""
        return [f"{method} {path.partition('sha256:')[0]}" for method, path, _ in self.requests]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.applies(method, path):
                    fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> FakeOllama:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    fake: FakeOllama

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of the tests; anything else is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError | ValueError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are sent apart: without this every answer takes 40 ms
    server: _Server
    fault: Fault | None

    @property
    def fake(self) -> FakeOllama:
        return self.server.fake

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_DELETE = do_PUT = do_GET

    # --- one request ---

    def _handle(self) -> None:
        self.path = self.path.partition("?")[0]
        self.fault = self.fake.take_fault(self.command, self.path)
        try:
            self._apply_early_fault()
            if self.path.startswith("/api/blobs/"):
                self._blob(self.path.removeprefix("/api/blobs/"))
                return
            body = self._body()
            self._note(body)
            if self.fault and self.fault.kind in ("status", "garbage"):
                fault = self.fault
                status = fault.status if fault.kind == "status" else 200
                self._send(
                    status,
                    fault.body.encode(),
                    fault.headers.get("content-type", JSON),
                    fault.headers,
                )
                return
            self._route(body)
        except ApiError as error:
            self._send_error(error, JSON)
        except (Cut, ConnectionError):
            self._cut()

    def _apply_early_fault(self) -> None:
        fault = self.fault
        if fault is None:
            return
        if fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault.kind == "cut_request":
            length = int(self.headers.get("content-length", 0))
            self.rfile.read(int(length * fault.fraction))
            self._note(f"cut at {fault.fraction:.0%}")
            raise Cut

    def _note(self, body: Any) -> None:
        with self.fake.lock:
            self.fake.requests.append((self.command, self.path, body))
            self.fake.headers.append({key.lower(): value for key, value in self.headers.items()})

    def _body(self) -> Any:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not content:
            return None
        try:
            return json.loads(content)
        except ValueError:
            return content

    def _route(self, body: Any) -> None:
        methods = ROUTES.get(self.path)
        if methods is None:
            self._send(404, b"404 page not found", "text/plain")
            return
        if self.command not in methods:
            self._send(405, b"405 method not allowed", "text/plain")
            return
        if self.command in ("POST", "DELETE") and not isinstance(body, dict):
            raise ApiError(400, "missing request body" if body is None else "unexpected EOF")
        name = "_root" if self.path == "/" else "_" + self.path.rpartition("/")[2]
        getattr(self, name)(body)

    # --- routes ---

    def _root(self, body: Any) -> None:
        self._send(200, b"Ollama is running", "text/plain; charset=utf-8")

    def _version(self, body: Any) -> None:
        self._send_json({"version": self.fake.version})

    def _tags(self, body: Any) -> None:
        store, numbers = self.fake.store, self.fake.numbers
        self._send_json({"models": [tags_row(store, model, numbers) for model in store.models()]})

    def _ps(self, body: Any) -> None:
        fake = self.fake
        rows = []
        for name, num_ctx in fake.loaded.items():
            model = fake.store.read(ModelName.parse(name))
            if model:
                rows.append(ps_row(model, fake.numbers, num_ctx))
        self._send_json({"models": rows})

    def _show(self, body: dict[str, Any]) -> None:
        given = str(body.get("model") or body.get("name") or "")
        if not given:
            raise ApiError(400, "model is required")
        if not ModelName.is_valid(given):
            raise ApiError(400, "invalid model name")
        name = ModelName.parse(given)
        model = self.fake.store.read(name)
        if model is None:
            text = name.short if self.fake.numbers >= (0, 30, 0) else given
            raise ApiError(404, f"model '{text}' not found")
        verbose = bool(body.get("verbose"))
        self._send_json(shown(self.fake.store, model, self.fake.numbers, verbose=verbose))

    def _create(self, body: dict[str, Any]) -> None:
        with self.fake.lock:
            creation = Creation(self.fake.store, self.fake.numbers, body)
            self._send_events(creation.run(), is_stream=body.get("stream", True))

    def _pull(self, body: dict[str, Any]) -> None:
        self._send_events(
            self._pull_events(str(body.get("model") or "")), is_stream=body.get("stream", True)
        )

    def _pull_events(self, given: str) -> Iterator[dict[str, Any]]:
        if not ModelName.is_valid(given):
            raise ApiError(400, "invalid model name")
        yield {"status": "pulling manifest"}
        fake, registry = self.fake, self.fake.registry
        model = registry.read(ModelName.parse(given)) if registry else None
        if registry is None or model is None:
            raise ApiError(500, "pull model manifest: file does not exist")
        manifest = json.loads(registry.manifest_path(model.name).read_bytes())
        for layer in [*manifest["layers"], manifest["config"]]:
            yield from self._pull_layer(registry, layer["digest"])
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        path = fake.store.manifest_path(ModelName.parse(given))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(registry.manifest_path(model.name), path)
        yield {"status": "success"}

    def _pull_layer(self, registry: FakeStore, digest: str) -> Iterator[dict[str, Any]]:
        """Progress begins where an earlier, broken pull ended."""
        source, target = registry.blob_path(digest), self.fake.store.blob_path(digest)
        total = source.stat().st_size
        event = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
        done = total if target.exists() else self.fake.pulled_bytes.get(digest, 0)
        while done < total:
            done = min(total, done + -(-total // PULL_STEPS))
            self.fake.pulled_bytes[digest] = done
            yield {**event, "completed": done}
        if not target.exists():
            shutil.copyfile(source, target)
        yield {**event, "completed": total}

    def _copy(self, body: dict[str, Any]) -> None:
        source, destination = str(body.get("source")), str(body.get("destination"))
        for given in (source, destination):
            if not ModelName.is_valid(given):
                raise ApiError(
                    400, f'{"source" if given == source else "destination"} "{given}" is invalid'
                )
        with self.fake.lock:
            model = self.fake.store.read(ModelName.parse(source))
            if model is None:
                raise ApiError(404, f'model "{source}" not found')
            self.fake.store.copy(model, ModelName.parse(destination))
        self._send(200, b"", None)

    def _delete(self, body: dict[str, Any]) -> None:
        given = str(body.get("model") or body.get("name") or "")
        with self.fake.lock:
            model = self.fake.store.read(ModelName.parse(given))
            if model is None:
                raise ApiError(404, f"model '{given}' not found")
            self.fake.store.delete(model)
            self.fake.loaded.pop(model.name.short, None)
        self._send(200, b"", None)

    def _generate(self, body: dict[str, Any]) -> None:
        self._answer(body, is_chat=False)

    def _chat(self, body: dict[str, Any]) -> None:
        self._answer(body, is_chat=True)

    def _completions(self, body: dict[str, Any]) -> None:
        options = {key: body[key] for key in ("temperature", "seed", "top_p") if key in body}
        if "max_tokens" in body:
            options["num_predict"] = body["max_tokens"]
        request = {"model": body.get("model"), "messages": body.get("messages"), "options": options}
        answering = self._answering(request, is_chat=True)
        content = json.dumps(openai_answer(answering.whole())).encode() + b"\n"
        self._send(200, content, STREAM_ERROR)

    def _answering(self, body: Mapping[str, Any], *, is_chat: bool) -> Answering:
        fake = self.fake
        answering = Answering(fake.store, fake.numbers, body, fake.generate, is_chat=is_chat)
        name = answering.model.name.short
        if answering.unloads:
            fake.loaded.pop(name, None)
        elif not body.get("_debug_render_only"):
            fake.loaded[name] = answering.options.get("num_ctx", 4096)
        return answering

    def _answer(self, body: dict[str, Any], *, is_chat: bool) -> None:
        answering = self._answering(body, is_chat=is_chat)
        if body.get("stream", True) and not answering.is_empty:
            self._send_events(answering.parts(), is_stream=True)
        else:
            self._send_json(answering.whole())

    # --- blobs ---

    def _blob(self, digest: str) -> None:
        if not digest.startswith(("sha256:", "sha256-")) or len(digest) != 71:
            self._note(None)
            raise ApiError(400, "invalid digest format")
        path = self.fake.store.blob_path(digest)
        if self.command == "HEAD":
            self._note(None)
            if path.exists():
                self._send(200, b"", None)
            else:
                self._send(404, b"", JSON)
            return
        if self.command != "POST":
            self._send(405, b"405 method not allowed", "text/plain")
            return
        self._receive_blob(digest, path)

    def _receive_blob(self, digest: str, path: Path) -> None:
        length = int(self.headers.get("content-length", 0))
        self._note(length)
        if path.exists():  # answered before the body was read, as the real one does
            self._send(200, b"", None, {"connection": "close"})
            return
        if self.fault and self.fault.kind == "status":
            self.rfile.read(length)
            self._send(self.fault.status, self.fault.body.encode(), JSON, self.fault.headers)
            return
        staging = path.with_name(f"{path.name}-partial-{threading.get_ident()}")
        found = hashlib.sha256()
        left = length
        with staging.open("wb") as stream:
            while left and (chunk := self.rfile.read(min(left, 1 << 20))):
                found.update(chunk)
                stream.write(chunk)
                left -= len(chunk)
        if self.fault and self.fault.kind == "cut_response":
            staging.replace(path) if self.fault.after else staging.unlink()
            raise Cut
        if left:
            staging.unlink()
            raise Cut
        if f"sha256:{found.hexdigest()}" != digest.replace("-", ":"):
            staging.unlink()
            raise ApiError(
                400, f'digest mismatch, expected "{digest}", got "sha256:{found.hexdigest()}"'
            )
        staging.replace(path)
        self._send(201, b"", None)

    # --- answers ---

    def _send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        fault = self.fault
        if fault and fault.kind == "drip":
            self._head(200, JSON, {"content-length": str(len(content))})
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.seconds)
        elif fault and fault.kind in ("cut_response", "silence"):
            self._head(200, JSON, {"content-length": str(len(content))})
            self.wfile.write(content[: fault.after])
            if fault.kind == "silence":
                time.sleep(fault.seconds)
            raise Cut
        else:
            self._send(200, content, JSON)

    def _send_error(self, error: ApiError, content_type: str) -> None:
        content = json.dumps({"error": error.text}).encode()
        self._send(error.status, content, content_type)

    def _send_events(self, events: Iterable[dict[str, Any]], *, is_stream: bool) -> None:
        """NDJSON. An error before the first event has its status; a later one is an event."""
        iterator = iter(events)
        if not is_stream:
            try:
                last = [dict(event) for event in iterator][-1]
            except ApiError as error:
                self._send_error(error, STREAM_ERROR)
            else:
                self._send(200, json.dumps(last).encode(), STREAM_ERROR)
            return
        try:
            first = next(iterator)
        except ApiError as error:
            self._send_error(error, STREAM_ERROR)
            return
        self._head(200, NDJSON, {"transfer-encoding": "chunked"})
        for index, event in enumerate(self._with_errors(first, iterator)):
            if self._ends_at(index):
                return
            self._chunk(json.dumps(event).encode() + b"\n")
        self._chunk(b"")

    def _ends_at(self, index: int) -> bool:
        """Apply a fault that concerns the stream; True where the stream is over."""
        fault = self.fault
        if fault is None or index < fault.after:
            return False
        if fault.kind == "cut_response":
            raise Cut
        if fault.kind == "silence":
            time.sleep(fault.seconds)
            raise Cut
        if fault.kind == "error_event":
            self._chunk(json.dumps({"error": fault.body}).encode() + b"\n")
        if fault.kind in ("error_event", "end_early"):
            self._chunk(b"")
            return True
        return False

    def _with_errors(
        self, first: dict[str, Any], rest: Iterator[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        yield first
        try:
            yield from rest
        except ApiError as error:
            yield {"error": error.text}

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _send(
        self,
        status: int,
        content: bytes,
        content_type: str | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._head(status, content_type, {**(headers or {}), "content-length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, content_type: str | None, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        if content_type:
            self.send_header("Content-Type", content_type)
        for key, value in headers.items():
            if key.lower() != "content-type":
                self.send_header(key, value)
        self.end_headers()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
