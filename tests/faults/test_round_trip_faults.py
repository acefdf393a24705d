"""Exports that were spoiled after they were written: `ollatune verify` ends with 9 and names the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

from ollatune.export.metadata_edits import MetadataEdit, SetKey, edited_records
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.types import ValueType
from ollatune.gguf.writer import TensorToWrite, write_gguf
from tests.fake_ollama import FakeOllama
from tests.run_helpers import CHAT_TEMPLATE, run, train_command, write_records
from tests.tiny_models import EOS_ID, ascii_vocabulary, tiny_gguf

pytest.importorskip("xllamacpp")
from tests.fake_ollama.engine import LlamaCppRunner

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def base_with_own_end(folder: Path, *, seed: int = 0) -> Path:
    """A tiny base whose end token has a name that llama.cpp does not know for one: the metadata alone decide."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(ascii_vocabulary())
    tokens, kind = vocabulary["tokenizer.ggml.tokens"]
    names = {"word0": "wo", "<eos>": "<finish>"}
    template = CHAT_TEMPLATE.replace("<eos>", "<finish>")
    vocabulary |= {
        "tokenizer.ggml.tokens": ([names.get(token, token) for token in tokens], kind),
        "tokenizer.chat_template": (template, gguf.GGUFValueType.STRING),
    }
    return tiny_gguf("llama", folder, tokenizer=vocabulary, seed=seed)


class Trained:
    """A run with its exports, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = base_with_own_end(folder / "bases")
        self.checkpoint = folder / "run" / "best_model.pt"
        data = write_records(folder / "data", train=24)
        command = train_command(
            self.base, data, folder / "run", "--epochs", "8", "--set", "advanced.lora_rank=8"
        )
        assert run(command) == 0
        assert self.create("--output", folder / "export", "--type", "f16") == 0

    def create(self, *more: Any) -> int:
        return run(["create-modelfile", "--checkpoint", self.checkpoint, *more])

    def spoiled(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder / "export", folder / "spoiled"))

    def verify(self, export: Path, *more: str) -> int:
        return run(["verify", "--checkpoint", self.checkpoint, "--export", export, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def rewrite(
    path: Path, edits: Sequence[MetadataEdit] = (), tensors: dict[str, Path] | None = None
) -> None:
    """The file at `path` with metadata edited, and with some tensors as they are in other files."""
    staged = path.with_suffix(".new")
    with GGUFFile.open(path) as file:
        opened = {name: GGUFFile.open(other) for name, other in (tensors or {}).items()}
        to_write = []
        for name in file.tensors:
            source = opened.get(name, file)
            info = source.tensors[name]

            def produce(source: GGUFFile = source, name: str = name) -> list[Any]:
                return [source.tensor_data(name)]

            to_write.append(TensorToWrite(name, info.shape, info.type, produce))
        write_gguf(staged, edited_records(file, edits), to_write, alignment=file.alignment)
        for other in opened.values():
            other.close()
    staged.replace(path)


def edit_modelfile(change: Callable[[str], str]) -> Callable[[Trained, Path], None]:
    def spoil(trained: Trained, export: Path) -> None:
        path = export / "Modelfile"
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))

    return spoil


def edit_metadata(*edits: MetadataEdit) -> Callable[[Trained, Path], None]:
    return lambda trained, export: rewrite(export / "model.gguf", edits)


def untune(trained: Trained, export: Path) -> None:
    name = "blk.1.ffn_down.weight"
    rewrite(export / "model.gguf", tensors={name: trained.base})


def drop_stops_and_end(trained: Trained, export: Path) -> None:
    edit_modelfile(lambda text: "\n".join(
        line for line in text.split("\n") if not line.startswith("PARAMETER stop")
    ))(trained, export)  # fmt: skip
    other = SetKey("tokenizer.ggml.eos_token_id", EOS_ID + 1, ValueType.UINT32)
    rewrite(export / "model.gguf", [other])


FAULTS = {
    "template": edit_modelfile(lambda text: text.replace("assistant:", "assistant: ")),
    "system": edit_modelfile(lambda text: text + 'SYSTEM "Be quiet."\n'),
    "bos-in-file": edit_metadata(SetKey("tokenizer.ggml.add_bos_token", True, ValueType.BOOL)),
    "bos-in-template": edit_modelfile(lambda text: text.replace('TEMPLATE """', 'TEMPLATE """<bos>')),
    "stop": drop_stops_and_end,
    "recovery": untune,
}  # fmt: skip
CAUSES = {"system": "template", "bos-in-file": "bos", "bos-in-template": "bos"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_export_is_found_and_its_cause_named(
    trained: Trained, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export = trained.spoiled(tmp_path)
    assert trained.verify(export) == 0
    FAULTS[fault](trained, export)
    capsys.readouterr()
    assert trained.verify(export) == 9
    errors = capsys.readouterr().err
    report = json.loads((export / "verify.json").read_bytes())
    assert report["cause"] == CAUSES.get(fault, fault), errors
    assert not report["passed"]
    assert f"Cause: {report['cause']}." in errors
    assert "is not what was trained" in errors


def test_an_adapter_served_on_the_wrong_base(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = base_with_own_end(tmp_path / "other", seed=1)
    assert trained.create("--output", tmp_path / "wrong", "--model", other) == 3
    assert "this checkpoint was trained on" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    assert trained.create("--output", adapter, "--format", "adapter") == 0
    assert trained.verify(adapter) == 0
    runner = LlamaCppRunner()
    with FakeOllama(tmp_path / "store", "0.24.0", generate=runner) as server:
        digests = [server.store.add_file(path) for path in (other, adapter / "adapter.gguf")]
        serve(server, adapter, *digests)
        assert trained.verify(adapter, "--model", "wrong", "--host", server.url) == 9
    runner.close()
    report = json.loads((adapter / "verify.json").read_bytes())
    assert report["cause"] == "wrong_base"
    assert "its weights are sha256" in capsys.readouterr().err


def serve(server: FakeOllama, folder: Path, model: str, adapter: str) -> None:
    """Somebody puts the adapter on a model of the same shape, with the right TEMPLATE."""
    from ollatune.ollama.client import OllamaClient
    from ollatune.ollama.modelfile import Modelfile

    modelfile = Modelfile.parse((folder / "Modelfile").read_bytes())
    with OllamaClient(server.url) as client:
        client.create({
            "model": "wrong", "files": {"model.gguf": model}, "adapters": {"adapter.gguf": adapter},
            "template": modelfile.template, "parameters": modelfile.parameters,
        })  # fmt: skip
