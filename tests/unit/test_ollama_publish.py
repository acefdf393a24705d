"""Publishing under a name, and getting a base onto this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollatune.base.errors import (
    InputError,
    OllatuneError,
    ServiceError,
    UsageError,
    VerificationError,
)
from ollatune.gguf.types import ValueType
from ollatune.gguf.writer import encode_metadata, write_gguf
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import OllamaError
from ollatune.ollama.publish import ModelToPublish, publish
from ollatune.ollama.pull import ensure_local
from ollatune.ollama.session import Limits
from ollatune.ollama.store import LocalStore
from tests.fake_ollama import FakeOllama, Fault, GenerationAnswer, GenerationRequest
from tests.fake_ollama.store import FakeStore
from tests.parity.test_ollama_recordings import write_stand_in
from tests.round_trip_place import dies_at_request

QUICK = Limits(idle_seconds=2.0, work_seconds=2.0, retry_waits_seconds=(0.01, 0.02, 0.04))
VERSIONS = ["0.24.0", "0.32.15", "0.34.1"]
TEMPLATE = "{{ range .Messages }}{{ .Content }}{{ end }}>"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_stand_in(tmp_path / "model.gguf")


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeOllama]:
    with FakeOllama(tmp_path / "models", request.param) as server:
        yield server


def connect(server: FakeOllama, **options: Any) -> OllamaClient:
    return OllamaClient(server.url, limits=QUICK, environment={}, **options)


def to_publish(weights: Path, **changes: Any) -> ModelToPublish:
    fields: dict[str, Any] = {
        "gguf": weights, "template": TEMPLATE, "system": "Be exact.", "licenses": ["MIT", "and more"],
        "parameters": {"stop": "<|end|>", "num_ctx": 512, "temperature": 0.5},
        "messages": [{"role": "user", "content": "hi"}],
        "identity": {"general.basename": "smollm2"},
    }  # fmt: skip
    return ModelToPublish(**{**fields, **changes})


def names(server: FakeOllama) -> list[str]:
    return sorted(model.name.short for model in server.store.models())


def test_the_name_appears_after_one_token_and_the_check(server: FakeOllama, weights: Path) -> None:
    seen_by_check: list[tuple[str, list[str]]] = []

    def check(staging: str) -> None:
        seen_by_check.append((staging, names(server)))

    with connect(server) as client:
        published = publish(client, "tuned", to_publish(weights), check=check)
        shown = client.show("tuned")
    staging = "tuned:latest-ollatune-staging"
    assert seen_by_check == [(staging, [staging])]
    assert names(server) == ["tuned:latest"]
    assert (published.name, published.was_there) == ("tuned:latest", False)
    assert server.paths() == [
        "GET /api/version", "POST /api/show", "HEAD /api/blobs/", "POST /api/blobs/", "POST /api/create",
        "POST /api/generate", "POST /api/copy", "DELETE /api/delete", "POST /api/show",
    ]  # fmt: skip
    assert (shown.template, shown.system, shown.license) == (TEMPLATE, "Be exact.", "MIT\nand more")
    assert shown.parameters == {"stop": ["<|end|>"], "num_ctx": 512, "temperature": 0.5}
    assert list(shown.messages) == [{"role": "user", "content": "hi"}]


def test_the_same_again_does_nothing_and_another_needs_force(
    server: FakeOllama, weights: Path, tmp_path: Path
) -> None:
    with connect(server) as client:
        publish(client, "tuned", to_publish(weights))
        server.requests.clear()
        assert publish(client, "tuned", to_publish(weights)).was_there
        assert "POST /api/create" not in server.paths()
        for change in ({"system": "Other."}, {"template": "x{{ .Prompt }}"}, {"identity": {}},
                       {"identity": {"general.basename": "other"}}, {"parameters": {"num_ctx": 1}}):  # fmt: skip
            with pytest.raises(UsageError, match="The server has a model tuned:latest already"):
                publish(client, "tuned", to_publish(weights, **change))
        assert client.show("tuned").system == "Be exact."
        publish(client, "tuned", to_publish(weights, system="Other."), force=True)
        assert client.show("tuned").system == "Other."
    assert names(server) == ["tuned:latest"]


def test_a_model_that_does_not_run_gets_no_name(server: FakeOllama, weights: Path) -> None:
    def broken(request: GenerationRequest) -> GenerationAnswer:
        from tests.fake_ollama.create import ApiError

        raise ApiError(500, "llama-server process has terminated: exit status 1")

    with connect(server) as client:
        publish(client, "tuned", to_publish(weights))
        server.generate = broken
        with pytest.raises(OllamaError, match="has terminated: exit status 1"):
            publish(client, "tuned", to_publish(weights, system="New."), force=True)
        assert client.show("tuned").system == "Be exact."
        with pytest.raises(OllamaError):
            publish(client, "fresh", to_publish(weights))
    assert names(server) == ["tuned:latest"]


def test_a_failed_check_keeps_the_name_as_it_was(server: FakeOllama, weights: Path) -> None:
    def check(staging: str) -> None:
        raise VerificationError("what is served is not what was trained")

    with connect(server) as client, pytest.raises(VerificationError):
        publish(client, "tuned", to_publish(weights), check=check)
    assert names(server) == []


class DiesAfter(httpx.BaseTransport):
    """Lets `left` requests through, the last without its answer, then none: a client that is killed."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.inner = httpx.HTTPTransport(verify=False)  # plain HTTP

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.left == 0:
            raise httpx.ConnectError("killed")
        self.left -= 1
        response = self.inner.handle_request(request)
        if self.left == 0:
            response.read()
            response.close()
            raise httpx.ConnectError("killed")
        return response

    def close(self) -> None:
        self.inner.close()


