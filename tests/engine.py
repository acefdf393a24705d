"""llama.cpp in process, as the reference for tokenisation: ids as the server itself computes them."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import pytest

from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf

_WIDTH = 32


class EngineTokenizer:
    """A llama.cpp server on one model file; a context manager."""

    def __init__(self, path: Path) -> None:
        engine = pytest.importorskip("xllamacpp")
        parameters = engine.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 256
        parameters.n_parallel = 1
        parameters.verbosity = -1
        parameters.port = 0
        parameters.warmup = False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        self._server = engine.Server(parameters)
        address = urlsplit(self._server.listening_address)
        self._connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The server's ids: `add_special` puts BOS and EOS where the file says so."""
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._post("/tokenize", request)["tokens"]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The pieces of `ids`, special tokens included, one after the other."""
        return self._post("/detokenize", {"tokens": list(ids)})["content"]

    def _post(self, route: str, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode()
        self._connection.request("POST", route, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        content = response.read()
        assert response.status == 200, f"{route}: {response.status} {content[:300]!r}"
        return json.loads(content)

    def __enter__(self) -> EngineTokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()
        del self._server


def write_vocabulary_model(
    path: Path, metadata: dict[str, tuple[Any, Any]], *, name: str = "vocabulary"
) -> Path:
    """The smallest llama that llama.cpp loads, all weights zero, with the vocabulary `metadata`."""
    kind = ValueType
    num_tokens = len(metadata["tokenizer.ggml.tokens"][0])
    element_types = {str: kind.STRING, int: kind.INT32, float: kind.FLOAT32}
    records = [
        encode_metadata("general.architecture", "llama", kind.STRING),
        encode_metadata("general.name", name, kind.STRING),
        encode_metadata("llama.attention.layer_norm_rms_epsilon", 1e-5, kind.FLOAT32),
    ]
    sizes = {
        "context_length": 256,
        "embedding_length": _WIDTH,
        "feed_forward_length": _WIDTH,
        "block_count": 1,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
    }
    for key, size in sizes.items():
        records.append(encode_metadata(f"llama.{key}", size, kind.UINT32))
    for key, (value, value_type) in metadata.items():
        if value_type == kind.ARRAY:
            element_type = element_types[type(value[0])]
            records.append(encode_metadata(key, value, kind.ARRAY, element_type=element_type))
        else:
            records.append(encode_metadata(key, value, kind(value_type)))
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = [_zeros("token_embd", num_tokens, _WIDTH), _zeros("output_norm", _WIDTH)]
    tensors += [_zeros(f"blk.0.{matrix}", _WIDTH, _WIDTH) for matrix in matrices]
    tensors += [_zeros("blk.0.attn_norm", _WIDTH), _zeros("blk.0.ffn_norm", _WIDTH)]
    write_gguf(path, records, tensors)
    return path


def _zeros(name: str, *shape: int) -> TensorToWrite:
    is_matrix = len(shape) == 2
    num_bytes = math.prod(shape) * (2 if is_matrix else 4)
    tensor_type = GGMLType.F16 if is_matrix else GGMLType.F32
    return TensorToWrite(f"{name}.weight", shape, tensor_type, lambda: [bytes(num_bytes)])
