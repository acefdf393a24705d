"""What the client relies on, asked of the test server of each version, or of the real one that OLLATUNE_TEST_OLLAMA
names: the same tests for both. A tiny random model answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ollatune.base.errors import UsageError, VerificationError
from ollatune.base.files import sha256_file
from ollatune.ollama.failures import ModelMissing, OllamaError
from ollatune.ollama.publish import ModelToPublish, publish
from tests.ollama_server import VERSIONS, ServerUnderTest, server_under_test
from tests.round_trip_place import BASE_FIELDS, SYSTEM, TEMPLATE
from tests.run_helpers import tiny_base

pytest.importorskip("xllamacpp")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "Hi"}]
RENDERED = f"<bos>system:{SYSTEM}<eos><bos>user:Hi<eos><bos>assistant:"
OPTIONS = {"temperature": 0, "seed": 1, "num_predict": 4}


@pytest.fixture(scope="module", params=VERSIONS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerUnderTest]:
    folder = tmp_path_factory.mktemp("contract")
    with server_under_test(folder / "store", request.param) as server:
        server.add_base("tiny", tiny_base(folder / "bases"), **BASE_FIELDS)
        yield server


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tiny_base(tmp_path, seed=3)


def test_blobs(server: ServerUnderTest, weights: Path, tmp_path: Path) -> None:
    client = server.client
    digest = client.upload_blob(weights)
    assert digest == f"sha256:{sha256_file(weights)}"
    assert client.blob_exists(digest)
    assert not client.blob_exists("sha256:" + "3" * 64)
    other = tmp_path / "other.bin"
    other.write_bytes(b"something else")
    with pytest.raises(Exception, match="has the sha256"):
        client.upload_blob(other, digest="sha256:" + "4" * 64)


def test_show_list_and_missing(server: ServerUnderTest) -> None:
    client, name = server.client, server.tag("tiny")
    shown = client.show(name)
    assert (shown.template, shown.system, shown.license) == (TEMPLATE, SYSTEM, "MIT")
    assert shown.parameters == {"stop": ["<eos>"], "top_k": 7}
    assert shown.architecture == "llama"
    assert shown.metadata["llama.block_count"] == 2
    assert f"{name}:latest" in [row.name for row in client.list()]
    assert not client.has(server.tag("absent"))
    for call in (client.show, client.delete, lambda n: client.chat(n, QUESTION)):
        with pytest.raises(ModelMissing):
            call(server.tag("absent"))


def test_the_prompt_the_answer_and_its_alternatives(server: ServerUnderTest) -> None:
    client, name = server.client, server.tag("tiny")
    assert client.render_chat(name, QUESTION) == RENDERED
    whole = client.chat(name, QUESTION, options=OPTIONS)
    parts = list(client.stream_chat(name, QUESTION, options=OPTIONS))
    assert whole.text == "".join(part["message"]["content"] for part in parts)
    assert whole.done_reason in ("stop", "length")
    raw = client.generate(name, RENDERED, raw=True, options=OPTIONS)
    assert (raw.text, raw.prompt_tokens) == (whole.text, whole.prompt_tokens)
    told = client.chat(name, QUESTION, logprobs=5, options=OPTIONS)
    assert told.text == whole.text
    assert all(len(token.alternatives) == 5 for token in told.logprobs)
    assert all(token.alternatives[0].logprob >= token.logprob for token in told.logprobs)
    assert name in [row.name.removesuffix(":latest") for row in client.ps()]


def test_create_says_what_is_wrong(server: ServerUnderTest, weights: Path) -> None:
    client, name = server.client, server.tag("wrong")
    files = {"m.gguf": client.upload_blob(weights)}
    for request, expected in (
        ({}, "neither 'from' or 'files' was specified"),
        ({"files": {"../m.gguf": files["m.gguf"]}}, "file path must be relative"),
        ({"files": files, "template": "{{ if }}"}, "template error"),
    ):
        with pytest.raises(OllamaError, match=expected):
            client.create({"model": name, **request})
        assert not client.has(name)
    assert "wrong" not in " ".join(server.names())


def test_a_model_made_from_a_tag_inherits(server: ServerUnderTest) -> None:
    client, name = server.client, server.tag("derived")
    request = {"model": name, "from": server.tag("tiny"), "parameters": {"top_k": 9}}
    client.create({**request, "system": "Other."})
    shown = client.show(name)
    assert (shown.template, shown.system) == (TEMPLATE, "Other.")
    assert shown.parameters == {"stop": ["<eos>"], "top_k": 9}
    client.delete(name)


def test_publishing(server: ServerUnderTest, weights: Path) -> None:
    client, name = server.client, server.tag("published:v1")
    model = ModelToPublish(
        gguf=weights, template=TEMPLATE, system='Say "it".', licenses=["MIT", "and\nmore"],
        parameters={"stop": ["<eos>", "\n\n"], "num_ctx": 2048, "temperature": 0.5, "repeat_penalty": 1},
        identity={"general.architecture": "llama"},
    )  # fmt: skip
    seen: list[str] = []

    def refuse(staging: str) -> None:
        seen.append(client.chat(staging, QUESTION, options=OPTIONS).text)
        raise VerificationError("not good")

    with pytest.raises(VerificationError):
        publish(client, name, model, check=refuse)
    assert "published" not in " ".join(server.names())
    assert not publish(client, name, model).was_there
    assert client.chat(name, QUESTION, options=OPTIONS).text == seen[0]
    shown = client.show(name)
    assert (shown.template, shown.system, shown.license) == (
        TEMPLATE,
        'Say "it".',
        "MIT\nand\nmore",
    )
    assert shown.parameters == dict(model.parameters)
    assert publish(client, name, model).was_there
    changed = ModelToPublish(**{**vars(model), "system": "Else."})
    with pytest.raises(UsageError, match="already"):
        publish(client, name, changed)
    publish(client, name, changed, force=True)
    assert client.show(name).system == "Else."
    copied = server.tag("copied")
    client.copy(name, copied)
    client.delete(name)
    assert client.show(copied).system == "Else."
    client.delete(copied)
    assert not [tag for tag in server.names() if "published" in tag or "staging" in tag]


def test_an_adapter_where_the_server_takes_it(server: ServerUnderTest, tmp_path: Path) -> None:
    import torch

    from ollatune.export.adapter_gguf import write_adapter
    from ollatune.gguf.reader import GGUFFile
    from ollatune.ollama.store import LocalStore

    assert server.store is not None
    stored = LocalStore(server.store).find(server.tag("tiny"))
    assert stored is not None
    generator = torch.Generator().manual_seed(0)
    with GGUFFile.open(stored.require_gguf()) as base:
        shape = base.tensors["blk.0.attn_q.weight"].shape
        a = torch.randn(4, shape[1], generator=generator)
        b = torch.randn(shape[0], 4, generator=generator)
        write_adapter(base, {"blk.0.attn_q.weight": (a, b, 1.0)}, tmp_path / "adapter.gguf")
    client, name = server.client, server.tag("adapted")
    model = ModelToPublish(
        adapter=tmp_path / "adapter.gguf", base=server.tag("tiny"), architecture="llama", template=TEMPLATE
    )  # fmt: skip
    if server.version.adapter_refusal("llama"):
        request = {"model": name, "from": server.tag("tiny")}
        digest = client.upload_blob(tmp_path / "adapter.gguf")
        with pytest.raises(OllamaError, match="LoRA adapters are no longer supported"):
            client.create({**request, "adapters": {"adapter.gguf": digest}})
        return
    publish(client, name, model)
    plain = client.chat(server.tag("tiny"), QUESTION, options=OPTIONS, logprobs=1)
    tuned = client.chat(name, QUESTION, options=OPTIONS, logprobs=1)
    assert plain.logprobs[0].logprob != tuned.logprobs[0].logprob
    client.delete(name)