def test_killed_between_any_two_requests_and_run_again(
    server: FakeOllama, weights: Path, tmp_path: Path
) -> None:
    num_killed = 0
    content = weights.read_bytes()
    with connect(server) as client:
        for left in range(9):
            name, file = f"tuned{left}", tmp_path / f"{left}.gguf"
            mark = b"marked %d" % left
            file.write_bytes(content[: -len(mark)] + mark)  # other weights each time
            killed = DiesAfter(left)
            with connect(server, transport=killed, sleep=lambda seconds: None) as dying:
                try:
                    publish(dying, name, to_publish(file))
                except OllatuneError:
                    num_killed += 1
            half = {found for found in names(server) if found.startswith(name)}
            assert half <= {f"{name}:latest", f"{name}:latest-ollatune-staging"}
            if f"{name}:latest" in half:  # a name that is there is complete
                assert client.show(name).system == "Be exact."
            publish(client, name, to_publish(file))
            shown = client.show(name)
            assert (shown.template, shown.system) == (TEMPLATE, "Be exact.")
            assert shown.parameters == {"stop": ["<|end|>"], "num_ctx": 512, "temperature": 0.5}
            assert mark in Path(shown.blob_path).read_bytes()
            assert [found for found in names(server) if found.startswith(name)] == [
                f"{name}:latest"
            ]
    assert num_killed == 8
    folder = server.store.root / "blobs"
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


def write_adapter(path: Path, alpha: float = 1.0) -> Path:
    records = [
        encode_metadata("adapter.lora.alpha", alpha, ValueType.FLOAT32),
        encode_metadata("general.architecture", "llama", ValueType.STRING),
        encode_metadata("general.type", "adapter", ValueType.STRING),
    ]
    write_gguf(path, records, [])
    return path


