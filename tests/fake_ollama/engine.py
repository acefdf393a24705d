"""llama.cpp in process (xllamacpp) as the fake server's model runner."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.fake_ollama.generation import GeneratedToken, GenerationAnswer, GenerationRequest


class LlamaCppRunner:
    """Callable as a GenerateFunction; keeps one model loaded, as long as the requests ask for the same one."""

    def __init__(self, *, context: int = 1024) -> None:
        self._context = context
        self._key: tuple[Path, ...] = ()
        self._server: Any = None

    def close(self) -> None:
        self._server = None
        self._key = ()

    def __call__(self, request: GenerationRequest) -> GenerationAnswer:
        self._load((request.model, *request.adapters))
        options = request.options
        sampling = {
            key: options[key]
            for key in ("temperature", "top_k", "top_p", "min_p", "seed", "repeat_penalty")
            if key in options
        }
        prompt_ids = self._post("/tokenize", {
            "content": request.prompt, "add_special": True, "parse_special": True,
        })["tokens"]  # fmt: skip
        answer = self._post("/completion", {
            "prompt": prompt_ids, "n_predict": options.get("num_predict", -1), "stop": options.get("stop", []),
            "n_probs": max(1, request.num_alternatives), "return_tokens": True, "cache_prompt": False, **sampling,
        })  # fmt: skip
        output_ids = answer["tokens"]
        if answer["stop_type"] == "eos":
            output_ids = output_ids[
                :-1
            ]  # Ollama's context is without the token that ended the answer
        return GenerationAnswer(
            tokens=_tokens(answer),
            done_reason="length" if answer["stop_type"] == "limit" else "stop",
            prompt_ids=tuple(prompt_ids),
            output_ids=tuple(output_ids),
            num_output_tokens=answer["tokens_predicted"],
        )

    def _load(self, key: tuple[Path, ...]) -> None:
        if key == self._key:
            return
        import xllamacpp

        self._server = None
        model, *adapters = key
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = self._context
        parameters.n_parallel = 1
        parameters.verbosity = -1
        parameters.port = 0
        parameters.warmup = False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        if adapters:
            parameters.lora_adapters = [
                xllamacpp.CommonAdapterLoraInfo(str(a), 1.0) for a in adapters
            ]
        self._server = xllamacpp.Server(parameters)
        self._key = key

    def _post(self, route: str, request: dict[str, Any]) -> Any:
        address = urlsplit(self._server.listening_address)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", route, json.dumps(request).encode(), headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(content.decode(errors="replace"))
        return json.loads(content)


def _tokens(answer: dict[str, Any]) -> tuple[GeneratedToken, ...]:
    """The tokens whose text is part of the answer: the one that ends it is not."""
    tokens: list[GeneratedToken] = []
    length = 0
    total = len(answer["content"].encode())
    for item in answer.get("completion_probabilities", []):
        raw = bytes(item["bytes"])
        if length + len(raw) > total:
            break
        length += len(raw)
        alternatives = tuple((bytes(top["bytes"]), top["logprob"]) for top in item["top_logprobs"])
        tokens.append(GeneratedToken(raw, item["logprob"], alternatives))
    return tuple(tokens)
