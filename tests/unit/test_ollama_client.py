"""The client against the test server. What is asked of real ones, too: tests/parity/test_server_contract.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from ollatune.base.errors import InputError, UsageError
from ollatune.ollama.answers import Generation, Progress
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import GarbledAnswer, ModelMissing, OllamaError, VersionTooOld
from ollatune.ollama.session import Limits
from tests.fake_ollama import FakeOllama, scripted_answer
from tests.fake_ollama.store import FakeStore
from tests.parity.test_ollama_recordings import write_stand_in

QUICK = Limits(idle_seconds=2.0, work_seconds=2.0, retry_waits_seconds=(0.01, 0.02, 0.04))
TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"


@pytest.fixture(params=["0.24.0", "0.32.15", "0.34.1"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeOllama]:
    words = scripted_answer("one", " two")
    with FakeOllama(tmp_path / "models", request.param, generate=words) as server:
        yield server


@pytest.fixture
def client(server: FakeOllama) -> Iterator[OllamaClient]:
    with OllamaClient(server.url, limits=QUICK, environment={}) as client:
        yield client


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_stand_in(tmp_path / "weights.gguf")


@pytest.fixture
def created(client: OllamaClient, weights: Path) -> OllamaClient:
    digest = client.upload_blob(weights)
    client.create(
        {"model": "m", "files": {"m.gguf": digest}, "template": TEMPLATE, "system": "Be brief.",
         "parameters": {"stop": ["<|end|>"], "num_ctx": 512, "temperature": 0}, "license": "MIT"}
    )  # fmt: skip
    return client


def test_version_is_asked_once(client: OllamaClient, server: FakeOllama) -> None:
    assert client.version().text == server.version
    assert client.version().text == server.version
    assert server.paths() == ["GET /api/version"]
    assert client.is_running()


def test_upload_create_show(created: OllamaClient, server: FakeOllama) -> None:
    shown = created.show("m")
    assert shown.template == TEMPLATE
    assert shown.system == "Be brief."
    assert shown.license == "MIT"
    assert shown.parameters == {"stop": ["<|end|>"], "num_ctx": 512, "temperature": 0}
    assert shown.architecture == "llama"
    assert shown.metadata["llama.context_length"] == 8192
    assert Path(shown.blob_path).is_file()
    assert Path(shown.blob_path).parent == server.store.root / "blobs"


def test_a_blob_is_sent_once(client: OllamaClient, server: FakeOllama, weights: Path) -> None:
    seen: list[Progress] = []
    digest = client.upload_blob(weights, progress=seen.append)
    assert client.upload_blob(weights, progress=seen.append) == digest
    assert server.paths() == ["HEAD /api/blobs/", "POST /api/blobs/", "HEAD /api/blobs/"]
    assert server.store.blob_path(digest).read_bytes() == weights.read_bytes()
    assert [(p.completed, p.total) for p in seen][-1] == (weights.stat().st_size,) * 2


def test_listing_and_running(created: OllamaClient) -> None:
    (row,) = created.list()
    assert (row.name, row.details["family"]) == ("m:latest", "llama")
    assert created.ps() == []
    created.load("m")
    (running,) = created.ps()
    assert (running.name, running.context_tokens, running.vram_bytes) == ("m:latest", 512, 0)
    created.unload("m")
    assert created.ps() == []


def test_generate_and_chat(created: OllamaClient, server: FakeOllama) -> None:
    answer = created.generate("m", "Say it", options={"num_predict": 1}, logprobs=3)
    assert (answer.text, answer.done_reason, answer.output_tokens) == ("one", "length", 1)
    assert [(item.text, item.raw, item.logprob) for item in answer.logprobs] == [
        ("one", b"one", -0.5)
    ]
    assert answer.logprobs[0].alternatives[0].raw == b"one"
    chat = created.chat("m", [{"role": "user", "content": "hi"}], options={"temperature": 0})
    assert (chat.text, chat.done_reason, chat.output_tokens) == ("one two", "stop", 3)
    assert chat.logprobs == ()
    assert chat.durations_ns["total"] == 1_000_000
    parts = list(created.stream_chat("m", [{"role": "user", "content": "hi"}]))
    assert [part["message"]["content"] for part in parts] == ["one", " two", ""]
    body = server.requests[-1][2]
    assert body["stream"] is True


def test_render_only(created: OllamaClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert created.render_chat("m", messages) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    )


def test_copy_delete_and_what_is_missing(created: OllamaClient) -> None:
    created.copy("m", "me/other:v1")
    assert {row.name for row in created.list()} == {"m:latest", "me/other:v1"}
    created.delete("m")
    assert not created.has("m")
    assert created.has("me/other:v1")
    for call in (created.delete, created.show, lambda name: created.copy(name, "x")):
        with pytest.raises(ModelMissing, match="not found") as caught:
            call("absent")
        assert caught.value.exit_code == 4
        assert caught.value.status == 404
    with pytest.raises(ModelMissing):
        created.chat("absent", [{"role": "user", "content": "x"}])


def test_names_are_checked_before_anything_is_sent(
    client: OllamaClient, server: FakeOllama
) -> None:
    for call in (client.show, client.pull, client.delete, client.unload):
        with pytest.raises(UsageError, match="is not a model name"):
            call("../../etc/passwd")
    with pytest.raises(InputError, match="is not a blob digest"):
        client.blob_exists("sha256:../../etc/passwd")
    assert server.requests == []


def test_pull_with_progress(
    client: OllamaClient, server: FakeOllama, tmp_path: Path, weights: Path
) -> None:
    registry = FakeStore(tmp_path / "registry")
    with (
        FakeOllama(tmp_path / "registry", "0.24.0") as maker,
        OllamaClient(maker.url, environment={}) as c,
    ):
        c.create({"model": "base:1b", "files": {"m.gguf": c.upload_blob(weights)}})
    server.registry = registry
    seen: list[Progress] = []
    client.pull("base:1b", progress=seen.append)
    assert seen[0].status == "pulling manifest"
    assert seen[-1].status == "success"
    amounts = [
        p.completed for p in seen if p.status.startswith("pulling ") and p.digest == seen[1].digest
    ]
    assert amounts == sorted(amounts)
    assert amounts[-1] == seen[1].total > 0
    assert client.has("base:1b")
    with pytest.raises(ModelMissing, match="file does not exist") as caught:
        client.pull("base:404")
    assert "the registry says" in str(caught.value)


def test_push_is_to_the_name(created: OllamaClient, server: FakeOllama, tmp_path: Path) -> None:
    server.registry = FakeStore(tmp_path / "registry")
    seen: list[Progress] = []
    created.copy("m", "me/m")
    created.push("me/m", progress=seen.append)
    assert seen[-1].status == "success"
    assert [model.name.short for model in server.registry.models()] == ["me/m:latest"]
    with pytest.raises(OllamaError, match="not authorized to push to this namespace"):
        created.push("m")


def test_the_official_client_gets_on_with_the_test_server(
    created: OllamaClient, server: FakeOllama, tmp_path: Path
) -> None:
    official = ollama.Client(server.url, trust_env=False)
    try:
        assert [model.model for model in official.list().models] == ["m:latest"]
        shown = official.show("m")
        assert shown.template == TEMPLATE
        assert shown.details is not None
        assert shown.details.format == "gguf"
        answer = official.chat("m", [{"role": "user", "content": "hi"}])
        assert (answer.message.content, answer.done_reason) == ("one two", "stop")
        streamed = official.generate("m", "hi", stream=True)
        assert [part.response for part in streamed] == ["one", " two", ""]
        made = official.create("n", from_="m", system="Other.", stream=True)
        assert [event.status for event in made][-1] == "success"
        assert official.ps().models[0].model == "m:latest"
        official.delete("n")
        with pytest.raises(ollama.ResponseError, match="not found"):
            official.show("n")
    finally:
        official.close()


def test_old_servers_say_what_they_lack(tmp_path: Path) -> None:
    with (
        FakeOllama(tmp_path / "models", "0.5.4") as server,
        OllamaClient(server.url, environment={}) as client,
    ):
        for call, since in (
            (lambda: client.create({"model": "m"}), "0.5.5"),
            (lambda: client.render_chat("m", [{"role": "user", "content": "x"}]), "0.11.5"),
            (lambda: client.generate("m", "x", logprobs=1), "0.12.11"),
        ):
            with pytest.raises(
                VersionTooOld, match=f"Ollama 0.5.4 cannot .*: that came with {since}"
            ):
                call()
        assert server.paths() == ["GET /api/version"]


def test_an_unsafe_server_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for version, warnings in (("0.17.0", 1), ("0.17.1", 0)):
        caplog.clear()
        with (
            caplog.at_level("WARNING", logger="ollatune"),
            FakeOllama(tmp_path / version, version) as server,
            OllamaClient(server.url, environment={}) as client,
        ):
            client.version()
            client.version()
        assert caplog.text.count("known security holes") == warnings


# --- what the transport sees ---


def transport(handler: Callable[[httpx.Request], httpx.Response]) -> dict[str, Any]:
    return {"transport": httpx.MockTransport(handler), "sleep": lambda seconds: None}


def test_the_key_is_a_header_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "secret-key")  # the official client would send it anywhere
    seen: list[httpx.Headers] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={"version": "0.24.0"})

    for host, environment in (
        ("http://example.com", {"OLLAMA_API_KEY": "secret-key"}),
        (None, {"OLLAMA_HOST": "https://example.com", "OLLAMA_API_KEY": "secret-key"}),
        (None, {}),
    ):
        with OllamaClient(host, environment=environment, **transport(handler)) as client:
            client.version()
    assert [headers.get("authorization") for headers in seen] == [None, "Bearer secret-key", None]
    assert all(headers["user-agent"].startswith("ollatune/") for headers in seen)


def test_loopback_is_never_reached_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, server: FakeOllama
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with OllamaClient(server.url, environment={}) as client:
        assert client.version().text == server.version


def test_a_path_before_the_api_is_kept() -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(200, json={"version": "0.24.0"})

    with OllamaClient(
        "https://example.com/behind/", environment={}, **transport(handler)
    ) as client:
        client.version()
    assert paths == ["/behind/api/version"]


@pytest.mark.parametrize(
    "answer",
    [{"models": 3}, {"models": ["x"]}, {"models": [{"size": "many"}]}, {}],
)
def test_rows_of_the_wrong_kind(answer: dict[str, Any]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answer)

    with (
        OllamaClient(environment={}, **transport(handler)) as client,
        pytest.raises(GarbledAnswer, match="lacks something or has it wrong"),
    ):
        client.list()


def test_a_version_that_is_none() -> None:
    for answer in ({}, {"version": 3}, {"version": "garbage"}):

        def handler(request: httpx.Request, answer: Any = answer) -> httpx.Response:
            return httpx.Response(200, json=answer)

        with (
            OllamaClient(environment={}, **transport(handler)) as client,
            pytest.raises(
                OllamaError if answer.get("version") != "garbage" else Exception, match="version"
            ),
        ):
            client.version()


def test_joining_parts() -> None:
    generation = Generation.of(
        [
            {"message": {"content": "a", "thinking": "t1"}, "done": False},
            {
                "message": {"content": "", "tool_calls": [{"function": {"name": "f"}}]},
                "done": False,
            },
            {"message": {"content": "b"}, "done": True, "done_reason": "stop", "eval_count": 2},
        ]
    )
    assert (generation.text, generation.thinking, generation.output_tokens) == ("ab", "t1", 2)
    assert generation.tool_calls == ({"function": {"name": "f"}},)


def test_nothing_here_imports_torch() -> None:
    modules = "client publish pull store modelfile versions"
    code = f"import sys; [__import__('ollatune.ollama.' + m) for m in {modules.split()!r}]"
    result = subprocess.run(
        [sys.executable, "-c", code + "; sys.exit('torch' in sys.modules)"], check=False
    )
    assert result.returncode == 0
