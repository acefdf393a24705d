"""The whole trip, through the commands, with a server of each version: a tag is trained, put back, and proved.

What answers behind the test server is llama.cpp. With OLLATUNE_TEST_OLLAMA the same tests run against a real server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollatune.gguf.reader import GGUFFile
from tests.ollama_server import VERSIONS, server_under_test, stored_config
from tests.round_trip_place import (
    BASE_FIELDS,
    SYSTEM,
    TEMPLATE,
    Place,
    dies_at_request,
    requests_of,
)
from tests.run_helpers import run, tiny_base

pytest.importorskip("xllamacpp")

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(params=VERSIONS)
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    version, recipe = (
        request.param if isinstance(request.param, tuple) else (request.param, "llama")
    )
    with server_under_test(tmp_path / "store", version) as server:
        server.add_base("tiny", tiny_base(tmp_path / "bases", recipe), **BASE_FIELDS)
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        monkeypatch.setenv("OLLAMA_MODELS", str(server.store))
        monkeypatch.setenv("OLLATUNE_CACHE", str(tmp_path / "cache"))
        yield Place(server, tmp_path)


def test_a_tag_is_trained_put_back_and_answers_as_trained(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, name = place.server, place.server.tag("ramsey-model")
    place.train()
    assert place.create("--create", name) == 0
    assert server.names() == ["ramsey-model:latest", "tiny:latest"]
    shown_by_check = place.report()
    assert shown_by_check["passed"]
    assert f"Ollama {server.version}" in shown_by_check["served_by"]

    shown = server.client.show(name)
    tuned = place.chat("ramsey-model")
    assert tuned == place.trained_answer()
    assert tuned != place.chat("tiny")
    assert (shown.template, shown.system, shown.license) == (TEMPLATE, SYSTEM, "MIT")
    assert shown.parameters["top_k"] == 7
    assert shown.parameters["stop"] == ["<eos>"]
    assert shown.parameters["repeat_penalty"] == 1
    with GGUFFile.open(place.folder / "export" / "model.gguf") as written:
        assert shown.metadata["ollatune.export"] == written.metadata["ollatune.export"]

    assert place.verify("--model", name) == 0
    assert place.verify() == 0  # the file itself, in this process
    capsys.readouterr()
    evaluation = ["--model", name, "--max-tokens", "8", "--perplexity", "3", "--json"]
    assert place.evaluate(*evaluation) == 0
    result = json.loads(capsys.readouterr().out)
    values = result["values"]
    assert values["perplexity"] < values["base.perplexity"]
    assert values["trained.perplexity"] == pytest.approx(values["perplexity"], rel=0.02)
    assert values["forgetting"] == pytest.approx(
        values["general_perplexity"] / values["base.general_perplexity"]
    )
    assert "rouge_l" in result["text"]
    assert "general text: perplexity" in result["text"]
    assert place.evaluate(*evaluation, "--no-forgetting", "--require", "exact_match>2") == 9

    before = server.blobs()
    again = requests_of(monkeypatch, lambda: place.create("--create", name))
    assert "POST /api/create" not in again  # the same again: nothing is sent
    assert place.create("--create", name, "--type", "f16", output="other") == 2
    assert f"has a model {name}:latest already" in capsys.readouterr().err
    assert server.blobs() == before
    assert place.create("--create", name, "--type", "f16", "--force", output="other") == 0
    assert server.names() == ["ramsey-model:latest", "tiny:latest"]


@pytest.mark.parametrize(
    "place",
    [(version, recipe) for version in VERSIONS for recipe in ("qwen2", "gemma2")],
    indirect=True,
    ids=lambda pair: "-".join(pair),
)
def test_other_architectures(place: Place) -> None:
    name = place.server.tag("ramsey-model")
    place.train()
    assert place.create("--create", name) == 0
    assert place.verify("--model", name) == 0
    assert place.chat("ramsey-model") == place.trained_answer()


def test_what_would_be_served_otherwise_gets_no_tag(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train()
    name = place.server.tag("cut")
    assert place.create("--create", name, "--set", 'export.stop=["s"]') == 9
    errors = capsys.readouterr().err
    assert "Cause: stop." in errors
    assert f"`{name}` was not created; the export is in {place.folder / 'export'}." in errors
    assert place.server.names() == ["tiny:latest"]


def test_what_a_base_has_beyond_its_training_is_left_out(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = next((place.folder / "bases").glob("*.gguf"))
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    place.server.add_base(
        "tiny", gguf, messages=said, renderer="qwen3-coder", parser="qwen3-coder",
        requires="0.12.0", **BASE_FIELDS,
    )  # fmt: skip
    place.train()
    name = place.server.tag("ramsey-model")
    assert place.create("--create", name, "--system", "Be brief.") == 0
    errors = capsys.readouterr().err
    assert "The base's renderer `qwen3-coder` and parser `qwen3-coder`" in errors
    assert "The base's 2 MESSAGE(s)" in errors
    assert "SYSTEM message is another than the one that was trained with" in errors
    config = stored_config(place.server, "ramsey-model")
    assert "renderer" not in config
    assert config["requires"] == "0.12.0"
    assert not config["messages"]
    assert place.create("--format", "adapter", output="adapter") == 3
    assert "served through `qwen3-coder`" in capsys.readouterr().err


def test_the_adapter_goes_where_it_is_served_right(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train()
    server, name = place.server, place.server.tag("tuned")
    code = place.create("--format", "adapter", "--create", name, output="adapter")
    errors = capsys.readouterr().err
    if server.version.accepts_adapters:
        assert code == 0, errors
        assert server.names() == ["tiny:latest", "tuned:latest"]
        assert place.chat("tuned") == place.trained_answer()
    else:
        assert code == 3
        assert f"Ollama {server.version} no longer takes LoRA adapters" in errors
        assert "--format gguf" in errors
        assert server.names() == ["tiny:latest"]
    assert place.verify(output="adapter") == 0  # in this process, base and adapter


def test_a_base_that_carries_an_adapter_is_trained_with_it(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was learned twice is served as one merged model, and is not what training the weights alone would give."""
    if not place.server.version.accepts_adapters:
        pytest.skip("this server makes no models with adapters")
    place.train()
    first = place.trained_answer()
    adapter = place.server.tag("tuned")
    assert place.create("--format", "adapter", "--create", adapter, output="adapter") == 0
    second = Place(place.server, place.folder / "second", base="tuned")
    second.train("--learning-rate", "1e-9")  # nearly nothing is learned: what is there is kept
    errors = capsys.readouterr().err
    assert f"{adapter}:latest carries 1 LoRA adapter(s) on top of its weights; merging" in errors
    assert second.trained_answer() == first
    name = place.server.tag("merged")
    assert second.create("--create", name, "--accept-recovery") == 0
    assert place.chat("merged") == first
    assert second.create("--format", "adapter", output="again") == 3
    assert "carries 1 adapter(s) already" in capsys.readouterr().err


