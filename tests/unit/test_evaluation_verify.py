"""The verdict on a served model, with every way of being wrong made on purpose.

The models are tables over the last two characters, so that one is trained, served and broken in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest

from ollatune.base.errors import UsageError, VerificationError
from ollatune.evaluation.align import text_difference
from ollatune.evaluation.compare import LIMITS_BY_FORMAT
from ollatune.evaluation.observe import TrainedModel
from ollatune.evaluation.served import ServedAnswer, ServedToken
from ollatune.evaluation.verify import VerifyReport, verify
from ollatune.templates import Message

BOS, END = 128, 129
NUM_TOKENS = 130
LIMITS = LIMITS_BY_FORMAT["f16"]
NUM_TENSORS = 5


class Characters:
    """A tokenizer of ASCII characters with two control tokens."""

    bos_id = BOS
    end_of_generation_ids = frozenset({END})
    texts: ClassVar = {BOS: "<s>", END: "</s>"}

    def __init__(self, *, add_bos: bool = True) -> None:
        self.add_bos = add_bos

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        parse_special: bool = True,
        is_continuation: bool = False,
    ) -> list[int]:
        ids = [BOS] if add_bos else []
        while text:
            for token, special in self.texts.items():
                if text.startswith(special):
                    ids.append(token)
                    text = text.removeprefix(special)
                    break
            else:
                ids.append(ord(text[0]))
                text = text[1:]
        return ids

    def token_bytes(self, token_id: int, /) -> bytes:
        return self.texts.get(token_id, chr(token_id % 128)).encode()


class TableModel:
    """Logits by the last two tokens: a base and the sum of the updates of NUM_TENSORS tensors."""

    def __init__(self, seed: int = 0, *, tuned: Sequence[int] = range(NUM_TENSORS)) -> None:
        self.logits = np.random.default_rng(seed).normal(scale=4.0, size=(NUM_TOKENS,) * 2)
        self.logits[:, :32] -= 50  # control characters are not said
        self.logits[:, [BOS, 127, ord(":")]] -= 50
        for tensor in tuned:
            self.logits += np.random.default_rng(100 + tensor).normal(
                scale=0.8, size=(NUM_TOKENS,) * 2
            )

    def row(self, ids: Sequence[int]) -> np.ndarray:
        logits = self.logits[ids[-1]].copy()
        since_question = len(ids) - max(i for i, token in enumerate(ids) if token == ord(":"))
        logits[END] = 2.0 * since_question - 10  # the longer the answer, the likelier its end
        return logits - np.log(np.exp(logits).sum())

    def logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        return np.stack([self.row(ids[: position + 1]) for position in positions])


@dataclass(frozen=True)
class FakeServer:
    """Serves a TableModel, rightly or wrongly."""

    model: TableModel
    template: str = "Q: {}\nA: "
    tokenizer: Characters = field(default_factory=Characters)
    ends: frozenset[int] = frozenset({END})
    stops: tuple[str, ...] = ()
    shows_prompts: bool = True
    shows_ids: bool = True
    num_top: int = 64
    repeat_penalty: float = 0.0
    description: str = "a table"

    def render(self, messages: Sequence[Message]) -> str | None:
        return self.prompt(messages) if self.shows_prompts else None

    def prompt(self, messages: Sequence[Message]) -> str:
        return self.template.format(messages[-1].content)

    def tokenize(self, prompt: str) -> list[int] | None:
        ids = self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)
        return ids if self.shows_ids else None

    def answer(
        self, messages: Sequence[Message], *, max_tokens: int, with_logprobs: bool = False
    ) -> ServedAnswer:
        prompt_ids = self.tokenizer.encode(self.prompt(messages), add_bos=self.tokenizer.add_bos)
        ids, tokens, text = list(prompt_ids), [], ""
        for _ in range(max_tokens):
            row = self.model.row(ids)
            penalised = row.copy()
            penalised[ids] -= self.repeat_penalty
            token = int(penalised.argmax())
            is_end = token in self.ends
            tokens.append(self.position(None if is_end else token, row))
            if is_end:
                return ServedAnswer(text, "stop", len(prompt_ids), tuple(tokens))
            ids.append(token)
            text += self.tokenizer.token_bytes(token).decode()
            for stop in self.stops:
                if stop in text:
                    return ServedAnswer(
                        text[: text.index(stop)],
                        "stop",
                        len(prompt_ids),
                        tuple(tokens[: -len(stop)]),
                    )
        return ServedAnswer(text, "length", len(prompt_ids), tuple(tokens))

    def position(self, token: int | None, row: np.ndarray) -> ServedToken:
        likely = np.argsort(row)[::-1][: self.num_top]
        if self.shows_ids:
            top = {int(i): float(row[i]) for i in likely}
            return ServedToken(b"" if token is None else None, token, top)
        raw = b"" if token is None else self.tokenizer.token_bytes(token)
        return ServedToken(
            raw, None, {self.tokenizer.token_bytes(int(i)): float(row[i]) for i in likely}
        )

    def answer_many(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int
    ) -> list[ServedAnswer]:
        return [self.answer(messages, max_tokens=max_tokens) for messages in conversations]


TUNED, BASE = TableModel(), TableModel(tuned=())
SERVER = FakeServer(TUNED)
CONVERSATIONS = [[Message("user", text)] for text in ("Hello", "Where is it?", "ABC", "zebra 7")]


def trained(**changes: object) -> TrainedModel:
    model = TrainedModel(
        render=lambda messages: f"Q: {messages[-1].content}\nA: ",
        tokenizer=Characters(),
        logprobs=TUNED.logprobs,
        base_logprobs=BASE.logprobs,
    )
    return replace(model, **changes)  # type: ignore[arg-type]


def check(server: FakeServer, **changes: object) -> VerifyReport:
    return verify(trained(**changes), server, CONVERSATIONS, limits=LIMITS, max_tokens=30)


def failed(report: VerifyReport) -> set[str]:
    return {one.name for one in report.checks if one.passed is False}


def test_the_trained_model_itself_passes() -> None:
    report = check(SERVER)
    assert report.passed, report.table()
    assert report.cause == ""
    assert [one.passed for one in report.checks] == [True] * 5
    assert report.difference.num_positions >= 12
    assert report.difference.max_kl < 1e-6
    assert report.difference.argmax_agreement == 1.0
    assert "same" in {seen.ending for seen in report.observations}
    report.require()


def test_an_ollama_like_server_passes_by_bytes_and_counts() -> None:
    report = check(replace(SERVER, shows_ids=False, num_top=20))
    assert report.passed, report.table()
    assert report.difference.num_positions >= 12
    assert report.difference.max_kl < 1e-6


def test_an_old_server_that_shows_nothing_is_still_held_to_its_answers() -> None:
    old = replace(SERVER, shows_prompts=False, shows_ids=False, num_top=0)
    report = check(old)
    assert report.passed, report.table()
    assert {one.name: one.passed for one in report.checks} == {
        "prompt": None, "tokens": True, "distribution": None, "answers": True, "endings": True,
    }  # fmt: skip
    assert not check(replace(old, model=BASE)).passed


@pytest.mark.parametrize(
    ("broken", "cause", "check_name"),
    [
        (replace(SERVER, template="Q: {}\nA:"), "template", "prompt"),
        (replace(SERVER, template="You help.\nQ: {}\nA: "), "template", "prompt"),
        (replace(SERVER, template="<s>Q: {}\nA: "), "bos", "prompt"),
        (replace(SERVER, tokenizer=Characters(add_bos=False)), "bos", "tokens"),
        (replace(SERVER, ends=frozenset()), "stop", "endings"),
        (replace(SERVER, repeat_penalty=6.0), "parameters", "answers"),
        (replace(SERVER, model=BASE), "recovery", "distribution"),
        (replace(SERVER, model=TableModel(tuned=[0, 1, 2, 4])), "recovery", "distribution"),
        (replace(SERVER, model=TableModel(seed=9)), "wrong_base", "distribution"),
    ],
)
def test_each_fault_is_found_and_named(broken: FakeServer, cause: str, check_name: str) -> None:
    report = check(broken)
    assert not report.passed
    assert report.cause == cause, report.table()
    assert check_name in failed(report)
    assert report.advice
    with pytest.raises(VerificationError, match="a table serves is not what was trained") as caught:
        report.require()
    assert caught.value.exit_code == 9
    assert caught.value.hint == report.advice


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (replace(SERVER, tokenizer=Characters(add_bos=False)), "bos"),
        (replace(SERVER, ends=frozenset()), "stop"),
        (replace(SERVER, model=BASE), "recovery"),
        (replace(SERVER, model=TableModel(seed=9)), "wrong_base"),
    ],
)
def test_faults_are_named_through_an_ollama_like_server_too(broken: FakeServer, cause: str) -> None:
    report = check(replace(broken, shows_ids=False, num_top=20))
    assert report.cause == cause, report.table()


def test_a_doubled_bos_is_found_where_the_file_adds_it_to_a_model_trained_without() -> None:
    report = check(SERVER, tokenizer=Characters(add_bos=False))
    assert report.cause == "bos"
    assert "one beginning-of-text token more" in report.advice


def test_another_vocabulary_is_a_matter_of_the_tokenizer() -> None:
    class Shifted(Characters):
        def encode(self, text: str, **options: bool) -> list[int]:
            return [i + 1 if i == ord("Q") else i for i in super().encode(text, **options)]

    report = check(replace(SERVER, tokenizer=Shifted()))
    assert report.cause == "tokenizer"
    assert "trained with 81 'Q', served with 82 'R'" in report.table()


def test_a_removed_stop_text_and_one_too_many_are_found() -> None:
    answers = [SERVER.answer(messages, max_tokens=30).text for messages in CONVERSATIONS]
    end = max(answers, key=len)[4]  # said in the middle of an answer
    runs_on = check(SERVER, end_texts=(end,))
    assert runs_on.cause == "stop"
    assert "run on past their end" in runs_on.table()
    cut = check(replace(SERVER, stops=(end,)))
    assert cut.cause == "stop"
    assert "end too early" in cut.table()


def test_without_the_base_the_weights_are_blamed_in_general() -> None:
    assert check(replace(SERVER, model=BASE), base_logprobs=None).cause == "weights"


def test_a_tensor_that_lost_its_update_is_found_by_its_recovery_alone() -> None:
    recoveries = {"blk.0.attn_q.weight": 0.98, "blk.1.ffn_up.weight": 0.07}
    report = verify(
        trained(), SERVER, CONVERSATIONS, limits=LIMITS, max_tokens=30, recoveries=recoveries
    )
    assert report.cause == "recovery"
    assert "1 of 2 tensors have lost their update: blk.1.ffn_up.weight 7%" in report.table()
    kept = dict.fromkeys(recoveries, 0.98)
    assert verify(trained(), SERVER, CONVERSATIONS, limits=LIMITS, recoveries=kept).passed
    lost = {"blk.0.attn_q.weight": float("nan")}
    assert not verify(trained(), SERVER, CONVERSATIONS, limits=LIMITS, recoveries=lost).passed


def noisy(scale: float) -> FakeServer:
    model = TableModel()
    model.logits += np.random.default_rng(5).normal(scale=scale, size=model.logits.shape)
    return replace(SERVER, model=model)


@pytest.mark.parametrize(
    ("format_name", "finer", "noise"),
    [("f16", "f32", 0.002), ("q8_0", "bf16", 0.15), ("q4", "q6_k", 0.5)],
)
def test_the_noise_of_a_format_passes_its_own_limits_and_no_finer(
    format_name: str, finer: str, noise: float
) -> None:
    server = noisy(noise)
    for name, is_coarse_enough in ((format_name, True), (finer, False)):
        limits = LIMITS_BY_FORMAT[name]
        report = verify(trained(), server, CONVERSATIONS, limits=limits, max_tokens=30)
        assert report.passed == is_coarse_enough, f"{name}: {report.table()}"


def test_the_report_is_json_and_says_what_was_asked() -> None:
    for server in (SERVER, replace(SERVER, template="Q: {}\nA:")):
        report = check(server)
        content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert content["passed"] is report.passed
        assert content["cause"] == report.cause
        assert len(content["prompts"]) == len(CONVERSATIONS)
        assert content["prompts"][0]["prompt"] == "Q: Hello\nA: "


def test_nothing_to_ask_is_a_mistake_not_a_pass() -> None:
    with pytest.raises(UsageError, match="no prompts"):
        verify(trained(), SERVER, [], limits=LIMITS)


def test_text_differences_show_both_sides() -> None:
    assert text_difference("same", "same") == ""
    assert (
        text_difference("abcd", "abXd") == "at character 2: trained with 'abcd', served with 'abXd'"
    )
    assert text_difference("ab", "abc") == "at character 2: trained with 'ab', served with 'abc'"
