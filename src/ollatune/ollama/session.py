"""HTTP with our own limits, on the official client's httpx: time-outs, retries, strict answers, typed errors.

The official client waits forever, follows redirects, sends OLLAMA_API_KEY to whatever host is set, and takes a stream
that ends early for a complete one; none of that happens here.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import ollama

from ollatune import __version__
from ollatune.base.log import get_logger
from ollatune.ollama.endpoint import Endpoint
from ollatune.ollama.failures import (
    OllamaError,
    connection_lost,
    error_for,
    error_for_answer,
    garbled,
    html_answer,
    server_down,
    server_silent,
)

_MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """How long to wait. `idle` is between two pieces of an answer; `work` is where the server is known to be busy
    without a word: loading a model, hashing or rewriting a blob. No limit is on the whole."""

    connect_seconds: float = 2.0
    idle_seconds: float = 30.0
    work_seconds: float = 600.0
    retry_waits_seconds: tuple[float, ...] = (0.5, 1.0, 2.0)
    jitter_fraction: float = 0.1
    max_retry_after_seconds: float = 60.0


@dataclass(frozen=True)
class Call:
    """One request. `doing` completes 'The server could not …'.

    `starts_slowly`: the first word may take as long as `work_seconds`; `is_work`: every word may. `may_repeat`: sending
    it twice does no harm, so it is sent again after a lost connection and HTTP 500; any call is after 429 and 502-504.
    """

    method: str
    path: str
    doing: str
    body: Any = None
    content: Callable[[], Iterator[bytes]] | None = None
    headers: Mapping[str, str] | None = None
    starts_slowly: bool = False
    is_work: bool = False
    may_repeat: bool = True


_BUSY_STATUSES = frozenset((429, 502, 503, 504))


class Session:
    """A connection to one server. Close it, or use it in a `with` block."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.limits = limits or Limits()
        self._sleep = sleep
        self._clock = clock
        official = ollama.Client(
            endpoint.url,
            follow_redirects=False,
            timeout=self._timeout(is_work=False),
            # A proxy never stands between us and this machine.
            trust_env=not endpoint.is_loopback,
            transport=transport,
            # Reading the certificates takes longer than most requests.
            verify=endpoint.scheme == "https",
        )
        self._http: httpx.Client = official._client
        self._http.headers["user-agent"] = f"ollatune/{__version__}"
        # The official client sends OLLAMA_API_KEY to any host.
        self._http.headers.pop("authorization", None)
        if api_key and endpoint.may_carry_key:
            self._http.headers["authorization"] = f"Bearer {api_key}"

    def close(self) -> None:
        self._http.close()

    def pause(self, seconds: float) -> None:
        """Wait before another try."""
        self._sleep(seconds)

    def status(self, call: Call) -> int:
        """The status of an answer whose body does not matter. 404 is returned, other errors are raised."""
        with self._opened(call) as response:
            if response.is_success or response.status_code == 404:
                return response.status_code
            raise self._refusal(response, call)

    def fetch(self, call: Call) -> dict[str, Any]:
        """A JSON object. Raises OllamaError. An empty answer is {}."""
        with self._opened(call) as response:
            if not response.is_success:
                raise self._refusal(response, call)
            with self._translated(call):
                body = response.read()
        if not body:
            return {}
        return _object(body, response.headers.get("content-type", ""), call)

    def events(self, call: Call) -> Iterator[dict[str, Any]]:
        """The objects of an NDJSON stream, as they come. An `error` in one of them is raised, whatever the status."""
        with self._opened(call) as response:
            if not response.is_success:
                raise self._refusal(response, call)
            # The server was busy until its first word; from now on silence is suspicious.
            if not call.is_work:
                response.request.extensions.get("timeout", {})["read"] = self.limits.idle_seconds
            content_type = response.headers.get("content-type", "")
            with self._translated(call):
                for line in _lines(response, call):
                    event = _object(line, content_type, call)
                    if event.get("error"):
                        raise error_for(None, str(event["error"]), doing=call.doing)
                    yield event

    @contextmanager
    def _opened(self, call: Call) -> Iterator[httpx.Response]:
        response = self._send(call)
        try:
            yield response
        finally:
            response.close()

    def _send(self, call: Call) -> httpx.Response:
        """The answer's head, after retries."""
        started = self._clock()
        waits = iter(self.limits.retry_waits_seconds)
        while True:
            failure: OllamaError
            asked_wait: float | None = None
            is_connecting = False
            try:
                response = self._http.send(self._request(call), stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure, is_connecting = server_down(self.endpoint.url, _reason(error)), True
                failure.__cause__ = error
            except httpx.TimeoutException as error:
                raise self._silent(call) from error
            except httpx.TransportError as error:
                failure = connection_lost(self.endpoint.url, _reason(error), doing=call.doing)
                failure.__cause__ = error
                if not call.may_repeat:
                    raise failure from error
            else:
                if not self._is_temporary(response.status_code, call):
                    return response
                asked_wait = _retry_after(response)
                failure = self._refusal(response, call)
                response.close()
            wait = self._next_wait(waits, asked_wait)
            # A server that is down should be reported at once: no wait that would exceed the time to connect.
            if wait is None or (
                is_connecting and self._clock() - started + wait > self.limits.connect_seconds
            ):
                raise failure
            get_logger("ollama").debug("%s Trying again in %.1f s.", failure.message, wait)
            self._sleep(wait)

    def _request(self, call: Call) -> httpx.Request:
        content = call.content() if call.content else None
        return self._http.build_request(
            call.method,
            call.path,
            json=call.body,
            content=content,
            headers=dict(call.headers or {}),
            timeout=self._timeout(is_work=call.is_work or call.starts_slowly),
        )

    def _timeout(self, *, is_work: bool) -> httpx.Timeout:
        limits = self.limits
        read = limits.work_seconds if is_work else limits.idle_seconds
        return httpx.Timeout(limits.idle_seconds, connect=limits.connect_seconds, read=read)

    def _is_temporary(self, status: int, call: Call) -> bool:
        return status in _BUSY_STATUSES or (status == 500 and call.may_repeat)

    def _next_wait(self, waits: Iterator[float], asked: float | None) -> float | None:
        wait = next(waits, None)
        if wait is None:
            return None
        if asked is None:
            return wait * (1 + random.uniform(0, self.limits.jitter_fraction))
        return asked if asked <= self.limits.max_retry_after_seconds else None

    def _refusal(self, response: httpx.Response, call: Call) -> OllamaError:
        with self._translated(call):
            body = response.read()
        content_type = response.headers.get("content-type", "")
        return error_for_answer(response.status_code, content_type, body, doing=call.doing)

    def _silent(self, call: Call) -> OllamaError:
        is_work = call.is_work or call.starts_slowly
        seconds = self.limits.work_seconds if is_work else self.limits.idle_seconds
        return server_silent(self.endpoint.url, seconds, f"asked to {call.doing}")

    @contextmanager
    def _translated(self, call: Call) -> Iterator[None]:
        """Turn httpx's errors while a body is read into ours."""
        try:
            yield
        except httpx.TimeoutException as error:
            seconds = self.limits.work_seconds if call.is_work else self.limits.idle_seconds
            raise server_silent(self.endpoint.url, seconds, f"asked to {call.doing}") from error
        except httpx.TransportError as error:
            reason = f"was cut off ({_reason(error)})"
            raise garbled(reason, "", doing=call.doing, is_cut=True) from error
        except httpx.DecodingError as error:
            raise garbled(f"cannot be decoded ({error})", "", doing=call.doing) from error


def _lines(response: httpx.Response, call: Call) -> Iterator[bytes]:
    """Non-empty lines; a last one without its line end is given too."""
    buffer = b""
    for chunk in response.iter_bytes():
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(buffer) > _MAX_LINE_BYTES:
            raise garbled("has a line without an end", "", doing=call.doing)
    if buffer.strip():
        yield buffer


def _object(content: bytes, content_type: str, call: Call) -> dict[str, Any]:
    text = content.decode("utf-8", errors="replace")
    if "html" in content_type.lower():
        raise html_answer(200, text, doing=call.doing)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise garbled("is not JSON", text, doing=call.doing) from None
    if not isinstance(value, dict):
        raise garbled("is not a JSON object", text, doing=call.doing)
    return value


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of the Retry-After header; a date there is ignored."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "")))
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    return text.partition("] ")[2] or text if text.startswith("[Errno") else text
