"""llama.cpp in process: the engine that Ollama runs, on one GGUF file, for exact questions and greedy answers.

The package xllamacpp runs llama.cpp's server inside this process; it is spoken to over loopback, with a key that only
this process knows. Attention caches are float32 and flash attention is off, so that a float32 file gives what
PyTorch gives to about 1e-4 in a logprob.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError, OllatuneError, ServiceError, UsageError
from ollatune.base.text import printable

Prompt = str | Sequence[int]
"""Text, tokenised as a server would (special tokens parsed, BOS where the file says so), or token ids as they are."""

Logprobs = npt.NDArray[np.float32]

_REQUEST_TIMEOUT_SECONDS = 3600.0
_FORCING_BIAS = 1e4
"""Added to one token's logit it makes greedy choice take that token, while the reported logprobs stay untouched."""

_MAX_STOP_TOKENS = 32
_COMPARED_CHARACTERS = 24


@dataclass(frozen=True)
class Generation:
    """A greedy answer. `token_ids` is without the end-of-generation token; "length": cut at max_tokens.

    `top_logprobs`, where asked for: per position the most probable token ids with their logprobs, the position of the
    end token included; empty for a token after which a character is incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    top_logprobs: tuple[dict[int, float], ...] = ()


class LlamaCppEngine:
    """One GGUF file, optionally with a GGUF LoRA adapter, loaded in llama.cpp; a context manager.

    `context`: tokens a prompt and its answer may take together (llama.cpp rounds it up to a multiple of 256).
    `threads`: default all cores this process may use, or OMP_NUM_THREADS. `parallel`: prompts decoded at a time by
    `greedy_many`; memory for the cache grows with it.

    Raises UsageError where the extra is not installed, InputError where a file is missing or llama.cpp refuses it.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 2048,
        threads: int | None = None,
        adapter: Path | None = None,
        parallel: int = 1,
    ) -> None:
        llama_cpp = _import_llama_cpp()
        for file in (path, adapter):
            if file is not None and not file.is_file():
                raise InputError(f"There is no file {file}.", hint="Check the path.")
        self.path = path
        self.context = context
        self.version = str(llama_cpp.__version__)
        self._key = secrets.token_hex(16)
        parameters = llama_cpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context * parallel  # the server divides it among the parallel prompts
        parameters.n_parallel = parallel
        parameters.fit_params = False  # would shrink the context silently where memory is short
        parameters.n_gpu_layers = 0  # the reference is the CPU's arithmetic
        parameters.cpuparams.n_threads = threads or available_threads()
        parameters.cpuparams_batch.n_threads = threads or available_threads()
        parameters.cache_type_k = parameters.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cache_ram_mib = 0  # no copies of finished prompts
        parameters.verbosity = -1
        parameters.warmup = False
        parameters.port = 0  # any free one, on loopback
        parameters.api_keys = [self._key]
        if adapter is not None:
            parameters.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        try:
            self._server: Any = llama_cpp.Server(parameters)
        except Exception as error:  # the binding raises RuntimeError and others, all for the same
            files = f"{path}" if adapter is None else f"{path} with the adapter {adapter}"
            raise InputError(
                f"llama.cpp {self.version} cannot load {files}: {str(error).rstrip('.')}.",
                hint="The file is damaged, of an architecture it does not know, or too large for the memory.",
            ) from error
        address = urlsplit(self._server.listening_address)
        self._address = (address.hostname or "127.0.0.1", address.port or 0)
        self._num_tokens: int | None = None
        self._has_computed = False

    @property
    def description(self) -> str:
        """For reports: which engine answered."""
        return f"llama.cpp in process (xllamacpp {self.version})"

    @property
    def vocab_size(self) -> int:
        """Rows of the output: the length of every logprob vector."""
        if self._num_tokens is None:
            self._num_tokens = int(self._call("GET", "/v1/models")["data"][0]["meta"]["n_vocab"])
        return self._num_tokens

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids as the server computes them. `add_special`: BOS and EOS where the file says so."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._call("POST", "/tokenize", body)["tokens"]]

    def next_token_logprobs(self, prompt: Prompt) -> Logprobs:
        """Log-probability of every token as the next one, float32[vocab_size]."""
        logprobs_V: Logprobs = self.logprobs_for([prompt])[0]
        return logprobs_V

    def logprobs_for(self, prompts: Sequence[Prompt]) -> Logprobs:
        """`next_token_logprobs` of each prompt, float32[len(prompts), vocab_size]."""
        logprobs_PV = np.full((len(prompts), self.vocab_size), -np.inf, dtype=np.float32)
        for row, prompt in enumerate(prompts):
            alternatives = self._position_forced_to(
                self._whole_character_id, prompt, self.vocab_size
            )
            ids = np.fromiter((item["id"] for item in alternatives), np.int64, len(alternatives))
            values = [_number(item["logprob"]) for item in alternatives]
            logprobs_PV[row, ids] = np.asarray(values, dtype=np.float32)
        return logprobs_PV

    def target_logprobs(self, prompt: Prompt, target_ids: Sequence[int]) -> Logprobs:
        """Log-probability of each target token given the prompt and the targets before it, float32[len(target_ids)]."""
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        logprobs_T = np.empty(len(target_ids), dtype=np.float32)
        for position, token in enumerate(target_ids):
            before = [*ids, *target_ids[:position]]
            found = self._position_forced_to(int(token), before, 1, keeps_cache=True)
            if found:
                logprobs_T[position] = _number(found[0]["logprob"])
            else:
                logprobs_T[position] = self.next_token_logprobs(before)[token]
        return logprobs_T

    def greedy(
        self, prompt: Prompt, *, max_tokens: int, stop: Sequence[str] = (), top: int = 0
    ) -> Generation:
        """The most probable continuation, token by token, until an end token, a stop text or `max_tokens`.

        `top` asks for so many alternatives at each position.
        """
        return self.greedy_many([prompt], max_tokens=max_tokens, stop=stop, top=top)[0]

    def greedy_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        top: int = 0,
    ) -> list[Generation]:
        """`greedy` for each prompt, in order; what prompts have in common at their start is computed once."""
        if not prompts:
            return []
        answers = self._complete(
            [_sent(prompt) for prompt in prompts],
            num_alternatives=top,
            keeps_cache=True,
            n_predict=max_tokens,
            stop=list(stop),
            return_tokens=True,
        )
        rows = answers if isinstance(answers, list) else [answers]
        return [self._generation(row) for row in sorted(rows, key=lambda row: int(row["index"]))]

    def close(self) -> None:
        """Stop the server and its threads and free the model. Calling it again does nothing.

        A server whose loop has not begun yet never hears that it should end, and the wait for its thread has no end
        then: one that was never asked anything is asked for a token first.
        """
        if self._server is not None and not self._has_computed:
            with contextlib.suppress(OllatuneError, OSError, ValueError):
                self._complete([0])
        self._server = None

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _position_forced_to(
        self, token: int, prompt: Prompt, num_alternatives: int, *, keeps_cache: bool = False
    ) -> list[dict[str, Any]]:
        """The alternatives after `prompt`, the chosen token being made `token`; with one alternative that token itself.

        Empty where `token` is a part of a character: the server then reports nothing.
        """
        answer = self._complete(
            prompt,
            num_alternatives=num_alternatives,
            keeps_cache=keeps_cache,
            logit_bias=[[token, _FORCING_BIAS]],
        )
        positions = answer.get("completion_probabilities")
        if not positions:
            return []
        chosen: dict[str, Any] = positions[0]
        if chosen["id"] != token:
            raise ServiceError(f"llama.cpp chose token {chosen['id']} where {token} was forced.")
        return [chosen] if num_alternatives == 1 else list(chosen["top_logprobs"])

    def _generation(self, answer: dict[str, Any]) -> Generation:
        tokens = [int(token) for token in answer["tokens"]]
        ending = answer["stop_type"]
        if ending == "word":
            tokens = self._before_stop_text(tokens, str(answer["content"]))
        return Generation(
            text=str(answer["content"]),
            # an end token is the last of `tokens`
            token_ids=tuple(tokens[:-1] if ending == "eos" else tokens),
            finish_reason="length" if ending == "limit" else "stop",
            num_prompt_tokens=int(answer["tokens_evaluated"]),
            top_logprobs=_alternatives(tokens, answer.get("completion_probabilities", ())),
        )

    def _before_stop_text(self, tokens: list[int], text: str) -> list[int]:
        """`tokens` without those of the stop text, which the server takes out of the text alone.

        A token within which the stop text begins goes as well.
        """
        for end in range(len(tokens), max(0, len(tokens) - _MAX_STOP_TOKENS) - 1, -1):
            said = self._call("POST", "/detokenize", {"tokens": tokens[:end]})["content"]
            if text.endswith(said[-_COMPARED_CHARACTERS:]):
                return tokens[:end]
        return tokens

    @functools.cached_property
    def _whole_character_id(self) -> int:
        """A token that is no part of a character."""
        return self.tokenize("0", add_special=False)[-1]

    def _complete(
        self,
        prompt: Any,
        *,
        num_alternatives: int = 0,
        keeps_cache: bool = False,
        **fields: Any,
    ) -> Any:
        """Greedy completion, one token unless told otherwise, no sampler but the choice of the largest logit.

        Without `keeps_cache` the prompt is computed in one piece, so that the answer does not depend on what was asked
        before.
        """
        body = {
            "prompt": _sent(prompt),
            "n_predict": 1,
            "temperature": 0,
            "samplers": ["temperature"],
            "repeat_penalty": 1.0,
            "n_probs": num_alternatives,
            "cache_prompt": keeps_cache,
        }
        answer = self._call("POST", "/completion", body | fields)
        self._has_computed = True
        return answer

    def _call(self, method: str, route: str, body: Any = None) -> Any:
        if self._server is None:
            raise UsageError(f"The engine for {self.path} is closed.")
        connection = http.client.HTTPConnection(*self._address, timeout=_REQUEST_TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, route, content, headers)
            response = connection.getresponse()
            answer = response.read()
        if response.status != http.client.OK:
            raise self._refusal(response.status, answer)
        return json.loads(answer)

    def _refusal(self, status: int, answer: bytes) -> InputError:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = json.loads(answer)["error"]
            if error.get("type") == "exceed_context_size_error":
                return InputError(
                    f"A prompt of {error['n_prompt_tokens']} tokens does not fit the context of {error['n_ctx']}.",
                    hint="Shorten it, or give a larger context.",
                )
            return InputError(f"llama.cpp refused a request ({status}): {error['message']}.")
        return InputError(
            f"llama.cpp refused a request ({status}): {printable(answer.decode(errors='replace'))}."
        )


