"""An Ollama tag asked through its HTTP API: what is sent, and what is made of the answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ollatune.base.errors import UsageError
from ollatune.evaluation.served import OllamaServed, ServedToken, with_system
from ollatune.ollama.client import OllamaClient
from ollatune.templates import Message

QUESTION = [Message("system", "Be short."), Message("user", "Capital of France?")]


class FakeOllama:
    """Answers /api/version and /api/chat; keeps what it was asked."""

    def __init__(self, *parts: dict[str, Any], version: str = "0.24.0") -> None:
        self.parts = parts
        self.version = version
        self.requests: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/version":
            return httpx.Response(200, json={"version": self.version})
        assert request.url.path == "/api/chat"
        body = json.loads(request.content)
        self.requests.append(body)
        if body.get("_debug_render_only"):
            return httpx.Response(200, json={"_debug_info": {"rendered_template": "rendered!"}})
        lines = "".join(json.dumps(part) + "\n" for part in self.parts)
        return httpx.Response(200, text=lines, headers={"content-type": "application/x-ndjson"})

    def served(self) -> OllamaServed:
        client = OllamaClient(
            "http://127.0.0.1:11434", transport=httpx.MockTransport(self), environment={}
        )
        return OllamaServed(client, "mail:v1")


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "mail:v1", "message": {"role": "assistant", "content": text}, **fields}


LOGPROBS = [
    {
        "token": "Par", "logprob": -0.1, "bytes": list(b"Par"),
        "top_logprobs": [
            {"token": "Par", "logprob": -0.1, "bytes": list(b"Par")},
            {"token": "Ly", "logprob": -2.5, "bytes": list(b"Ly")},
        ],
    }
]  # fmt: skip
END = {"done": True, "done_reason": "stop", "prompt_eval_count": 12, "eval_count": 2}


def test_an_answer_carries_tokens_counts_and_reason() -> None:
    fake = FakeOllama(part("Par", done=False, logprobs=LOGPROBS), part("is", **END))
    answer = fake.served().answer(QUESTION, max_tokens=9, with_logprobs=True)
    assert (answer.text, answer.finish_reason, answer.num_prompt_tokens) == ("Paris", "stop", 12)
    assert answer.tokens == (ServedToken(b"Par", None, {b"Par": -0.1, b"Ly": -2.5}),)
    (request,) = fake.requests
    assert request["options"] == {"temperature": 0, "seed": 0, "num_predict": 9}
    assert request["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of France?"},
    ]
    assert (request["logprobs"], request["top_logprobs"]) == (True, 20)


def test_servers_without_logprobs_or_render_only_are_asked_for_less() -> None:
    old = FakeOllama(part("Paris", **(END | {"done_reason": "length"})), version="0.5.7")
    answer = old.served().answer(QUESTION, max_tokens=1, with_logprobs=True)
    assert answer.finish_reason == "length"
    assert answer.tokens == ()
    assert "logprobs" not in old.requests[0]
    assert old.served().render(QUESTION) is None
    assert FakeOllama().served().render(QUESTION) == "rendered!"


def test_many_questions_are_asked_in_order_without_logprobs() -> None:
    fake = FakeOllama(part("Paris", **END))
    questions = [[Message("user", text)] for text in ("a", "b")]
    answers = fake.served().answer_many(questions, max_tokens=5)
    assert [answer.text for answer in answers] == ["Paris", "Paris"]
    assert [request["messages"][0]["content"] for request in fake.requests] == ["a", "b"]
    assert not any("logprobs" in request for request in fake.requests)


def test_a_load_that_is_no_answer_is_an_error() -> None:
    fake = FakeOllama(part("", **(END | {"done_reason": "load"})))
    with pytest.raises(UsageError, match="did not answer: it ended with 'load'"):
        fake.served().answer(QUESTION, max_tokens=5)


def test_the_system_message_goes_before_what_does_not_begin_with_one() -> None:
    user = [Message("user", "hi")]
    assert with_system(user, "S") == [Message("system", "S"), *user]
    assert with_system(QUESTION, "S") == QUESTION
    assert with_system(user, "") == user
