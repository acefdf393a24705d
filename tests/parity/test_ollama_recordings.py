"""The test server against recordings of real servers: status, content type, error text, events in their order.

Times, digests of rewritten weights and durations differ by nature; what a model says is compared where llama.cpp runs.
By default a tiny file with the recorded metadata stands for the weights; `weights` tests use the real ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.names import ModelName
from ollatune.ollama.publish import ModelToPublish, publish
from tests.fake_ollama import FakeOllama, GenerateFunction, scripted_answer
from tests.fake_ollama.create import CHATML_STOPS
from tests.fake_ollama.go_text import go_map_json

DATA = Path(__file__).parents[1] / "data"
RECORDS = [
    json.loads(line) for line in (DATA / "ollama-http.jsonl").read_text("utf-8").splitlines()
]
VERSIONS = ("0.24.0", "0.32.15")
WEIGHTS_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REWRITTEN_DIGEST = "sha256:941f309b54caaad6747569ba43712bcde44a2be3bae16c3282ff499c37c54af5"
NEEDS_A_MODEL = {
    "generate", "generate-raw-logprobs", "generate-stream", "chat", "chat-logprobs", "chat-stream", "openai-chat",
}  # fmt: skip
# What was on the recorded servers before the first request is not part of the recording.
DEPENDS_ON_HISTORY = {"tags", "ps-empty", "tags-after"}


def recorded_metadata() -> dict[str, Any]:
    record = next(record for record in RECORDS if record["name"] == "show")
    return json.loads(record["0.24.0"]["body"])["model_info"]


def write_stand_in(path: Path) -> Path:
    """A GGUF with the recorded metadata and two tensors."""
    records = []
    for key, value in recorded_metadata().items():
        if key == "general.parameter_count":
            continue
        if value is None:
            tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a"]
            is_types = key.endswith("token_type")
            array = [3, 3, 3, 1] if is_types else tokens if key.endswith("tokens") else ["a a"]
            element = ValueType.INT32 if is_types else ValueType.STRING
            records.append(encode_metadata(key, array, ValueType.ARRAY, element_type=element))
        elif isinstance(value, bool):
            records.append(encode_metadata(key, value, ValueType.BOOL))
        elif isinstance(value, str):
            records.append(encode_metadata(key, value, ValueType.STRING))
        elif key.endswith(("epsilon", "freq_base")):
            records.append(encode_metadata(key, float(value), ValueType.FLOAT32))
        else:
            records.append(encode_metadata(key, value, ValueType.UINT32))
    jinja = "{% for message in messages %}<|im_start|>{{ message.role }}{% endfor %}"
    records.append(encode_metadata("tokenizer.chat_template", jinja, ValueType.STRING))
    records.append(encode_metadata("general.name", "stand-in", ValueType.STRING))
    tensors = [
        TensorToWrite("token_embd.weight", (4, 8), GGMLType.F32, lambda: [bytes(128)]),
        TensorToWrite("blk.0.attn_norm.weight", (8,), GGMLType.F32, lambda: [bytes(32)]),
        TensorToWrite("output_norm.weight", (8,), GGMLType.F32, lambda: [bytes(32)]),
    ]
    write_gguf(path, records, tensors)
    return path


class Replay:
    """Sends the recorded requests, with the digest of the weights at hand in place of the recorded one."""

    def __init__(self, server: FakeOllama, weights: Path) -> None:
        self.server = server
        self.version = server.version
        self.digest = server.store.add_file(weights)
        server.store.add_blob(b"hello")
        # The stops that come with the autodetected template were there before.
        stops = server.store.add_blob(go_map_json({"stop": CHATML_STOPS}).encode())
        assert stops[0].startswith("sha256:f02dd72bb242")
        if server.numbers >= (0, 30, 0):  # so was the rewritten copy of the weights
            with httpx.Client(base_url=server.url, trust_env=False) as client:
                body = {
                    "model": "warm-up",
                    "files": {"m.gguf": self.digest},
                    "template": "x{{ .Prompt }}",
                }
                client.post("/api/create", json=body)
        self.client = httpx.Client(base_url=server.url, trust_env=False, timeout=60)

    def send(self, record: dict[str, Any]) -> httpx.Response:
        request = record["request"]
        content = None
        if request is not None:
            raw = request.get("raw")
            text = raw if isinstance(raw, str) else json.dumps(request)
            content = text.replace(WEIGHTS_DIGEST, self.digest).encode()
        path = record["path"].replace(WEIGHTS_DIGEST, self.digest)
        return self.client.request(record["method"], path, content=content)


@pytest.fixture(params=VERSIONS)
def replay(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Replay]:
    words = scripted_answer("one", " two")
    with FakeOllama(tmp_path / "models", request.param, generate=words) as server:
        replay = Replay(server, write_stand_in(tmp_path / "weights.gguf"))
        yield replay
        replay.client.close()


def normal_text(text: str, replay: Replay) -> str:
    """The store's folder and the weights' digests as in the recording."""
    text = text.replace(str(replay.server.store.root), "/models")
    for model in replay.server.store.models():
        for layer in model.of_kind("model"):
            hexadecimal = layer["digest"][7:]
            wanted = REWRITTEN_DIGEST if replay.server.numbers >= (0, 30, 0) else WEIGHTS_DIGEST
            text = text.replace(hexadecimal, wanted[7:])
    return text.replace(replay.digest[7:], WEIGHTS_DIGEST[7:])


def comparable(record: dict[str, Any], body: str, *, with_answers: bool) -> Any:
    """A body as a value, without what may differ."""
    try:
        values = [json.loads(line) for line in body.splitlines() if line.strip()]
    except ValueError:
        return body
    for value in values:
        for key in list(value):
            if key.endswith("_duration") or key in ("created_at", "modified_at", "created", "id"):
                value[key] = "·"
        if record["path"] == "/api/show" and "error" not in value:
            value["modelfile"] = sorted(value["modelfile"].splitlines())
            value["parameters"] = sorted(value["parameters"].splitlines())
            value["tensors"] = "·"
            if not with_answers:
                value["model_info"]["general.parameter_count"] = "·"
                value["details"]["parameter_size"] = "·"
        if not with_answers and record["name"] in NEEDS_A_MODEL:
            for key in ("response", "message", "context", "logprobs", "usage", "choices", "prompt_eval_count",
                        "eval_count", "done_reason"):  # fmt: skip
                if key in value:
                    value[key] = "·"
    if not with_answers and record["name"] in NEEDS_A_MODEL and len(values) > 1:
        values = [values[0], values[-1]]
    return values


def compare(replay: Replay, *, with_answers: bool) -> int:
    compared = 0
    for record in RECORDS:
        answer = replay.send(record)
        expected = record[replay.version]
        place = f"{record['name']} ({replay.version})"
        assert answer.status_code == expected["status"], f"{place}: {answer.text}"
        assert answer.headers.get("content-type") == expected["content_type"], place
        if record["name"] in DEPENDS_ON_HISTORY or record["path"] == "/api/ps":
            rows, wanted = (json.loads(body)["models"] for body in (answer.text, expected["body"]))
            if record["name"] == "ps":
                assert [row["name"] for row in rows] == [row["name"] for row in wanted]
                assert rows[0]["context_length"] == wanted[0]["context_length"] == 512
            if rows:
                assert set(rows[0]) == set(wanted[0]), place
                assert set(rows[0]["details"]) == set(wanted[0]["details"]), place
            continue
        found = comparable(record, normal_text(answer.text, replay), with_answers=with_answers)
        assert found == comparable(record, expected["body"], with_answers=with_answers), place
        compared += 1
    return compared


def test_the_recordings_are_all_here() -> None:
    assert len(RECORDS) == 53


def test_answers_as_recorded(replay: Replay) -> None:
    assert compare(replay, with_answers=False) == 49


def test_store_is_laid_out_as_recorded(replay: Replay) -> None:
    recorded = json.loads((DATA / "ollama-store.json").read_text("utf-8"))[replay.version]
    record = next(record for record in RECORDS if record["name"] == "create-stream")
    assert replay.send(record).text.endswith('{"status": "success"}\n')
    root = replay.server.store.root
    manifest = json.loads((root / recorded["manifest_path"]).read_bytes())
    expected = recorded["manifest"]
    assert list(manifest) == list(expected)
    assert manifest["layers"][1:] == expected["layers"][1:]  # digests of all texts included
    assert list(manifest["layers"][0]) == list(expected["layers"][0])
    for digest, content in recorded["small_blobs"].items():
        if digest == expected["config"]["digest"]:
            ours = (root / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_text()
            weights = manifest["layers"][0]["digest"]
            ours = ours.replace(weights, expected["layers"][0]["digest"])
            ours = re.sub(r'"model_type":"[^"]*"', '"model_type":"134.52M"', ours)
            assert ours == content
        else:
            assert (root / "blobs" / digest.replace(":", "-")).read_text() == content
    assert (root / "blobs" / recorded["blob_file_name"]).is_file()


@pytest.mark.parametrize("version", ["0.34.1", "0.40.0"])
def test_newer_servers_refuse_adapters_and_quantising(version: str, tmp_path: Path) -> None:
    with FakeOllama(tmp_path / "models", version) as server:
        digest = server.store.add_file(write_stand_in(tmp_path / "weights.gguf"))
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            body: dict[str, Any] = {"model": "m", "files": {"m.gguf": digest}}
            adapters = client.post("/api/create", json={**body, "adapters": {"a.gguf": digest}})
            assert (adapters.status_code, adapters.json()["error"]) == (
                400, "LoRA adapters are no longer supported",
            )  # fmt: skip
            quantized = client.post("/api/create", json={**body, "quantize": "q4_K_M"})
            assert quantized.status_code == 400
            assert "create-time quantization is only supported for safetensors" in quantized.text
            assert client.post("/api/create", json=body).text.endswith('{"status": "success"}\n')
            assert [model.name.short for model in server.store.models()] == ["m:latest"]


@pytest.fixture
def runner() -> Iterator[GenerateFunction]:
    from tests.fake_ollama.engine import LlamaCppRunner

    pytest.importorskip("xllamacpp")
    runner = LlamaCppRunner(context=512)
    yield runner
    runner.close()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.weights
@pytest.mark.parametrize("version", VERSIONS)
def test_real_weights_give_the_recorded_store_and_words(
    version: str, tmp_path: Path, smollm2_path: Path, runner: GenerateFunction
) -> None:
    with FakeOllama(tmp_path / "models", version, generate=runner) as server:
        replay = Replay(server, smollm2_path)
        assert replay.digest == WEIGHTS_DIGEST
        words = {}
        for record in RECORDS:
            answer = replay.send(record)
            assert answer.status_code == record[version]["status"], record["name"]
            if record["path"] == "/api/show" and answer.status_code == 200:
                expected = json.loads(record[version]["body"])
                assert answer.json()["tensors"][:3] == expected["tensors"][:3]
                assert answer.json()["model_info"] == expected["model_info"]
                assert answer.json()["details"]["parameter_size"] == "134.52M"
            if record["name"] in ("generate", "generate-stream", "chat", "chat-stream"):
                words[record["name"]] = (joined(answer.text), joined(record[version]["body"]))
        replay.client.close()
        assert {name: pair[0] for name, pair in words.items()} == {
            name: pair[1] for name, pair in words.items()
        }
        recorded = json.loads((DATA / "ollama-store.json").read_text("utf-8"))[version]
        model = server.store.read(ModelName.parse("rec-a"))
        assert model is not None
        manifest = json.loads(server.store.manifest_path(model.name).read_bytes())
        assert manifest["config"] == recorded["manifest"]["config"]
        assert manifest["layers"][0]["size"] == recorded["manifest"]["layers"][0]["size"]


def joined(body: str) -> dict[str, Any]:
    """Text, prompt ids and counts of an answer, streamed or not."""
    parts = [json.loads(line) for line in body.splitlines()]
    text = "".join(
        part.get("response") or part.get("message", {}).get("content", "") for part in parts
    )
    last = parts[-1]
    return {
        "text": text, "done_reason": last["done_reason"], "context": last.get("context"),
        "prompt": last["prompt_eval_count"], "output": last["eval_count"],
    }  # fmt: skip


CHATML_GO = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ range .Messages }}"
    '{{ if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
    "<|im_start|>assistant\n"
)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.weights
@pytest.mark.parametrize("version", ["0.24.0", "0.34.1"])
def test_published_weights_say_what_a_real_server_said(
    version: str, tmp_path: Path, smollm2_path: Path, runner: GenerateFunction
) -> None:
    """The whole way through our own client: publish, render, chat with logprobs, against the recorded answers."""
    records = {record["name"]: record for record in RECORDS}
    model = ModelToPublish(
        gguf=smollm2_path, template=CHATML_GO, system="Be brief.", licenses=["Apache-2.0"],
        parameters={"stop": ["<|im_end|>"], "num_ctx": 512, "temperature": 0},
        messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    )  # fmt: skip
    with (
        FakeOllama(tmp_path / "models", version, generate=runner) as server,
        OllamaClient(server.url, environment={}) as client,
    ):
        publish(client, "rec-a", model)
        rendered = client.render_chat("rec-a", [{"role": "user", "content": "Hello"}])
        expected = json.loads(records["render-chat"]["0.24.0"]["body"])
        assert rendered == expected["_debug_info"]["rendered_template"]
        request = records["chat-logprobs"]["request"]
        answer = client.chat("rec-a", request["messages"], options=request["options"], logprobs=3)
        recorded = json.loads(records["chat-logprobs"]["0.32.15"]["body"])
        assert answer.text == recorded["message"]["content"]
        assert answer.prompt_tokens == recorded["prompt_eval_count"]
        assert answer.output_tokens == recorded["eval_count"]
        for ours, theirs in zip(answer.logprobs, recorded["logprobs"], strict=True):
            assert ours.raw == bytes(theirs["bytes"])
            # Q4_1 weights: the version of llama.cpp and the machine move a logprob by about 0.1.
            assert ours.logprob == pytest.approx(theirs["logprob"], abs=0.2)
            assert len(ours.alternatives) == 3
