"""The server itself: routes, blobs, pulls."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import ThreadingHTTPServer
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
from tests.fake_ollama.wire import JSON, STREAM_ERROR, Cut, Wire

PULL_STEPS = 10

ROUTES = {
    "/": ("GET", "HEAD"), "/api/version": ("GET", "HEAD"), "/api/tags": ("GET", "HEAD"), "/api/ps": ("GET",),
    "/api/show": ("POST",), "/api/create": ("POST",), "/api/pull": ("POST",), "/api/push": ("POST",),
    "/api/copy": ("POST",),
    "/api/delete": ("DELETE",), "/api/generate": ("POST",), "/api/chat": ("POST",),
    "/v1/chat/completions": ("POST",),
}  # fmt: skip


class FakeOllama:
    """A server on loopback, on a free port unless one is named; a context manager.

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
        port: int = 0,
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
        self._http = _Server(("127.0.0.1", port), _Handler)
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


class _Handler(Wire):
    server: _Server

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

    def _push(self, body: dict[str, Any]) -> None:
        self._send_events(
            self._push_events(str(body.get("model") or "")), is_stream=body.get("stream", True)
        )

    def _push_events(self, given: str) -> Iterator[dict[str, Any]]:
        """To the registry, if there is one; ollama.com needs a namespace of the user's own."""
        yield {"status": "retrieving manifest"}
        model = self.fake.store.read(ModelName.parse(given))
        if model is None:
            raise ApiError(404, f"model '{given}' not found")
        if model.name.namespace == "library":
            raise ApiError(
                400,
                "you are not authorized to push to this namespace, create the model under a namespace you own",
            )
        registry = self.fake.registry
        if registry is None:
            raise ApiError(500, "dial tcp: lookup registry.ollama.ai: no such host")
        for layer in model.layers:
            registry.add_file(self.fake.store.blob_path(layer["digest"]))
            size = layer["size"]
            yield {
                "status": f"pushing {layer['digest'][7:19]}",
                "digest": layer["digest"],
                "total": size,
                "completed": size,
            }
        yield {"status": "pushing manifest"}
        registry.write(model.name, model.layers, model.config)
        yield {"status": "success"}

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
