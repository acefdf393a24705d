"""HTTP by hand: bodies, answers, NDJSON streams, and the places where scripted faults strike."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from tests.fake_ollama.create import ApiError
from tests.fake_ollama.faults import Fault

if TYPE_CHECKING:
    from tests.fake_ollama.server import FakeOllama

JSON = "application/json; charset=utf-8"
STREAM_ERROR = "application/json"
NDJSON = "application/x-ndjson"


class Cut(Exception):
    """The connection is to be closed at once."""


class Wire(BaseHTTPRequestHandler):
    """What every route needs. `fault` is the scripted fault of this request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # head and body are sent apart: without this every answer takes 40 ms
    )
    fault: Fault | None

    @property
    def fake(self) -> FakeOllama:
        return self.server.fake  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

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
