"""A server with a base under a tag, and a folder to train in: what tests of the whole trip start from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ollama_server import ServerUnderTest
from tests.run_helpers import run, train_command, write_records

TEMPLATE = "{{- range .Messages }}<bos>{{ .Role }}:{{ .Content }}<eos>{{ end }}<bos>assistant:"
SYSTEM = "Count well."
QUESTION = "Add 30 and 33."
BASE_FIELDS: dict[str, Any] = {
    "template": TEMPLATE, "system": SYSTEM, "license": "MIT",
    "parameters": {"stop": ["<eos>"], "top_k": 7},
}  # fmt: skip


class Place:
    """Commands on the base `tiny` of a server."""

    def __init__(self, server: ServerUnderTest, folder: Path, base: str = "tiny") -> None:
        self.server = server
        self.folder = folder
        self.base = server.tag(base)
        self.data = write_records(folder / "data", train=24)
        self.checkpoint = folder / "run" / "best_model.pt"

    def train(self, *more: str) -> None:
        command = train_command(
            Path(self.base), self.data, self.folder / "run", "--epochs", "3",
            "--set", "advanced.lora_rank=8", *more,
        )  # fmt: skip
        assert run(command) == 0

    def create(self, *more: Any, output: str = "export") -> int:
        return run(
            ["create-modelfile", "--checkpoint", self.checkpoint, "--output",
             self.folder / output, *more]
        )  # fmt: skip

    def verify(self, *more: Any, output: str = "export") -> int:
        return run(
            ["verify", "--checkpoint", self.checkpoint, "--export", self.folder / output, *more]
        )

    def evaluate(self, *more: Any) -> int:
        return run(
            ["evaluate", "--checkpoint", self.checkpoint, "--export", self.folder / "export", *more]
        )

    def report(self, name: str = "verify.json", output: str = "export") -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / output / name).read_bytes())
        return content

    def chat(self, name: str, question: str = QUESTION, *, max_tokens: int = 12) -> str:
        """The greedy answer of a tag."""
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "num_predict": max_tokens}
        return self.server.client.chat(self.server.tag(name), messages, options=options).text

    def trained_answer(self, question: str = QUESTION, *, max_tokens: int = 12) -> str:
        """What the trained model says in PyTorch, token by token."""
        from ollatune.commands.verify import load_run
        from ollatune.evaluation.served import with_system
        from ollatune.modeling.trained import TrainedLogprobs, load_trained
        from ollatune.templates.messages import Message

        checkpoint, config, base = load_run(self.checkpoint)
        logprobs = TrainedLogprobs(load_trained(base, checkpoint.model_state_dict, config))
        messages = with_system([Message("user", question)], base.source.system or "")
        prompt = base.template.render_prompt(messages)
        ids = base.tokenizer.encode(prompt, add_bos=base.tokenizer.add_bos)
        said: list[int] = []
        while len(said) < max_tokens:
            token = int(logprobs([*ids, *said], [len(ids) + len(said) - 1])[0].argmax())
            if token in base.tokenizer.end_of_generation_ids:
                break
            said.append(token)
        return base.tokenizer.decode(said)


class Killed(BaseException):
    """What a kill looks like to the program: nothing after it runs."""


@contextmanager
def dying_at_request(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[str]]:
    """Requests are noted in the list that is given; the `number`th and later ones are not sent: the program dies."""
    sent: list[str] = []
    original = httpx.Client.send

    def send(self: Any, request: httpx.Request, **named: Any) -> Any:
        if len(sent) + 1 >= number:
            raise Killed
        sent.append(f"{request.method} {request.url.path.partition('sha256:')[0]}")
        return original(self, request, **named)

    with monkeypatch.context() as patch:
        patch.setattr(httpx.Client, "send", send)
        yield sent


def requests_of(monkeypatch: pytest.MonkeyPatch, command: Callable[[], Any]) -> list[str]:
    """The requests that `command` sends when nothing stops it."""
    with dying_at_request(monkeypatch, 1 << 30) as sent:
        command()
    return sent


def dies_at_request(
    monkeypatch: pytest.MonkeyPatch, number: int, command: Callable[[], Any]
) -> bool:
    """Run `command`, and let it die before its `number`th request is sent; whether it came to that."""
    with dying_at_request(monkeypatch, number):
        try:
            command()
        except Killed:
            return True
    return False
