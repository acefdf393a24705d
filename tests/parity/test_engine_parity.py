"""The in-process engine against PyTorch on tiny random models: distributions, greedy answers, limits, refusals."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ollatune.base.errors import InputError, UsageError
from tests.tiny_models import TinyModel, tiny_model

pytest.importorskip("xllamacpp")
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.forgetting import text_perplexity
from ollatune.evaluation.likelihood import (
    answer_targets,
    served_rows,
    text_targets,
    trained_rows,
)
from ollatune.evaluation.metrics import PERPLEXITY
from ollatune.evaluation.score import EvaluationItem
from ollatune.evaluation.served import LlamaCppServed
from ollatune.templates import Message, load_chat_template

pytestmark = pytest.mark.engine

PROMPT_IDS = [10, 77, 3, 201, 45, 140, 9, 260]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Any:
    with LlamaCppEngine(tiny.path, context=64, threads=1, parallel=2) as opened:
        yield opened


def torch_logprobs(tiny: TinyModel, token_ids: list[int]) -> np.ndarray:
    """float32[T, V]: row t is the distribution after token t."""
    with torch.no_grad():
        logits_TV = tiny.model(input_ids=torch.tensor([token_ids])).logits[0].float()
    return torch.log_softmax(logits_TV, dim=-1).numpy()


def torch_greedy(tiny: TinyModel, token_ids: list[int], num_tokens: int) -> list[int]:
    ids = list(token_ids)
    for _ in range(num_tokens):
        ids.append(int(torch_logprobs(tiny, ids)[-1].argmax()))
    return ids[len(token_ids) :]


def test_every_logprob_of_the_vocabulary_equals_pytorch(
    tiny: TinyModel, engine: LlamaCppEngine
) -> None:
    prompts = [PROMPT_IDS[:length] for length in (1, 4, 8)]
    served = engine.logprobs_for(prompts)
    expected = torch_logprobs(tiny, PROMPT_IDS)[[0, 3, 7]]
    assert served.shape == expected.shape == (3, engine.vocab_size)
    np.testing.assert_allclose(served, expected, atol=2e-4)
    np.testing.assert_allclose(np.exp(served).sum(axis=1), 1.0, atol=1e-4)


def test_target_logprobs_are_those_of_the_forced_tokens(
    tiny: TinyModel, engine: LlamaCppEngine
) -> None:
    targets = [7, 250, 31, 31]  # improbable ones too: forcing must not show in the value
    rows = torch_logprobs(tiny, PROMPT_IDS + targets)[len(PROMPT_IDS) - 1 : -1]
    expected = rows[np.arange(len(targets)), targets]
    np.testing.assert_allclose(engine.target_logprobs(PROMPT_IDS, targets), expected, atol=2e-4)


def test_greedy_answers_equal_pytorch_and_keep_their_order(
    tiny: TinyModel, engine: LlamaCppEngine
) -> None:
    prompts = [PROMPT_IDS[:length] for length in (3, 8, 5, 2, 7)]  # more than run in parallel
    answers = engine.greedy_many(prompts, max_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.num_prompt_tokens == len(prompt)
        if answer.finish_reason == "length":
            assert list(answer.token_ids) == torch_greedy(tiny, prompt, 6)
        else:
            assert list(answer.token_ids) == torch_greedy(tiny, prompt, len(answer.token_ids))
    assert engine.greedy_many([], max_tokens=6) == []


def test_a_stop_text_ends_the_answer_and_is_cut_off(engine: LlamaCppEngine) -> None:
    whole = engine.greedy(PROMPT_IDS, max_tokens=12)
    pieces = [
        engine._call("POST", "/detokenize", {"tokens": [t]})["content"] for t in whole.token_ids
    ]
    at = next(i for i in range(2, 12) if pieces[i] not in "".join(pieces[:i]))
    cut = engine.greedy(PROMPT_IDS, max_tokens=12, stop=[pieces[at]], top=1)
    assert cut.finish_reason == "stop"
    assert cut.text == "".join(pieces[:at])
    assert cut.token_ids == whole.token_ids[:at]
    assert len(cut.top_logprobs) <= at  # the server drops some before a stop text


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(engine: LlamaCppEngine) -> None:
    with pytest.raises(InputError, match="300 tokens does not fit the context of 256"):
        engine.greedy([5] * 300, max_tokens=1)


def test_what_is_no_model_is_refused(tmp_path: Path, tiny: TinyModel) -> None:
    with pytest.raises(InputError, match="no file"):
        LlamaCppEngine(tmp_path / "absent.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cannot load .*damaged"):
        LlamaCppEngine(damaged)


def test_closing_frees_threads_and_says_nothing(
    tiny: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    num_threads = threading.active_count()
    opened = LlamaCppEngine(tiny.path, context=32, threads=1)
    opened.greedy([1, 2], max_tokens=1)
    opened.close()
    opened.close()
    assert threading.active_count() == num_threads
    with pytest.raises(UsageError, match="closed"):
        opened.tokenize("a")
    assert capfd.readouterr() == ("", "")


def test_an_engine_that_was_never_asked_is_closed_all_the_same(tiny: TinyModel) -> None:
    """Its thread would be waited for without an end: each try is a chance for that."""
    for _ in range(5):
        LlamaCppEngine(tiny.path, context=32, threads=1).close()


def test_a_missing_extra_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tiny: TinyModel
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(UsageError, match=r"pip install 'ollatune\[engine\]'"):
        LlamaCppEngine(tiny.path)


def test_perplexities_are_those_of_pytorch(tiny: TinyModel, engine: LlamaCppEngine) -> None:
    text = "a plain text"
    ids = engine.tokenize(text)
    rows = torch_logprobs(tiny, ids)[:-1]
    expected = np.exp(-rows[np.arange(len(ids) - 1), ids[1:]].mean())
    assert text_perplexity(engine, text) == pytest.approx(expected, rel=1e-3)
    served = LlamaCppServed(engine, load_chat_template(go_text="{{ .Prompt }}:"))
    items = [
        EvaluationItem((Message("user", "hi"),), "yes"),
        EvaluationItem((Message("user", "a"),), "no"),
    ]
    logprobs = []
    for prompt, target in (("hi:", "yes<eos>"), ("a:", "no<eos>")):
        before, after = engine.tokenize(prompt), engine.tokenize(target)
        assert after[-1] == 129  # the end token is one of those that count
        rows = torch_logprobs(tiny, before + after)[len(before) - 1 : -1]
        logprobs.append(rows[np.arange(len(after)), after])
    expected = np.exp(-np.concatenate(logprobs).mean())
    targets = answer_targets(served, items, end_text="<eos>")
    rows = served_rows(engine, targets)
    assert PERPLEXITY.value(rows) == pytest.approx(expected, rel=1e-3)
    trained = trained_rows(lambda ids, at: torch_logprobs(tiny, ids)[list(at)], targets)
    np.testing.assert_allclose(trained, rows, rtol=1e-3)
    (one,) = text_targets(engine, [text, "", text[:1]][:1])
    assert [*one.given, *one.targets] == ids
    assert PERPLEXITY.value(served_rows(engine, [one])) == pytest.approx(
        text_perplexity(engine, text), rel=1e-6
    )
    with pytest.raises(InputError, match="No held-out text has two tokens"):
        text_targets(engine, ["a", ""])


def test_the_alternatives_of_an_answer_are_its_distributions(
    tiny: TinyModel, engine: LlamaCppEngine
) -> None:
    answer = engine.greedy(PROMPT_IDS, max_tokens=4, top=3)
    rows = torch_logprobs(tiny, [*PROMPT_IDS, *answer.token_ids])[len(PROMPT_IDS) - 1 :]
    for row, top in zip(rows, answer.top_logprobs, strict=False):
        assert set(top) == set(np.argsort(row)[::-1][:3])
        for token, logprob in top.items():
            assert logprob == pytest.approx(row[token], abs=2e-4)
    assert len(answer.top_logprobs) >= len(answer.token_ids) > 0


@pytest.mark.weights
def test_half_a_character_has_its_logprob_too(smollm2_path: Path) -> None:
    with LlamaCppEngine(smollm2_path, context=256, threads=1) as engine:
        prompt, llama = engine.tokenize("An animal: "), engine.tokenize("\N{LLAMA}")
        assert len(llama) == 3  # the server reports no probabilities until the character is whole
        before = [prompt + llama[:length] for length in range(3)]
        rows = engine.logprobs_for(before)
        found = engine.target_logprobs(prompt, llama)
        # one piece and token by token are computed by different kernels, which differ on quantised weights
        np.testing.assert_allclose(found, rows[np.arange(3), llama], atol=0.2)
        answer = engine.greedy("\N{LLAMA}" * 8, max_tokens=6, top=2)
        assert answer.text == "\N{LLAMA}" * 2
        assert [len(top) for top in answer.top_logprobs] == [0, 0, 2, 0, 0, 2]
