"""`/api/generate`, `/api/chat` and OpenAI's form: rendering as the version does it, then the model runner."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ollatune.base.errors import InputError
from ollatune.gguf.reader import GGUFFile
from ollatune.ollama.names import ModelName
from ollatune.templates import Message, load_chat_template
from ollatune.templates.ollama_render import OllamaTemplate
from tests.fake_ollama.create import ApiError
from tests.fake_ollama.generation import GeneratedToken, GenerateFunction, GenerationRequest
from tests.fake_ollama.go_text import now
from tests.fake_ollama.store import FakeStore, Model

_INTEGERS = ("num_ctx", "num_predict", "seed", "top_k", "repeat_last_n", "num_keep")
_DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


class Answering:
    """One request to a model. `parts()` are the events; a request without `stream` gets them joined."""

    def __init__(
        self,
        store: FakeStore,
        numbers: tuple[int, ...],
        request: Mapping[str, Any],
        generate: GenerateFunction,
        *,
        is_chat: bool,
    ) -> None:
        self.store, self.numbers, self.request, self.generate = store, numbers, request, generate
        self.is_chat = is_chat
        self.given_name = str(request.get("model") or "")
        if not self.given_name:
            raise ApiError(400, "model is required")
        model = (
            self.store.read(ModelName.parse(self.given_name))
            if ModelName.is_valid(self.given_name)
            else None
        )
        if model is None:
            raise ApiError(404, f"model '{self.given_name}' not found")
        self.model: Model = model
        self.params = _json_layer(store, model, "params", {})
        self.options = {**self.params, **(request.get("options") or {})}
        for key, value in self.options.items():
            if key == "stop" and not isinstance(value, list):
                raise ApiError(500, 'option "stop" must be of type array')
            if key in _INTEGERS and (isinstance(value, bool) or not isinstance(value, int)):
                raise ApiError(500, f'option "{key}" must be of type integer')
        self.options.setdefault("repeat_penalty", 1.0 if numbers >= (0, 32, 10) else 1.1)

    @property
    def is_empty(self) -> bool:
        """Nothing to answer: the request loads or unloads the model."""
        return not self.request.get("messages" if self.is_chat else "prompt")

    @property
    def unloads(self) -> bool:
        return self.is_empty and self.request.get("keep_alive") == 0

    def whole(self) -> dict[str, Any]:
        """The single answer of `stream: false`."""
        if self.is_empty:
            return {
                **self._part(""),
                "done": True,
                "done_reason": "unload" if self.unloads else "load",
            }
        if self.request.get("_debug_render_only") and self.numbers >= (0, 11, 5):
            part = self._part("")
            if self.is_chat:
                part["message"]["role"] = ""
            return {**part, "done": False, "_debug_info": {"rendered_template": self.prompt()}}
        parts = list(self.parts())
        last = parts[-1]
        if self.is_chat:
            text = "".join(part["message"]["content"] for part in parts)
            joined = {**last, "message": {"role": "assistant", "content": text}}
        else:
            joined = {**last, "response": "".join(part["response"] for part in parts)}
        logprobs = [item for part in parts for item in part.get("logprobs", [])]
        return {**joined, "logprobs": logprobs} if logprobs else joined

    def parts(self) -> Iterator[dict[str, Any]]:
        """Events of a stream: one per token, then the one with the counts."""
        if self.is_empty or self.request.get("_debug_render_only"):
            yield self.whole()
            return
        top = int(self.request.get("top_logprobs") or 0)
        paths = [self.store.blob_path(layer["digest"]) for layer in self.model.of_kind("adapter")]
        weights = self.store.blob_path(self.model.of_kind("model")[0]["digest"])
        answer = self.generate(
            GenerationRequest(weights, tuple(paths), self.prompt(), self.options, top)
        )
        pending: list[GeneratedToken] = []
        for token in answer.tokens:
            pending.append(token)
            try:
                text = b"".join(piece.raw for piece in pending).decode()
            except UnicodeDecodeError:
                continue  # a character is spread over several tokens
            part = self._part(text)
            if self.request.get("logprobs"):
                part["logprobs"] = [_logprob(piece, top) for piece in pending]
            pending = []
            yield part
        last = {**self._part(""), "done": True, "done_reason": answer.done_reason}
        if not self.is_chat and not self.request.get("raw"):
            last["context"] = [*answer.prompt_ids, *answer.output_ids]
        last.update(dict.fromkeys(_DURATIONS, 1_000_000))
        yield {
            **last,
            "prompt_eval_count": len(answer.prompt_ids),
            "eval_count": answer.num_output_tokens,
        }

    def prompt(self) -> str:
        """What the model is given."""
        request = self.request
        if not self.is_chat and request.get("raw"):
            return str(request.get("prompt") or "")
        try:
            return self._render(self._messages())
        except InputError as error:
            raise ApiError(400, str(error)) from error

    def _messages(self) -> list[Message]:
        own = _json_layer(self.store, self.model, "messages", [])
        system = "".join(self.store.text(layer) for layer in self.model.of_kind("system"))
        if self.is_chat:
            given = [*own, *self.request["messages"]]
            if self.request["messages"][0].get("role") != "system" and system:
                given = [{"role": "system", "content": system}, *given]
        else:
            system = self.request.get("system") or system
            given = [{"role": "system", "content": system}] if system else []
            given += [*own, {"role": "user", "content": self.request["prompt"]}]
        return [_message(item) for item in given]

    def _render(self, messages: Sequence[Message]) -> str:
        layers = self.model.of_kind("template")
        go_text = self.request.get("template") or (self.store.text(layers[-1]) if layers else None)
        jinja, bos, eos = self._jinja()
        if (
            self.numbers >= (0, 30, 0)
            and jinja
            and (go_text is None or _jinja_can_more(jinja, go_text))
        ):
            template = load_chat_template(jinja_text=jinja, bos_text=bos, eos_text=eos)
            return template.render_prompt(messages, self.request.get("tools"))
        return OllamaTemplate(go_text or "{{ .Prompt }}").render(
            messages, self.request.get("tools"), think=self.request.get("think"),
            model=self.given_name, full_model_name=str(self.model.name),
        )  # fmt: skip

    def _jinja(self) -> tuple[str, str, str]:
        with GGUFFile.open(self.store.blob_path(self.model.of_kind("model")[0]["digest"])) as gguf:
            metadata = gguf.metadata
            tokens: Any = metadata.get("tokenizer.ggml.tokens", [])
            texts = [
                str(tokens[number]) if isinstance(number, int) and number < len(tokens) else ""
                for number in (metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos"))
            ]
            return str(metadata.get("tokenizer.chat_template", "")), texts[0], texts[1]

    def _part(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"model": self.given_name, "created_at": now()}
        if self.is_chat:
            part["message"] = {"role": "assistant", "content": text}
        else:
            part["response"] = text
        return {**part, "done": False}


def openai_answer(native: Mapping[str, Any]) -> dict[str, Any]:
    prompt, output = native["prompt_eval_count"], native["eval_count"]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": native["model"],
        "system_fingerprint": "fp_ollama",
        "choices": [
            {"index": 0, "message": native["message"], "finish_reason": native["done_reason"]}
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        },
    }


def _jinja_can_more(jinja: str, go_text: str) -> bool:
    """shouldPreferChatTemplate: the file's Jinja beats an explicit TEMPLATE that lacks what it can do."""
    go = OllamaTemplate(go_text)
    has_tools = "tools" in jinja or "tool_call" in jinja
    has_thinking = "<think>" in jinja and "</think>" in jinja
    return (has_tools and not go.supports_tools) or (has_thinking and not go.supports_thinking)


def _message(item: Mapping[str, Any]) -> Message:
    return Message(
        str(item.get("role", "")),
        str(item.get("content", "")),
        str(item.get("thinking", "")),
        tuple(item.get("tool_calls") or ()),
        str(item.get("tool_name", "")),
    )


def _logprob(token: GeneratedToken, top: int) -> dict[str, Any]:
    item: dict[str, Any] = _one(token.raw, token.logprob)
    if top:
        item["top_logprobs"] = [_one(raw, logprob) for raw, logprob in token.alternatives[:top]]
    return item


def _one(raw: bytes, logprob: float) -> dict[str, Any]:
    item: dict[str, Any] = {"token": raw.decode(errors="replace"), "logprob": logprob}
    return {**item, "bytes": list(raw)} if raw else item


def _json_layer(store: FakeStore, model: Model, kind: str, default: Any) -> Any:
    found = model.of_kind(kind)
    return json.loads(store.text(found[-1])) if found else default