def available_threads() -> int:
    """OMP_NUM_THREADS, or the cores this process may run on: with more, llama.cpp's threads wait for each other."""
    configured = os.environ.get("OMP_NUM_THREADS", "")
    if configured.isdigit() and int(configured) > 0:
        return int(configured)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_engine_installed() -> bool:
    """Whether the `engine` extra can be used."""
    try:
        _import_llama_cpp()
    except UsageError:
        return False
    return True


def _import_llama_cpp() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError(
            f"llama.cpp in process needs the package xllamacpp, which cannot be imported: {error}.",
            hint="pip install 'ollatune[engine]'",
        ) from error
    return xllamacpp


def _sent(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


def _number(value: float | None) -> float:
    return -np.inf if value is None else value  # JSON has no infinity; the server writes null


def _alternatives(
    tokens: Sequence[int], positions: Sequence[dict[str, Any]]
) -> tuple[dict[int, float], ...]:
    """Per token its alternatives. The server leaves tokens out until a character is whole; theirs are empty."""
    found: list[dict[int, float]] = []
    remaining = list(reversed(positions))
    for token in tokens:
        if remaining and int(remaining[-1]["id"]) == token:
            items = remaining.pop()["top_logprobs"]
            found.append({int(item["id"]): _number(item["logprob"]) for item in items})
        else:
            found.append({})
    return tuple(found) if positions else ()