def test_adapters_only_where_they_are_served(tmp_path: Path, weights: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf")
    for version, architecture, refusal in (
        ("0.24.0", "llama", None),
        ("0.24.0", "qwen3", "runs qwen3 on an engine without LoRA"),
        ("0.32.15", "qwen3", None),
        ("0.34.1", "llama", "no longer takes LoRA adapters"),
    ):
        model = ModelToPublish(adapter=adapter, base="base", architecture=architecture)
        with (
            FakeOllama(tmp_path / version / architecture, version) as server,
            connect(server) as client,
        ):
            client.create({"model": "base", "files": {"m.gguf": client.upload_blob(weights)}})
            if refusal:
                with pytest.raises(InputError, match=refusal) as caught:
                    publish(client, "tuned", model)
                assert "Export the merged model instead" in str(caught.value)
                assert names(server) == ["base:latest"]
            else:
                publish(client, "tuned", model)
                stored = server.store.read(server.store.models()[0].name)
                assert stored is not None
                assert stored.of_kind("adapter")[0]["digest"] == client.upload_blob(adapter)
                assert publish(client, "tuned", model).was_there
                other = write_adapter(tmp_path / "other.gguf", alpha=2.0)
                with pytest.raises(UsageError, match="already"):
                    publish(client, "tuned", replace(model, adapter=other))


def test_what_cannot_be_published(server: FakeOllama, weights: Path) -> None:
    with connect(server) as client:
        with pytest.raises(UsageError, match="is not a model name"):
            publish(client, "no name!", to_publish(weights))
        with pytest.raises(UsageError, match="Nothing to publish"):
            publish(client, "m", ModelToPublish())
        with pytest.raises(UsageError, match="needs the name of its base model"):
            publish(client, "m", ModelToPublish(adapter=weights))
        with pytest.raises(InputError, match="unknown parameter `num_ctxx`"):
            publish(client, "m", to_publish(weights, parameters={"num_ctxx": 3}))
    assert names(server) == []


def test_a_long_tag_still_has_a_staging_name(tmp_path: Path, weights: Path) -> None:
    with FakeOllama(tmp_path / "models") as server, connect(server) as client:
        publish(client, "m:" + "t" * 80, to_publish(weights))
        assert names(server) == ["m:" + "t" * 80]


def test_what_a_generated_modelfile_cannot_tell_is_recognised_all_the_same(
    server: FakeOllama, weights: Path
) -> None:
    """The server quotes texts in ways nobody can read back, and large numbers with an exponent."""
    model = to_publish(
        weights,
        licenses=['three """quotes""" in\na row', "another"],
        parameters={"stop": ['a "b"\n', "\\n", "é "], "num_ctx": 1 << 20, "min_p": 1e-5, "use_mmap": True},
        system='"quoted"',
    )  # fmt: skip
    with connect(server) as client:
        assert not publish(client, "tuned", model).was_there
        shown = client.show("tuned")
        assert shown.parameters == dict(model.parameters)
        assert isinstance(shown.parameters["num_ctx"], int)
        assert publish(client, "tuned", model).was_there


@pytest.mark.parametrize(
    "name", ["someone/model:v1", "hf.co/org/Repo:Q8_0", "localhost:5000/ns/model:v1", "M:V1.2-rc_1"]
)
def test_any_name_that_ollama_takes(server: FakeOllama, weights: Path, name: str) -> None:
    with connect(server) as client:
        publish(client, name, to_publish(weights))
        assert names(server) == [name]
        assert publish(
            client, name.upper().replace("HF.CO", "hf.co"), to_publish(weights)
        ).was_there


def test_no_stops_are_added_from_a_template_that_the_server_recognises(
    server: FakeOllama, weights: Path
) -> None:
    """Its parameters stay where ours are silent, even beside an explicit TEMPLATE."""
    model = to_publish(weights, parameters={"num_ctx": 512})
    with connect(server) as client:
        publish(client, "tuned", model)
        assert client.show("tuned").parameters == {"num_ctx": 512}
        assert publish(client, "tuned", model).was_there
        request = {"model": "bare", "files": {"m.gguf": client.upload_blob(weights)}}
        client.create({**request, "template": TEMPLATE})
        assert client.show("bare").parameters == {"stop": ["<|im_start|>", "<|im_end|>"]}


def test_a_base_parameter_that_newer_servers_refuse(server: FakeOllama, weights: Path) -> None:
    model = to_publish(weights, parameters={"typical_p": 0.9})
    with connect(server) as client:
        if server.numbers < (0, 34, 1):
            publish(client, "tuned", model)
            return
        with pytest.raises(OllamaError, match="typical_p is deprecated"):
            publish(client, "tuned", model)
        assert names(server) == []


# --- the way in ---


@pytest.fixture
def base_store(tmp_path: Path, weights: Path) -> FakeStore:
    with FakeOllama(tmp_path / "base-store", "0.24.0") as server, connect(server) as client:
        client.create(
            {"model": "base:1b", "files": {"m.gguf": client.upload_blob(weights)}, "system": "Hi."}
        )
    return server.store


def test_a_local_store_needs_no_server(base_store: FakeStore) -> None:
    with OllamaClient("127.0.0.1:9", environment={}) as client:
        stored = ensure_local("base:1b", client, roots=[base_store.root])
    assert stored.system == "Hi."
    assert stored.require_gguf().is_file()


def test_the_store_of_the_server_is_found_through_show(
    base_store: FakeStore, tmp_path: Path
) -> None:
    with FakeOllama(base_store.root) as server, connect(server) as client:
        stored = ensure_local("base:1b", client, roots=[tmp_path / "none"])
    assert stored.root == base_store.root
    assert "POST /api/pull" not in server.paths()


def test_what_is_nowhere_is_pulled(base_store: FakeStore, tmp_path: Path) -> None:
    with FakeOllama(tmp_path / "empty", registry=base_store) as server, connect(server) as client:
        stored = ensure_local("base:1b", client, roots=[tmp_path / "none"])
        assert stored.root == tmp_path / "empty"
        stored.verify()
        with pytest.raises(
            InputError, match=r"There is no model other:latest: neither in a local store"
        ):
            ensure_local("other", client, roots=[tmp_path / "none"])


def test_names_of_other_registries_are_pulled_as_they_stand(
    base_store: FakeStore, tmp_path: Path
) -> None:
    name = "hf.co/org/Repo-GGUF:Q4_1"
    with FakeOllama(base_store.root) as server, connect(server) as client:
        client.copy("base:1b", name)
    with FakeOllama(tmp_path / "empty", registry=base_store) as server, connect(server) as client:
        stored = ensure_local(name, client, roots=[tmp_path / "none"])
        assert stored.name.short == name
        assert ("POST", "/api/pull", {"model": name, "stream": True}) in server.requests
    assert stored.manifest_path.parts[-4:] == ("hf.co", "org", "Repo-GGUF", "Q4_1")


def test_a_remote_server_says_what_can_be_done(
    base_store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tests.fake_ollama.show._modelfile", lambda *a: "FROM /far/away/blobs/sha256-1\n"
    )
    with (
        FakeOllama(base_store.root) as server,
        connect(server) as client,
        pytest.raises(InputError) as caught,
    ):
        ensure_local("base:1b", client, roots=[tmp_path / "none"])
    message = str(caught.value)
    assert "has base:1b, but its file /far/away/blobs/sha256-1 is not on this machine" in message
    assert "pass it with --model FILE.gguf" in message


def test_neither_store_nor_server(tmp_path: Path) -> None:
    with (
        OllamaClient("127.0.0.1:9", environment={}) as client,
        pytest.raises(ServiceError) as caught,
    ):
        ensure_local("llama3.1:8b", client, roots=[tmp_path / "none"])
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message.startswith(
        "The named base is not present and no Ollama server answers: llama3.1:8b "
    )
    assert str(tmp_path / "none") in message
    assert "http://127.0.0.1:9" in message
    assert "--model embedded:smollm2-135m" in message


def test_cloud_models_have_no_weights(tmp_path: Path) -> None:
    with (
        OllamaClient("127.0.0.1:9", environment={}) as client,
        pytest.raises(InputError, match="runs on Ollama's servers only"),
    ):
        ensure_local("gpt-oss:120b-cloud", client, roots=[])


def test_a_pull_that_is_cut_goes_on_where_it_was(base_store: FakeStore, tmp_path: Path) -> None:
    faults = [Fault("/api/pull", "cut_response", after=n) for n in (3, 5, 6)]
    with FakeOllama(tmp_path / "empty", registry=base_store, faults=faults) as server:
        seen: list[int] = []
        with connect(server) as client:
            client.pull("base:1b", progress=lambda p: seen.append(p.completed))
        assert server.paths() == ["POST /api/pull"] * 4
        assert server.store.models()[0].name.short == "base:1b"


def test_a_pull_killed_at_any_request_is_finished_by_the_next(
    base_store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ollatune train --model base:1b` begins."""
    expected = sorted(path.name for path in (base_store.root / "blobs").iterdir())
    for number in range(1, 9):
        root = tmp_path / f"empty{number}"
        with FakeOllama(root, registry=base_store) as server, connect(server) as client:

            def fetch(client: OllamaClient = client, root: Path = root) -> None:
                ensure_local("base:1b", client, roots=[root]).verify()

            is_killed = dies_at_request(monkeypatch, number, fetch)
            assert is_killed or LocalStore(root).find("base:1b")
            fetch()
            assert sorted(path.name for path in (root / "blobs").iterdir()) == expected
            assert [model.name.short for model in server.store.models()] == ["base:1b"]
        if not is_killed:
            break
    assert number == 4  # show, pull, show
