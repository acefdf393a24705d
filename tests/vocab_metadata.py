"""Real vocabularies as GGUF metadata, for tiny models that llama.cpp can load (`tiny_gguf(…, tokenizer=…)`).

Three kinds of name: those of PUBLISHED_VOCABS (converted here from `tokenizer.json`, as llama.cpp's converter would),
`ggml:NAME` for the metadata of llama.cpp's own `ggml-vocab-NAME.gguf`, taken over unchanged, and `mistral:VERSION` for
Mistral's SentencePiece models.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from ollatune.gguf.reader import GGUFFile
from tests.assets import ggml_vocab, mistral_sentencepiece
from tests.published_vocabs import tokenizer_files

Metadata = dict[str, tuple[Any, gguf.GGUFValueType]]

PRE_TOKENIZERS = {
    "llama3": "llama-bpe",
    "llama3_1": "llama-bpe",
    "llama3_2": "llama-bpe",
    "qwen2_5": "qwen2",
    "qwen3": "qwen2",
    "mistral_nemo": "tekken",
    "mistral_small": "tekken",
    "phi4": "dbrx",
    "phi4_mini": "gpt-4o",
}
SENTENCEPIECE = ("gemma2", "gemma3", "llama2")
_NO_SPACE_PREFIX = ("gemma2", "gemma3")
_UNREACHABLE_SCORE = -1e6
_KEY = "tokenizer.ggml."


def vocab_metadata(name: str) -> Metadata:
    """`tokenizer.ggml.*` of vocabulary `name` by key, as (value, type); no chat template, as not all parse everywhere.

    Skips the test where the vocabulary cannot be fetched.
    """
    if name.startswith("ggml:"):
        return _from_file(name.removeprefix("ggml:"))
    if name.startswith("mistral:"):
        return _from_sentencepiece(name.removeprefix("mistral:"))
    return _convert(name, *tokenizer_files(name))


def _from_file(name: str) -> Metadata:
    with GGUFFile.open(ggml_vocab(name)) as file:
        return {
            key: (file.metadata[key], gguf.GGUFValueType(file.metadata_type(key)))
            for key in file.metadata
            if key.startswith(_KEY)
        }


def _from_sentencepiece(version: str) -> Metadata:
    """As llama.cpp's converter writes it. Mistral 7B's tokenizers put BOS in front."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(mistral_sentencepiece(version)))
    every = range(model.vocab_size())
    kinds, token_type = gguf.GGUFValueType, gguf.TokenType
    types = [int(token_type.NORMAL)] * len(every)
    for is_kind, kind in (
        (model.is_control, token_type.CONTROL),
        (model.is_unknown, token_type.UNKNOWN),
        (model.is_byte, token_type.BYTE),
        (model.is_unused, token_type.UNUSED),
    ):
        for i in filter(is_kind, every):
            types[i] = int(kind)
    return {
        f"{_KEY}model": ("llama", kinds.STRING),
        f"{_KEY}pre": ("default", kinds.STRING),
        f"{_KEY}tokens": ([model.id_to_piece(i) for i in every], kinds.ARRAY),
        f"{_KEY}scores": ([model.get_score(i) for i in every], kinds.ARRAY),
        f"{_KEY}token_type": (types, kinds.ARRAY),
        f"{_KEY}add_bos_token": (True, kinds.BOOL),
        f"{_KEY}bos_token_id": (model.bos_id(), kinds.UINT32),
        f"{_KEY}eos_token_id": (model.eos_id(), kinds.UINT32),
        f"{_KEY}unknown_token_id": (model.unk_id(), kinds.UINT32),
    }


def _convert(name: str, tokenizer: dict[str, Any], config: dict[str, Any]) -> Metadata:
    kinds = gguf.GGUFValueType
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    ids |= {token["content"]: token_id for token_id, token in added.items()}
    num_tokens = max(ids.values()) + 1
    tokens = [f"[PAD{i}]" for i in range(num_tokens)]
    types = [int(gguf.TokenType.UNUSED)] * num_tokens
    for text, i in ids.items():
        tokens[i], types[i] = text, int(gguf.TokenType.NORMAL)
    for i, token in added.items():
        is_special = token["special"]
        types[i] = int(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
    metadata: Metadata = {
        f"{_KEY}model": ("llama" if name in SENTENCEPIECE else "gpt2", kinds.STRING),
        f"{_KEY}pre": (PRE_TOKENIZERS.get(name, "default"), kinds.STRING),
        f"{_KEY}tokens": (tokens, kinds.ARRAY),
        f"{_KEY}token_type": (types, kinds.ARRAY),
        f"{_KEY}add_bos_token": (_adds_bos(tokenizer, config), kinds.BOOL),
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    if name in SENTENCEPIECE:
        _finish_sentencepiece(tokens, types, ids)
        metadata[f"{_KEY}scores"] = (_scores(tokens, merges), kinds.ARRAY)
        if name in _NO_SPACE_PREFIX:
            metadata[f"{_KEY}add_space_prefix"] = (False, kinds.BOOL)
    else:
        metadata[f"{_KEY}merges"] = (merges, kinds.ARRAY)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, key in roles.items():
        if config.get(role) in ids:
            metadata[f"{_KEY}{key}_token_id"] = (ids[config[role]], kinds.UINT32)
    return metadata


def _adds_bos(tokenizer: dict[str, Any], config: dict[str, Any]) -> bool:
    bos = config.get("bos_token")
    return bool(bos) and json.dumps(bos) in json.dumps(tokenizer["post_processor"])


def _finish_sentencepiece(tokens: list[str], types: list[int], ids: dict[str, int]) -> None:
    first_byte = ids["<0x00>"]
    for byte in range(256):
        # Gemma 2's tokenizer.json has a literal tab where <0x09> should be
        tokens[first_byte + byte] = f"<0x{byte:02X}>"
        types[first_byte + byte] = int(gguf.TokenType.BYTE)
    types[ids["<unk>"]] = int(gguf.TokenType.UNKNOWN)
    for i, kind in enumerate(types):
        if kind == gguf.TokenType.USER_DEFINED:  # llama.cpp's converter does so too
            tokens[i] = tokens[i].replace("▁", " ")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece scores whose order is that of the merges: minus the rank of the first merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks[token]) if token in ranks else _UNREACHABLE_SCORE for token in tokens]
