"""What a user sees when the server is down, slow, broken, in the way or full; each with its exact message."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollatune.base.errors import InputError, OllatuneError
from ollatune.ollama.answers import Progress
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import GarbledAnswer, OllamaError, ServerDiskFull, ServerDown
from ollatune.ollama.publish import ModelToPublish, publish
from ollatune.ollama.session import Call, Limits
from tests.fake_ollama import FakeOllama, Fault
from tests.parity.test_ollama_recordings import write_stand_in

LIMITS = Limits(idle_seconds=0.3, work_seconds=0.6, jitter_fraction=0.0)


@dataclass
class Bench:
    """A server with a model `m`, a client, and the waits the client asked for (none is really waited)."""

    server: FakeOllama
    client: OllamaClient
    weights: Path
    waits: list[float]

    def script(self, *faults: Fault) -> None:
        self.server.faults = list(faults)
        self.server.requests.clear()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    waits: list[float] = []
    weights = write_stand_in(tmp_path / "weights.gguf")
    with (
        FakeOllama(tmp_path / "models", "0.24.0") as server,
        OllamaClient(server.url, limits=LIMITS, environment={}, sleep=waits.append) as client,
    ):
        client.create({"model": "m", "files": {"m.gguf": client.upload_blob(weights)}})
        server.requests.clear()
        yield Bench(server, client, weights, waits)


def failure(call: Callable[[], Any]) -> OllatuneError:
    with pytest.raises(OllatuneError) as caught:
        call()
    return caught.value


def ask_version(url: str) -> None:
    with OllamaClient(url, environment={}) as client:
        client.version()


LOG_HINT = "Look at the server's log (`journalctl -u ollama`, or ~/.ollama/logs)."
GARBLED_HINT = "Try again; if it stays, check what listens at OLLAMA_HOST and its log."


# --- R15: down, slow, broken ---


def test_down_is_said_within_two_seconds() -> None:
    now = [0.0]  # seconds waited: how fast the machine is must not decide

    def wait(seconds: float) -> None:
        now[0] += seconds

    with OllamaClient("127.0.0.1:9", environment={}, sleep=wait, clock=lambda: now[0]) as client:
        error = failure(client.version)
    assert 0 < now[0] < 2.0
    assert isinstance(error, ServerDown)
    assert error.exit_code == 4
    assert str(error) == (
        "No Ollama server answers at http://127.0.0.1:9 (Connection refused). Start it with `ollama serve` or the"
        " Ollama app, or name another with OLLAMA_HOST. Export works without a server: leave out --create and import"
        " the written Modelfile later."
    )


def test_a_host_that_does_not_answer_is_not_tried_twice() -> None:
    now = [0.0]
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        assert request.extensions["timeout"]["connect"] == 2.0
        now[0] += 2.0
        raise httpx.ConnectTimeout("timed out")

    with OllamaClient(
        "10.255.255.1", environment={}, transport=httpx.MockTransport(handler), clock=lambda: now[0],
    ) as client:  # fmt: skip
        error = failure(client.version)
    assert calls == 1
    assert (
        error.args[0]
        == "No Ollama server answers at http://10.255.255.1:11434 (no connection in time)."
    )


def test_a_server_that_comes_up_is_found(bench: Bench) -> None:
    refused = [True, True]

    def handler(request: httpx.Request) -> httpx.Response:
        if refused:
            refused.pop()
            raise httpx.ConnectError("[Errno 111] Connection refused")
        return httpx.Response(200, json={"version": "0.24.0"})

    waits: list[float] = []
    with OllamaClient(
        environment={}, limits=LIMITS, transport=httpx.MockTransport(handler), sleep=waits.append
    ) as client:
        assert client.version().text == "0.24.0"
    assert waits == [0.5, 1.0]


def test_slow_but_alive_is_waited_for(bench: Bench) -> None:
    bench.script(Fault("/api/ps", "drip", seconds=0.05))
    started = time.monotonic()
    assert bench.client.ps() == []
    assert (
        time.monotonic() - started > LIMITS.idle_seconds
    )  # longer than the limit, which is on silence only


@pytest.mark.parametrize(
    ("fault", "call", "expected"),
    [
        (
            Fault("/api/tags", "silence", seconds=1.0, after=5),
            lambda client: client.list(),
            "The Ollama server at {url} sent nothing for 0.3 s while asked to list its models. Look at its log"
            " (`journalctl -u ollama`, or ~/.ollama/logs); it may be out of memory or stuck.",
        ),
        (
            Fault("/api/tags", "delay", seconds=1.0),
            lambda client: client.list(),
            "The Ollama server at {url} sent nothing for 0.3 s while asked to list its models. Look at its log"
            " (`journalctl -u ollama`, or ~/.ollama/logs); it may be out of memory or stuck.",
        ),
        (
            Fault("/api/chat", "silence", seconds=1.0, after=1),
            lambda client: client.chat("m", [{"role": "user", "content": "x"}]),
            "The Ollama server at {url} sent nothing for 0.3 s while asked to chat with `m`. Look at its log"
            " (`journalctl -u ollama`, or ~/.ollama/logs); it may be out of memory or stuck.",
        ),
        (
            Fault("/api/tags", "status", status=503, body='{"error":"server busy"}', times=9),
            lambda client: client.list(),
            "The Ollama server could not list its models (HTTP 503: server busy). " + LOG_HINT,
        ),
        (
            Fault("/api/tags", "status", status=500, body='{"error":"boom"}', times=9),
            lambda client: client.list(),
            "The Ollama server could not list its models (HTTP 500: boom). " + LOG_HINT,
        ),
        (
            Fault("/api/chat", "status", status=429, body='{"error":"slow down"}', times=9),
            lambda client: client.chat("m", [{"role": "user", "content": "x"}]),
            "The Ollama server could not chat with `m` (HTTP 429: slow down). The server is busy: wait and try again.",
        ),
        (
            Fault("/api/tags", "status", status=429, body='{"error":"x"}', headers={"retry-after": "3600"}),
            lambda client: client.list(),
            "The Ollama server could not list its models (HTTP 429: x). The server is busy: wait and try again.",
        ),
        (
            Fault("/api/show", "status", status=400, body='{"error":"invalid model name"}'),
            lambda client: client.show("m"),
            "The Ollama server could not show `m` (HTTP 400: invalid model name).",
        ),
        (
            Fault("/api/nothing", "status"),
            lambda client: client.show("absent"),
            "Cannot show `absent`: the server says: model 'absent' not found. Check the name (`ollama list`,"
            " https://ollama.com/library), or pull it first with `ollama pull`.",
        ),
        (
            Fault("/api/tags", "status", status=401, body='{"error":"unauthorized"}'),
            lambda client: client.list(),
            "The Ollama server does not let you list its models (HTTP 401: unauthorized). Set OLLAMA_API_KEY for the"
            " host it belongs to, or run `ollama signin`.",
        ),
        (
            Fault("/api/tags", "garbage", body="{models: oops"),
            lambda client: client.list(),
            "Asked to list its models, the server's answer is not JSON: `{{models: oops`. " + GARBLED_HINT,
        ),
        (
            Fault("/api/tags", "garbage", body="[1, 2]"),
            lambda client: client.list(),
            "Asked to list its models, the server's answer is not a JSON object: `[1, 2]`. " + GARBLED_HINT,
        ),
        (
            Fault("/api/tags", "cut_response", after=9),
            lambda client: client.list(),
            "Asked to list its models, the server's answer was cut off (peer closed connection without sending"
            " complete message body",
        ),
        (
            Fault("/api/chat", "end_early", after=1),
            lambda client: client.chat("m", [{"role": "user", "content": "x"}]),
            "Asked to chat with `m`, the server's answer ended before it was complete. " + GARBLED_HINT,
        ),
        (
            Fault("/api/chat", "error_event", after=1, body="llama runner process has terminated: signal: killed"),
            lambda client: client.chat("m", [{"role": "user", "content": "x"}]),
            "The Ollama server could not chat with `m` (llama runner process has terminated: signal: killed). The"
            " model does not run: look at the server's log, and try a smaller num_ctx or a newer Ollama.",
        ),
        (
            Fault("/api/tags", "status", status=200, body="<html><title>Sign in\n here</title></html>",
                  headers={"content-type": "text/html"}),
            lambda client: client.list(),
            "Asked to list its models, the server sent a web page (`Sign in here`) with HTTP 200: a proxy or another"
            " program answers in Ollama's place. Check OLLAMA_HOST, and add the host to NO_PROXY.",
        ),
        (
            Fault("/api/tags", "status", status=403, body="<!DOCTYPE html><p>blocked", times=9),
            lambda client: client.list(),
            "Asked to list its models, the server sent a web page with HTTP 403: a proxy or another program answers"
            " in Ollama's place. Check OLLAMA_HOST, and add the host to NO_PROXY.",
        ),
        (
            Fault("/api/tags", "status", status=302, headers={"location": "http://127.0.0.1:9/"}),
            lambda client: client.list(),
            "The server answered HTTP 302, a redirect, when asked to list its models; redirects are not followed. Set"
            " OLLAMA_HOST to the address where Ollama itself listens.",
        ),
        (
            Fault("/api/version", "status", status=404, body="404 page not found"),
            lambda client: ask_version(client.endpoint.url),
            "The server cannot tell its version (HTTP 404: 404 page not found). It is an old Ollama, or not Ollama at"
            " all: check `ollama --version` and OLLAMA_HOST.",
        ),
        (
            Fault("/api/create", "error_event", after=1, body="write blob: no space left on device"),
            lambda client: client.create({"model": "n", "from": "m"}),
            "The Ollama server has no disk space left to create `n`: write blob: no space left on device. Free space"
            " where it keeps its models (OLLAMA_MODELS of the server): `ollama list`, `ollama rm`.",
        ),
        (
            Fault("/api/create", "end_early", after=3),
            lambda client: client.create({"model": "n", "from": "m"}),
            "Asked to create `n`, the server's answer ended after `using existing layer sha256:f02dd72bb2423204352eabc"
            "5637b44d79d17f109fdb510a7c51455892aa2d216` instead of `success`. "
            + GARBLED_HINT,
        ),
        (
            Fault("/api/create", "cut_response", after=1),
            lambda client: client.create({"model": "n", "from": "m"}),
            "Asked to create `n`, the server's answer was cut off (peer closed connection without sending complete"
            " message body (incomplete chunked read)). " + GARBLED_HINT,
        ),
        (
            Fault("/api/nothing", "status"),
            lambda client: client.create({"model": "n", "files": {"n.gguf": "sha256:" + "2" * 64}}),
            "The Ollama server could not create `n` (open {root}/blobs/sha256-" + "2" * 64
            + ": no such file or directory).",
        ),
        (
            Fault("/api/nothing", "status"),
            lambda client: client.create({"model": "n", "from": "m", "template": "{{ if }}"}),
            "The Ollama server could not create `n` (HTTP 400: template error: template: :1: missing value for if).",
        ),
        (
            Fault("/api/pull", "end_early", after=1, times=9),
            lambda client: client.pull("n"),
            "Asked to pull `n`, the server's answer ended after `pulling manifest` instead of `success`. "
            + GARBLED_HINT,
        ),
        (
            Fault("/api/pull", "cut_request", fraction=1.0, times=99),
            lambda client: client.pull("n"),
            "The connection to the Ollama server at {url} was lost when it was asked to pull `n` (Server disconnected"
            " without sending a response.). Look at its log (`journalctl -u ollama`, or ~/.ollama/logs) and try"
            " again.",
        ),
    ],
)  # fmt: skip
def test_the_message_is_exact(
    bench: Bench, fault: Fault, call: Callable[[OllamaClient], Any], expected: str
) -> None:
    bench.client.version()
    before = sorted(path.name for path in (bench.server.store.root / "blobs").iterdir())
    bench.script(Fault(**vars(fault)))
    error = failure(lambda: call(bench.client))
    wanted = expected.replace("{url}", bench.server.url).replace(
        "{root}", str(bench.server.store.root)
    )
    wanted = wanted.replace("{{models", "{models")
    if wanted.endswith("message body"):
        assert str(error).startswith(wanted)
    else:
        assert str(error) == wanted
    assert error.exit_code == (5 if isinstance(error, ServerDiskFull) else 4)
    # Nothing is left behind in the store.
    assert [model.name.short for model in bench.server.store.models()] == ["m:latest"]
    assert sorted(path.name for path in (bench.server.store.root / "blobs").iterdir()) == before


def test_twice_broken_then_fine(bench: Bench) -> None:
    bench.script(
        Fault("/api/tags", "status", status=500, body="{}", times=1),
        Fault("/api/tags", "status", status=503),
    )
    assert [row.name for row in bench.client.list()] == ["m:latest"]
    assert bench.waits == [0.5, 1.0]
    assert bench.server.paths() == ["GET /api/tags"] * 3


def test_retries_end(bench: Bench) -> None:
    bench.script(Fault("/api/tags", "status", status=502, body="{}", times=9))
    failure(bench.client.list)
    assert bench.waits == [0.5, 1.0, 2.0]
    assert len(bench.server.requests) == 4


def test_waits_are_spread(bench: Bench) -> None:
    bench.script(Fault("/api/tags", "status", status=502, body="{}", times=9))
    waits: list[float] = []
    with OllamaClient(bench.server.url, environment={}, sleep=waits.append) as client:
        failure(client.list)
    assert all(
        base <= wait <= 1.1 * base for base, wait in zip((0.5, 1.0, 2.0), waits, strict=True)
    )


def test_retry_after_is_honoured_up_to_a_limit(bench: Bench) -> None:
    busy = {"status": 429, "body": "{}"}
    bench.script(
        Fault("/api/tags", "status", headers={"retry-after": "7"}, **busy),  # type: ignore[arg-type]
        Fault(
            "/api/tags", "status", headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, **busy
        ),  # type: ignore[arg-type]
        Fault("/api/tags", "status", headers={"retry-after": "61"}, **busy),  # type: ignore[arg-type]
    )
    failure(bench.client.list)
    assert bench.waits == [7.0, 1.0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_refusals_are_not_repeated(bench: Bench, status: int) -> None:
    bench.script(Fault("/api/tags", "status", status=status, body='{"error":"no"}', times=9))
    failure(bench.client.list)
    assert (bench.waits, len(bench.server.requests)) == ([], 1)


def test_a_creation_that_fails_is_not_repeated(bench: Bench) -> None:
    bench.client.version()
    bench.script(Fault("/api/create", "status", status=500, body='{"error":"no"}', times=9))
    failure(lambda: bench.client.create({"model": "n", "from": "m"}))
    assert (bench.waits, bench.server.paths()) == ([], ["POST /api/create"])


def test_a_redirect_is_not_followed_and_the_key_stays(tmp_path: Path, bench: Bench) -> None:
    with FakeOllama(tmp_path / "other") as other:
        bench.script(
            Fault("/api/tags", "status", status=307, headers={"location": other.url + "/api/tags"})
        )
        with OllamaClient(bench.server.url, api_key="secret-key", environment={}) as client:
            failure(client.list)
        assert other.requests == []
        assert bench.server.headers[-1]["authorization"] == "Bearer secret-key"


def test_a_connection_that_broke_is_made_again(bench: Bench) -> None:
    bench.script(Fault("/api/tags", "cut_request", fraction=1.0))
    assert [row.name for row in bench.client.list()] == ["m:latest"]
    assert bench.waits == [0.5]


# --- R16: blobs ---


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.gguf"
    path.write_bytes(bytes(range(256)) * 20_000)  # 5 MB: more than one chunk
    return path


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99, 1.0])
def test_a_cut_upload_is_sent_again(bench: Bench, large: Path, fraction: float) -> None:
    bench.script(Fault("/api/blobs/", "cut_request", method="POST", fraction=fraction, times=2))
    seen: list[Progress] = []
    digest = bench.client.upload_blob(large, progress=seen.append)
    assert bench.server.store.blob_path(digest).read_bytes() == large.read_bytes()
    assert bench.server.paths() == ["HEAD /api/blobs/", "POST /api/blobs/"] * 3
    amounts = [progress.completed for progress in seen]
    assert amounts == sorted(set(amounts))
    assert amounts[-1] == seen[-1].total == large.stat().st_size
    assert bench.waits == [0.5, 1.0]
    assert not [
        path for path in (bench.server.store.root / "blobs").iterdir() if "partial" in path.name
    ]


def test_uploads_that_stay_cut_are_given_up(bench: Bench, large: Path) -> None:
    bench.script(Fault("/api/blobs/", "cut_request", method="POST", times=99))
    error = failure(lambda: bench.client.upload_blob(large))
    assert isinstance(error, OllamaError)
    assert f"The connection to the Ollama server at {bench.server.url} was lost" in str(error)
    assert "asked to take the file large.gguf" in str(error)
    assert len(bench.server.requests) == 8


def test_an_upload_whose_answer_was_lost_is_not_sent_again(bench: Bench, large: Path) -> None:
    bench.script(Fault("/api/blobs/", "cut_response", method="POST", after=1))
    digest = bench.client.upload_blob(large)
    assert bench.server.paths() == ["HEAD /api/blobs/", "POST /api/blobs/", "HEAD /api/blobs/"]
    assert bench.server.store.blob_path(digest).stat().st_size == large.stat().st_size


MISMATCH = '{"error":"digest mismatch, expected \\"sha256:1\\", got \\"sha256:2\\""}'


def test_a_mismatch_on_the_way_is_hashed_and_sent_once_more(bench: Bench, large: Path) -> None:
    bench.script(Fault("/api/blobs/", "status", method="POST", status=400, body=MISMATCH))
    bench.client.upload_blob(large)
    assert bench.server.paths() == ["HEAD /api/blobs/", "POST /api/blobs/"] * 2


def test_a_mismatch_that_stays_is_an_error(bench: Bench, large: Path) -> None:
    bench.script(Fault("/api/blobs/", "status", method="POST", status=400, body=MISMATCH, times=9))
    error = failure(lambda: bench.client.upload_blob(large))
    assert str(error) == (
        'The Ollama server could not take the file large.gguf (HTTP 400: digest mismatch, expected "sha256:1", got'
        ' "sha256:2"). The file changed or was damaged on its way: export it again.'
    )
    assert bench.server.paths() == ["HEAD /api/blobs/", "POST /api/blobs/"] * 2


def test_a_wrong_digest_of_ours_is_found_by_hashing_again(bench: Bench, large: Path) -> None:
    bench.script()
    error = failure(lambda: bench.client.upload_blob(large, digest="sha256:" + "1" * 64))
    assert isinstance(error, InputError)
    assert f"{large} has the sha256 " in str(error)
    assert "1" * 64 + " was expected" in str(error)


@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_a_file_that_changes_on_the_way_is_noticed(bench: Bench, large: Path, change: str) -> None:
    bench.script()

    def disturb(progress: Progress) -> None:
        if progress.completed == 1 << 20:
            content = large.read_bytes()
            large.write_bytes(
                {"grow": content + b"x", "shrink": content[:-9], "touch": content}[change]
            )

    error = failure(lambda: bench.client.upload_blob(large, progress=disturb))
    assert isinstance(error, InputError)
    assert str(error) == (
        f"{large} changed while it was sent to the server. Nothing was created. Let its writer finish, then try again."
    )


def test_a_file_that_is_not_there(bench: Bench, tmp_path: Path) -> None:
    error = failure(lambda: bench.client.upload_blob(tmp_path / "none.gguf"))
    assert error.exit_code == 5
    assert (
        str(error)
        == f"Cannot read {tmp_path / 'none.gguf'}: No such file or directory. Check the path."
    )


def test_two_uploads_of_one_blob_are_one_transfer(bench: Bench, large: Path) -> None:
    bench.script()
    bench.client.upload_blob(large)
    bench.client.upload_blob(large)
    assert [path for path in bench.server.paths() if path.startswith("POST")] == [
        "POST /api/blobs/"
    ]


def test_two_clients_at_once_leave_one_whole_blob(bench: Bench, large: Path) -> None:
    bench.script()
    digests: list[str] = []

    def send() -> None:
        with OllamaClient(bench.server.url, environment={}) as client:
            digests.append(client.upload_blob(large))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(digests)) == 1
    assert len(digests) == 3
    assert bench.server.store.blob_path(digests[0]).read_bytes() == large.read_bytes()


# --- R17: create ---


def to_publish(weights: Path) -> ModelToPublish:
    return ModelToPublish(
        gguf=weights,
        template="{{ .Prompt }}",
        system="Be exact.",
        identity={"general.basename": "smollm2"},
    )


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_creation_cut_in_its_stream_is_completed_by_the_next_run(
    bench: Bench, after: int
) -> None:
    bench.script(Fault("/api/create", "cut_response", after=after))
    error = failure(lambda: publish(bench.client, "tuned", to_publish(bench.weights)))
    assert isinstance(error, GarbledAnswer)
    publish(bench.client, "tuned", to_publish(bench.weights))
    names = sorted(model.name.short for model in bench.server.store.models())
    assert names == ["m:latest", "tuned:latest"]
    assert bench.client.show("tuned").system == "Be exact."
    assert publish(bench.client, "tuned", to_publish(bench.weights)).was_there


def test_a_taken_name_is_never_overwritten(bench: Bench) -> None:
    bench.script()
    error = failure(lambda: publish(bench.client, "m", to_publish(bench.weights)))
    assert error.exit_code == 2
    assert str(error) == (
        "The server has a model m:latest already. Choose another name, or replace it with --force."
    )
    assert "POST /api/create" not in bench.server.paths()
    assert bench.client.show("m").system == ""


# --- whatever else may come ---

ANSWERS = [
    b"", b"null", b"3", b'"x"', b"[]", b"{}", b"[[]]", b'{"models":null}', b'{"models":{}}', b'{"models":[null]}',
    b'{"models":[{"size":"x"}]}', b'{"models":[{"size":-1,"details":3}]}', b'{"version":null}', b'{"version":[1]}',
    b'{"error":null}', b'{"error":{"code":3}}', b'{"error":"x"}\n{"done":true}', b'{"status":"success"}',
    b'{"status":"success","completed":"many","total":[]}', b'{"done":true}', b'{"done":true,"message":3}',
    b'{"done":true,"response":"x","logprobs":[{}]}', b'{"done":true,"logprobs":[{"logprob":"x"}]}',
    b'{"done":true,"eval_count":{},"message":{"content":null}}', b'{"done":true,"logprobs":3}', b'{"_debug_info":[]}',
    b'{"_debug_info":{"rendered_template":3}}', b'{"done":true,"total_duration":"x"}', b"\xff\xfe\x00", b"\x00" * 50,
    b"{" * 5000, b"[" * 200_000, b'{"modelfile":3,"template":[],"messages":5}', b'{"capabilities":4,"model_info":1}',
    b"<html></html>", b'{"done":true,"message":{"content":"ok","tool_calls":7}}', b'{"a":1e999}', b'{"a":NaN}',
]  # fmt: skip
CALLS: dict[str, Callable[[OllamaClient], Any]] = {
    "version": lambda c: c.version(),
    "list": lambda c: c.list(),
    "ps": lambda c: c.ps(),
    "show": lambda c: (c.show("m").parameters, c.show("m").architecture, c.show("m").blob_path),
    "pull": lambda c: c.pull("m", progress=lambda p: None),
    "push": lambda c: c.push("m"),
    "create": lambda c: c._until_success(create_call(), None, attempts=1),
    "copy": lambda c: c.copy("m", "n"),
    "delete": lambda c: c.delete("m"),
    "generate": lambda c: c.generate("m", "x"),
    "chat": lambda c: c.chat("m", [{"role": "user", "content": "x"}]),
    "unload": lambda c: c.unload("m"),
    "load": lambda c: c.load("m"),
}


def message_of(call: Callable[[], Any]) -> str:
    """The error's text, or "" where there is none. Any other exception is a failure of the test."""
    try:
        call()
    except OllatuneError as error:
        return str(error)
    return ""


def create_call() -> Call:
    return Call("POST", "/api/create", "create `m`", body={}, may_repeat=False)


@pytest.mark.parametrize("name", CALLS)
def test_any_answer_is_understood_or_one_of_our_errors(name: str) -> None:
    current = httpx.Response(200)
    transport = httpx.MockTransport(
        lambda request: httpx.Response(current.status_code, content=current.content)
    )
    with OllamaClient(environment={}, transport=transport, sleep=lambda seconds: None) as client:
        for status in (200, 404, 500):
            for answer in ANSWERS[:: 8 if status == 500 else 1]:  # 500 is tried four times
                current = httpx.Response(status, content=answer)
                client._version = None
                message = message_of(lambda: CALLS[name](client))
                assert len(message) < 800
                assert "\x00" not in message


def test_rendering_takes_nothing_for_granted() -> None:
    for answer in ANSWERS:

        def handler(request: httpx.Request, answer: bytes = answer) -> httpx.Response:
            is_version = request.url.path == "/api/version"
            return httpx.Response(200, content=b'{"version":"0.24.0"}' if is_version else answer)

        with OllamaClient(environment={}, transport=httpx.MockTransport(handler)) as client:
            failure(lambda client=client: client.render_chat("m", []))  # type: ignore[misc]
