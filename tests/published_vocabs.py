"""Vocabularies as `tokenizer.json` and `tokenizer_config.json` have them, for models whose own files cannot be fetched.

Mistral Small 3 has Mistral Nemo's Tekken with control tokens where Nemo's file has place holders. Phi-4 and Phi-4-mini
have OpenAI's byte pairs (cl100k and o200k) and control tokens of their own; all ids are those of the published models.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tests.assets import HF_TOKENIZERS, hf_tokenizer_dir, tiktoken_ranks

Files = tuple[dict[str, Any], dict[str, Any]]
"""tokenizer.json and tokenizer_config.json."""

_TEKKEN_CONTROLS = (
    "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_FIRST_TEKKEN_CONTROL = 10


@dataclass(frozen=True)
class _BytePairs:
    ranks: str
    num_tokens: int
    controls: Mapping[str, int]
    eos: str


_BYTE_PAIRS = {
    "phi4": _BytePairs(
        "cl100k_base",
        100352,
        {
            "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
            "<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266, "<|endofprompt|>": 100276,
        },
        "<|im_end|>",
    ),
    "phi4_mini": _BytePairs(
        "o200k_base",
        200064,
        {
            "<|endoftext|>": 199999, "<|endofprompt|>": 200018, "<|assistant|>": 200019, "<|end|>": 200020,
            "<|user|>": 200021, "<|system|>": 200022, "<|tool|>": 200023, "<|/tool|>": 200024,
        },
        "<|endoftext|>",
    ),
}  # fmt: skip

PUBLISHED_VOCABS = (*HF_TOKENIZERS, "mistral_small", *_BYTE_PAIRS)
"""What `tokenizer_files` knows."""


@lru_cache(maxsize=1)
def tokenizer_files(name: str) -> Files:
    """The two files of vocabulary `name`. Skips the test where they cannot be fetched."""
    if name in _BYTE_PAIRS:
        return _from_byte_pairs(_BYTE_PAIRS[name])
    folder = hf_tokenizer_dir("mistral_nemo" if name == "mistral_small" else name)
    model = json.loads((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    if name == "mistral_small":
        _name_controls(model)
    return model, config


def _name_controls(model: dict[str, Any]) -> None:
    names = dict(enumerate(_TEKKEN_CONTROLS, start=_FIRST_TEKKEN_CONTROL))
    vocabulary = model["model"]["vocab"]
    for token in model["added_tokens"]:
        if token["id"] in names:
            vocabulary[names[token["id"]]] = vocabulary.pop(token["content"])
            token["content"] = names[token["id"]]


def _from_byte_pairs(pairs: _BytePairs) -> Files:
    pattern, ranks = _parsed(tiktoken_ranks(pairs.ranks))
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    ids = {written[token]: rank for token, rank in ranks.items()} | dict(pairs.controls)
    added = [
        {
            "id": token_id, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False,
        }
        for text, token_id in pairs.controls.items()
    ]  # fmt: skip
    taken = set(ids.values())
    ids |= {f"<|dummy_{i}|>": i for i in range(pairs.num_tokens) if i not in taken}
    model = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": ids, "merges": _merges(ranks, written),
        },
    }  # fmt: skip
    return model, {"eos_token": pairs.eos}


def _merges(ranks: Mapping[bytes, int], written: Mapping[bytes, str]) -> list[str]:
    """Every way to make a token from two that come before it, in the order of ranks."""
    found: list[tuple[int, int, int, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], f"{written[left]} {written[right]}"))
    return [merge for *_, merge in sorted(found)]


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def _parsed(text: str) -> tuple[str, dict[bytes, int]]:
    """Pattern and ranks from one of js-tiktoken's `ranks` modules."""
    value = json.loads(text.removeprefix("export default ").rstrip().removesuffix(";"))
    ranks: dict[bytes, int] = {}
    for line in value["bpe_ranks"].split("\n"):
        _, first, *tokens = line.split(" ")
        ranks |= {base64.b64decode(t): rank for rank, t in enumerate(tokens, start=int(first))}
    return str(value["pat_str"]), ranks
