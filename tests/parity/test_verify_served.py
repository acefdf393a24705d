"""Faults made in real GGUF files and served by llama.cpp: each is found, and its cause named.

The trained side is PyTorch; the served side a file written by the exporter from the base and the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ollatune.evaluation.compare import limits_for
from ollatune.evaluation.observe import TrainedModel
from ollatune.evaluation.verify import VerifyReport, verify
from ollatune.export.apply import apply_export
from ollatune.export.metadata_edits import MetadataEdit, SetKey
from ollatune.export.plan import plan_export
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.gguf.types import ValueType
from ollatune.modeling.load import load_base_model
from ollatune.templates import Message, load_chat_template
from tests.tiny_models import EOS_ID, TinyModel, ascii_vocabulary, gguf_tensors, tiny_model

pytest.importorskip("xllamacpp")
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.served import LlamaCppServed

pytestmark = pytest.mark.engine

TEMPLATE = "{{ range .Messages }}[{{ .Role }}] {{ .Content }}\n{{ end }}[answer] "
CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
CONVERSATIONS = [
    [Message("user", text)] for text in ("Hello", "Where is it?", "Count to 3", "zebra")
]
Deltas = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Update:
    """A change of one GGUF tensor, by its difference."""

    name: str
    delta: np.ndarray
    kind: str = "test"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    @property
    def apply(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda base: base + torch.from_numpy(self.delta)


@dataclass(frozen=True)
class Case:
    """A base file, what training changed in it, and the trained model in PyTorch."""

    base: Path
    deltas: Deltas
    trained: TrainedModel
    template: str
    kept_types: tuple[str, ...]
    folder: Path

    def export(
        self,
        name: str,
        *,
        base: Path | None = None,
        without: Sequence[str] = (),
        edits: Sequence[MetadataEdit] = (),
        tensor_type: str = "f16",
    ) -> Path:
        updates = [Update(key, delta) for key, delta in self.deltas.items() if key not in without]
        path = self.folder / name / "model.gguf"
        path.parent.mkdir()
        with GGUFFile.open(base or self.base) as file:
            plan = plan_export(file, updates, tensor_type=tensor_type, metadata_edits=list(edits))
            apply_export(plan, path, accept_recovery=True)
        return path

    def check(self, path: Path, *, template: str = "", tensor_type: str = "f16") -> VerifyReport:
        served_template = load_chat_template(go_text=template or self.template)
        with LlamaCppEngine(path, context=256, threads=1) as engine:
            return verify(
                self.trained,
                LlamaCppServed(engine, served_template),
                CONVERSATIONS,
                limits=limits_for([tensor_type], self.kept_types),
                max_tokens=12,
            )


def logprobs_of(model: Any) -> Callable[[Sequence[int], Sequence[int]], np.ndarray]:
    def logprobs(token_ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([list(token_ids)])).logits[0]
        return torch.log_softmax(logits_TV[list(positions)].float(), dim=-1).numpy()

    return logprobs


def trained_model(tuned: Any, base: Any, path: Path, template: str) -> TrainedModel:
    with GGUFFile.open(path) as file:
        tokenizer = GGUFTokenizer.from_metadata(file.metadata)
    return TrainedModel(
        render=load_chat_template(go_text=template).render_prompt,
        tokenizer=tokenizer,
        logprobs=logprobs_of(tuned),
        base_logprobs=logprobs_of(base),
    )


def llama(folder: Path, *, seed: int = 0) -> TinyModel:
    """A tiny random model. Its one merge has a token, so that its vocabulary can encode; its end token has a name
    that llama.cpp does not know for one, so that metadata alone decide."""
    vocabulary = ascii_vocabulary()
    tokens, kind = vocabulary["tokenizer.ggml.tokens"]
    names = {"word0": "wo", "<eos>": "<finish>"}
    tokens = [names.get(token, token) for token in tokens]
    return tiny_model(
        "llama", folder, tokenizer=vocabulary | {"tokenizer.ggml.tokens": (tokens, kind)}, seed=seed
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two layers of random weights; trained to change four tensors, and to end its answers."""
    folder = tmp_path_factory.mktemp("tiny")
    base, tuned = llama(folder), llama(folder.parent).model
    before = gguf_tensors(base.model)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in tuned.model.layers:
            for module in (layer.self_attn.v_proj, layer.mlp.down_proj):
                noise = torch.randn(module.weight.shape, generator=rng)
                module.weight += 0.7 * module.weight.std() * noise
        said = _greedy(tuned, folder, 7)  # a token that it says becomes its end token
        rows = tuned.lm_head.weight[[said, EOS_ID]].clone()
        tuned.lm_head.weight[[EOS_ID, said]] = rows
    after = gguf_tensors(tuned)
    deltas = {
        name: after[name] - before[name] for name in after if (after[name] != before[name]).any()
    }
    assert len(deltas) == 5
    trained = trained_model(tuned, base.model, base.path, TEMPLATE)
    return Case(base.path, deltas, trained, TEMPLATE, (), folder)


