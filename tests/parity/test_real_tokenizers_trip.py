"""Llama 3.2, Qwen 2.5 and Gemma 2 with their real vocabularies and chat templates on the whole trip: trained by tag,
created, chatted with, verified, evaluated. The weights are tiny and random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest

from ollatune.gguf.reader import GGUFFile
from tests.assets import hf_tokenizer_dir, jinja_template
from tests.ollama_server import VERSIONS, server_under_test
from tests.round_trip_place import Place
from tests.tiny_models import tiny_gguf
from tests.vocab_metadata import vocab_metadata

pytest.importorskip("xllamacpp")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LLAMA_GO = (
    "{{- if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
    "{{- range .Messages }}{{ if ne .Role \"system\" }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """`go` is the TEMPLATE of the tag; "" where the file's own Jinja decides, as in tags from hf.co."""

    recipe: str
    vocabulary: str
    go: str
    system: str
    stops: tuple[str, ...]
    end: str


MODELS = {
    "llama3.2": Model(
        "llama-tied", "llama3_2", LLAMA_GO, "Count well.",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
    ),
    "qwen2.5": Model("qwen2-tied", "qwen2_5", "", "", (), "<|im_end|>"),
    "gemma2": Model("gemma2", "gemma2", "", "", ("<end_of_turn>",), "<end_of_turn>"),
}  # fmt: skip


def jinja_of(model: Model) -> str:
    if model.vocabulary == "gemma2":  # its package has none
        return jinja_template("google-gemma-2-2b-it.jinja")
    config = json.loads((hf_tokenizer_dir(model.vocabulary) / "tokenizer_config.json").read_bytes())
    return str(config["chat_template"])


def write_base(model: Model, folder: Path) -> Path:
    folder.mkdir()
    vocabulary = dict(vocab_metadata(model.vocabulary))
    vocabulary["tokenizer.chat_template"] = (jinja_of(model), gguf.GGUFValueType.STRING)
    return tiny_gguf(model.recipe, folder, tokenizer=vocabulary)


@pytest.fixture(
    params=[(version, name) for version in VERSIONS for name in MODELS],
    ids=lambda pair: "-".join(pair),
)
def trip(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Model, Place]]:
    version, model = request.param[0], MODELS[request.param[1]]
    base = write_base(model, tmp_path / "bases")
    with server_under_test(tmp_path / "store", version) as server:
        server.add_base(
            "base", base, template=model.go, system=model.system,
            parameters={"stop": list(model.stops)} if model.stops else {},
        )  # fmt: skip
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        monkeypatch.setenv("OLLAMA_MODELS", str(server.store))
        yield model, Place(server, tmp_path, base="base")


def test_the_whole_trip(trip: tuple[Model, Place], capsys: pytest.CaptureFixture[str]) -> None:
    model, place = trip
    name = place.server.tag("tuned")
    place.train("--epochs", "6", "--set", "advanced.lora_rank=16")
    assert place.create("--create", name) == 0
    proof = place.report()
    assert proof["passed"]
    shown = place.server.client.show(name)
    assert {*model.stops, model.end} <= set(shown.parameters["stop"])
    if model.go:
        assert shown.template == model.go
    with GGUFFile.open(place.folder / "export" / "model.gguf") as written:
        assert "tokenizer.ggml.add_bos_token" in written.metadata
    question = "Add 3 and 6.\n"  # one of the training data
    answer = place.chat("tuned", question)
    assert answer == place.trained_answer(question)
    assert answer != place.chat("base", question)
    assert place.verify("--model", name) == 0
    capsys.readouterr()
    assert place.evaluate("--model", name, "--max-tokens", "16", "--perplexity", "2", "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    table = result["text"]
    for row in ("exact_match", "rouge_l", "perplexity", "loss", "general text: perplexity"):
        assert row in table
    values = result["values"]
    assert values["perplexity"] < values["base.perplexity"] / 2
    assert values["trained.perplexity"] == pytest.approx(values["perplexity"], rel=0.05)