def test_without_a_server_the_export_is_written_all_the_same(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.train()
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    capsys.readouterr()
    assert place.create("--create", place.server.tag("ramsey-model")) == 4
    errors = capsys.readouterr().err
    assert f"The export is written to {place.folder / 'export'} and complete" in errors
    assert "ollama serve" in errors
    assert "Traceback" not in errors
    assert place.verify() == 0


def test_killed_at_any_request_the_next_run_finishes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, name = place.server, place.server.tag("whole")
    place.train()

    def create() -> None:
        assert place.create("--create", name) == 0

    num_requests = len(requests_of(monkeypatch, create))
    expected = server.blobs()
    answer = place.chat("whole")
    server.client.delete(name)
    kills = 0
    for wanted in range(1, num_requests + 1):
        if dies_at_request(monkeypatch, wanted, create):
            kills += 1
            left = [tag for tag in server.names() if "staging" not in tag]
            assert left in (["tiny:latest"], ["tiny:latest", "whole:latest"])
            if "whole:latest" in left:
                assert place.chat("whole") == answer  # never half there
        create()
        assert server.names() == ["tiny:latest", "whole:latest"]
        assert server.blobs() == expected
        server.client.delete(name)
    assert kills >= 8


def test_plain_texts_make_the_whole_trip(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued pre-training: verified on the beginnings of held-out texts, scored by their perplexity."""
    folder = place.folder / "texts"
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 3), ("test", 3)):
        lines = [
            json.dumps({"text": f"The sum of {i} and 3 is {i + 3}. " * 3}) for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    place.data = folder
    place.train(
        "--set", "training.method=continued-pretraining", "--set", "model.context_window=64",
        "--set", "validation.samples=0",
    )  # fmt: skip
    name = place.server.tag("reader")
    assert place.create("--create", name) == 0
    assert place.verify("--model", name) == 0
    capsys.readouterr()
    assert (
        place.evaluate("--json", "--require", "perplexity<1000", "--require", "gain.perplexity<0")
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["values"]["perplexity"] < result["values"]["base.perplexity"]
    assert result["tuned"]["records"] == 3
    assert place.evaluate("--perplexity", "0") == 2
    assert "plain texts" in capsys.readouterr().err


def test_the_written_modelfile_is_what_ollama_create_takes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ollama create ramsey-model -f models/ollama/Modelfile` on what `create-modelfile` left in a user's folder."""
    from tests.ollama_cli import ollama_create

    place.train()
    monkeypatch.chdir(place.folder)
    assert run(
        ["create-modelfile", "--checkpoint", "run/best_model.pt", "--output", "models/ollama/"]
    ) == 0  # fmt: skip
    name = place.server.tag("ramsey-model")
    ollama_create(place.server.client, name, Path("models/ollama/Modelfile"))
    assert place.chat("ramsey-model") == place.trained_answer()
    shown = place.server.client.show(name)
    assert (shown.template, shown.system, shown.license) == (TEMPLATE, SYSTEM, "MIT")
    assert run(
        ["verify", "--checkpoint", "run/best_model.pt", "--export", "models/ollama", "--model", name]
    ) == 0  # fmt: skip