def _greedy(model: Any, folder: Path, index: int) -> int:
    with GGUFFile.open(next(folder.glob("*.gguf"))) as file:
        tokenizer = GGUFTokenizer.from_metadata(file.metadata)
    prompt = load_chat_template(go_text=TEMPLATE).render_prompt(CONVERSATIONS[0])
    ids = tokenizer.encode(prompt)
    for _ in range(index):
        ids.append(int(logprobs_of(model)(ids, [len(ids) - 1])[0].argmax()))
    return ids[-1]


@pytest.mark.parametrize("tensor_type", ["f32", "f16", "q8_0"])
def test_a_faithful_export_passes_its_limits(tiny: Case, tensor_type: str) -> None:
    path = tiny.export(f"good-{tensor_type}", tensor_type=tensor_type)
    report = tiny.check(path, tensor_type=tensor_type)
    assert report.passed, report.table()
    assert report.difference.num_positions >= 12
    assert "same" in {seen.ending for seen in report.observations}


def set_bos() -> SetKey:
    return SetKey("tokenizer.ggml.add_bos_token", True, ValueType.BOOL)


def other_end() -> SetKey:
    return SetKey("tokenizer.ggml.eos_token_id", EOS_ID + 1, ValueType.UINT32)


def test_a_broken_template_is_named(tiny: Case) -> None:
    report = tiny.check(tiny.export("template"), template=TEMPLATE.replace("[answer] ", "[answer]"))
    assert report.cause == "template", report.table()


def test_a_bos_too_many_is_named_in_the_file_and_in_the_template(tiny: Case) -> None:
    assert tiny.check(tiny.export("bos", edits=[set_bos()])).cause == "bos"
    assert tiny.check(tiny.export("bos-text"), template="<bos>" + TEMPLATE).cause == "bos"


def test_a_removed_end_token_is_named(tiny: Case) -> None:
    report = tiny.check(tiny.export("stop", edits=[other_end()]))
    assert report.cause == "stop", report.table()


def test_the_base_served_in_place_of_the_tuned_model_is_named(tiny: Case) -> None:
    report = tiny.check(tiny.base)
    assert report.cause == "recovery", report.table()
    assert "nothing of the training arrived" in report.advice


@pytest.mark.parametrize("tensor", range(4))
def test_any_single_tensor_left_untuned_is_named(tiny: Case, tensor: int) -> None:
    names = sorted(name for name in tiny.deltas if name.startswith("blk"))
    report = tiny.check(tiny.export(f"untuned-{tensor}", without=[names[tensor]]))
    assert report.cause == "recovery", report.table()
    assert "of the way from the base to the trained one" in report.advice


def test_an_update_on_the_wrong_base_is_named(tiny: Case, tmp_path: Path) -> None:
    other = llama(tmp_path, seed=1)
    report = tiny.check(tiny.export("wrong-base", base=other.path))
    assert report.cause == "wrong_base", report.table()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The real model with large random updates of rank 2 in three layers."""
    deltas: dict[str, np.ndarray] = {}
    with GGUFFile.open(smollm2_path) as file:
        base, tuned = load_base_model(file), load_base_model(file)
        kept = tuple({info.type.name for info in file.tensors.values()})
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in (5, 14, 23):
            for module, name in (("self_attn.v_proj", "attn_v"), ("mlp.up_proj", "ffn_up")):
                weight = tuned.get_parameter(f"model.layers.{layer}.{module}.weight")
                out_dim, in_dim = weight.shape
                low_rank = torch.randn(out_dim, 2, generator=rng) @ torch.randn(
                    2, in_dim, generator=rng
                )
                delta = 0.5 * float(weight.std()) * low_rank
                weight += delta
                deltas[f"blk.{layer}.{name}.weight"] = delta.numpy()
    trained = trained_model(tuned, base, smollm2_path, CHATML)
    return Case(smollm2_path, deltas, trained, CHATML, kept, tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
@pytest.mark.weights
def test_real_weights_pass_and_their_faults_are_named(smollm2: Case) -> None:
    for tensor_type in ("f16", "q8_0"):
        good = smollm2.export(f"good-{tensor_type}", tensor_type=tensor_type)
        report = smollm2.check(good, tensor_type=tensor_type)
        assert report.passed, report.table()
    assert smollm2.check(smollm2.base).cause == "recovery"
    bos = smollm2.export("bos", edits=[set_bos()])
    assert smollm2.check(bos).cause == "bos"
    assert (
        smollm2.check(good, template=CHATML.replace("assistant\n", "assistant")).cause == "template"
    )
    half = smollm2.export("half", without=sorted(smollm2.deltas)[:3])
    assert smollm2.check(half).cause == "recovery"
