"""The whole trip, through the commands, with a server of each version: a tag is trained, put back, and proved.

What answers behind the test server is llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ollatune.gguf.reader import GGUFFile
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.names import ModelName
from ollatune.ollama.session import Limits
from tests.fake_ollama import FakeOllama
from tests.run_helpers import run, tiny_base, train_command, write_records

pytest.importorskip("xllamacpp")
from tests.fake_ollama.engine import LlamaCppRunner

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VERSIONS = ["0.24.0", "0.34.1"]
QUICK = Limits(idle_seconds=20.0, work_seconds=20.0, retry_waits_seconds=(0.01, 0.02))
TEMPLATE = "{{- range .Messages }}<bos>{{ .Role }}:{{ .Content }}<eos>{{ end }}<bos>assistant:"
SYSTEM = "Count well."


class Place:
    """A server with a tiny base under the tag `tiny`, and a folder to train in."""

    def __init__(self, server: FakeOllama, folder: Path, recipe: str = "llama") -> None:
        self.server = server
        self.folder = folder
        self.data = write_records(folder / "data", train=24)
        self.checkpoint = folder / "run" / "best_model.pt"
        add_tag(server, "tiny", tiny_base(folder / "bases", recipe))

    def train(self) -> None:
        command = train_command(
            Path("tiny"), self.data, self.folder / "run", "--epochs", "3",
            "--set", "advanced.lora_rank=8",
        )  # fmt: skip
        assert run(command) == 0

    def create(self, *more: str, output: str = "export") -> int:
        return run(
            ["create-modelfile", "--checkpoint", self.checkpoint, "--output",
             self.folder / output, *more]
        )  # fmt: skip

    def verify(self, *more: str, output: str = "export") -> int:
        return run(
            ["verify", "--checkpoint", self.checkpoint, "--export", self.folder / output, *more]
        )

    def names(self) -> list[str]:
        return sorted(model.name.short for model in self.server.store.models())

    def blobs(self) -> list[str]:
        return sorted(path.name for path in (self.server.store.root / "blobs").iterdir())


def add_tag(
    server: FakeOllama, name: str, gguf: Path, *, config: dict[str, Any] | None = None,
    messages: Sequence[dict[str, str]] = (),
) -> None:  # fmt: skip
    store = server.store
    digest = store.add_file(gguf)
    layers = [
        {
            "mediaType": "application/vnd.ollama.image.model",
            "digest": digest,
            "size": gguf.stat().st_size,
        }
    ]
    texts = {
        "template": TEMPLATE,
        "system": SYSTEM,
        "params": json.dumps({"stop": ["<eos>"], "top_k": 7}),
        "license": "MIT",
    }
    if messages:
        texts["messages"] = json.dumps(list(messages))
    layers += [store.layer(kind, text.encode())[0] for kind, text in texts.items()]
    facts = {"model_format": "gguf", "model_family": "llama", "file_type": "F32"}
    store.write(ModelName.parse(name), layers, {**facts, **(config or {})})


@pytest.fixture(params=VERSIONS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    version, recipe = (
        request.param if isinstance(request.param, tuple) else (request.param, "llama")
    )
    runner = LlamaCppRunner()
    with FakeOllama(tmp_path / "store", version, generate=runner) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
        yield Place(server, tmp_path, recipe)
    runner.close()


def test_a_tag_is_trained_put_back_and_answers_as_trained(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train()
    assert place.create("--create", "ramsey-model") == 0
    assert place.names() == ["ramsey-model:latest", "tiny:latest"]
    shown_by_check = json.loads((place.folder / "export" / "verify.json").read_bytes())
    assert shown_by_check["passed"]
    assert f"Ollama {place.server.version}" in shown_by_check["served_by"]

    with OllamaClient(place.server.url) as client:
        shown = client.show("ramsey-model")
        tuned = chat(client, "ramsey-model")
        assert tuned == trained_answer(place)
        assert tuned != chat(client, "tiny")
    assert (shown.template, shown.system, shown.license) == (TEMPLATE, SYSTEM, "MIT")
    assert shown.parameters["top_k"] == 7
    assert shown.parameters["stop"] == ["<eos>"]
    assert shown.parameters["repeat_penalty"] == 1
    with GGUFFile.open(place.folder / "export" / "model.gguf") as written:
        assert shown.metadata["ollatune.export"] == written.metadata["ollatune.export"]

    assert place.verify("--model", "ramsey-model") == 0
    assert place.verify() == 0  # the file itself, in this process
    evaluation = [
        "evaluate", "--checkpoint", place.checkpoint, "--export", place.folder / "export",
        "--model", "ramsey-model", "--max-tokens", "8", "--json",
    ]  # fmt: skip
    capsys.readouterr()
    assert run(evaluation) == 0
    assert "rouge_l" in capsys.readouterr().out
    assert run([*evaluation, "--require", "exact_match>2"]) == 9

    before = place.blobs()
    place.server.requests.clear()
    assert place.create("--create", "ramsey-model") == 0  # the same again: nothing is sent
    assert "POST /api/create" not in place.server.paths()
    assert place.create("--create", "ramsey-model", "--type", "f16", output="other") == 2
    assert "has a model ramsey-model:latest already" in capsys.readouterr().err
    assert place.blobs() == before
    assert place.create("--create", "ramsey-model", "--type", "f16", "--force", output="other") == 0
    assert place.names() == ["ramsey-model:latest", "tiny:latest"]


def chat(client: OllamaClient, model: str) -> str:
    messages = [{"role": "user", "content": "Add 30 and 33."}]
    options = {"temperature": 0, "num_predict": 12}
    return client.chat(model, messages, options=options).text


def trained_answer(place: Place) -> str:
    """What the trained model says in PyTorch, token by token."""
    from ollatune.commands.verify import load_run
    from ollatune.modeling.trained import TrainedLogprobs, load_trained
    from ollatune.templates.messages import Message

    checkpoint, config, base = load_run(place.checkpoint)
    logprobs = TrainedLogprobs(load_trained(base, checkpoint.model_state_dict, config))
    messages = [Message("system", SYSTEM), Message("user", "Add 30 and 33.")]
    ids = base.tokenizer.encode(base.template.render_prompt(messages))
    said: list[int] = []
    while len(said) < 12:
        token = int(logprobs([*ids, *said], [len(ids) + len(said) - 1])[0].argmax())
        if token in base.tokenizer.end_of_generation_ids:
            break
        said.append(token)
    return base.tokenizer.decode(said)


@pytest.mark.parametrize(
    "place", [("0.34.1", "qwen2"), ("0.24.0", "gemma2")], indirect=True, ids=["qwen2", "gemma2"]
)
def test_other_architectures(place: Place) -> None:
    place.train()
    assert place.create("--create", "ramsey-model") == 0
    assert place.verify("--model", "ramsey-model") == 0
    with OllamaClient(place.server.url) as client:
        assert chat(client, "ramsey-model") == trained_answer(place)


def test_what_would_be_served_otherwise_gets_no_tag(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train()
    assert place.create("--create", "cut", "--set", 'export.stop=["s"]') == 9
    errors = capsys.readouterr().err
    assert "Cause: stop." in errors
    assert f"`cut` was not created; the export is in {place.folder / 'export'}." in errors
    assert place.names() == ["tiny:latest"]


def test_what_a_base_has_beyond_its_training_is_left_out(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = next((place.folder / "bases").glob("*.gguf"))
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    add_tag(
        place.server, "tiny", gguf, messages=said,
        config={"renderer": "qwen3-coder", "parser": "qwen3-coder", "requires": "0.12.0"},
    )  # fmt: skip
    place.train()
    assert place.create("--create", "ramsey-model", "--system", "Be brief.") == 0
    errors = capsys.readouterr().err
    assert "The base's renderer `qwen3-coder` and parser `qwen3-coder`" in errors
    assert "The base's 2 MESSAGE(s)" in errors
    assert "SYSTEM message is another than the one that was trained with" in errors
    stored = place.server.store.read(ModelName.parse("ramsey-model"))
    assert stored is not None
    assert "renderer" not in stored.config
    assert stored.config["requires"] == "0.12.0"
    assert not stored.of_kind("messages")
    assert place.create("--format", "adapter", output="adapter") == 3
    assert "served through `qwen3-coder`" in capsys.readouterr().err


def test_the_adapter_goes_where_it_is_served_right(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train()
    code = place.create("--format", "adapter", "--create", "tuned", output="adapter")
    errors = capsys.readouterr().err
    if place.server.version == "0.34.1":
        assert code == 3
        assert "Ollama 0.34.1 no longer takes LoRA adapters" in errors
        assert "--format gguf" in errors
        assert place.names() == ["tiny:latest"]
    else:
        assert code == 0, errors
        assert place.names() == ["tiny:latest", "tuned:latest"]
        with OllamaClient(place.server.url) as client:
            assert chat(client, "tuned") == trained_answer(place)
    assert place.verify(output="adapter") == 0  # in this process, base and adapter


def test_without_a_server_the_export_is_written_all_the_same(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train()
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    capsys.readouterr()
    assert place.create("--create", "ramsey-model") == 4
    errors = capsys.readouterr().err
    assert f"The export is written to {place.folder / 'export'} and complete" in errors
    assert "ollama serve" in errors
    assert "Traceback" not in errors
    assert place.verify() == 0


def test_killed_at_any_request_the_next_run_finishes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train()
    assert place.create("--create", "whole") == 0
    expected = place.blobs()
    num_requests = len(place.server.requests)
    place.server.requests.clear()
    with OllamaClient(place.server.url) as client:
        client.delete("whole")
    kills = 0
    for wanted in range(1, num_requests + 1):
        if dies_at_request(place, wanted, monkeypatch):
            kills += 1
            assert place.names() in (["tiny:latest"], ["tiny:latest", "whole:latest"]) or any(
                "staging" in name for name in place.names()
            )
        assert place.create("--create", "whole") == 0
        assert place.names() == ["tiny:latest", "whole:latest"]
        assert place.blobs() == expected
        with OllamaClient(place.server.url) as client:
            client.delete("whole")
    assert kills >= 8


class Killed(BaseException):
    """What a kill looks like to the program: nothing after it runs."""


def dies_at_request(place: Place, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the command, and let it die before its `number`th request is sent; whether it came to that."""
    import httpx

    sent = 0
    original = httpx.Client.send

    def send(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent >= number:
            raise Killed
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(httpx.Client, "send", send)
        try:
            place.create("--create", "whole")
        except Killed:
            return True
    return False
