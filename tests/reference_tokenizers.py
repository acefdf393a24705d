"""Tokenizers to compare ours with, on Hugging Face's `tokenizers`, from what was published with the models.

They take nothing from `ollatune.gguf` but the strings and numbers that a GGUF file holds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.published_vocabs import PUBLISHED_VOCABS, tokenizer_files
from tests.vocab_metadata import vocab_metadata

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
# llama.cpp, which serves, takes this text for a control token in every vocabulary that has it (Qwen's).
_ALWAYS_CONTROL = "</s>"
# Phi-3's tokenizer.json has `rstrip` on all its added tokens but these.
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


class ReferenceTokenizer:
    """Ids of whole texts, special tokens parsed, nothing put in front; and of texts cut into pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if tokenizer.token_to_id(_ALWAYS_CONTROL) is not None and _ALWAYS_CONTROL not in added:
            tokenizer.add_tokens([_special(_ALWAYS_CONTROL)])
        self.tokenizer = tokenizer
        self._continuing = Tokenizer.from_str(tokenizer.to_str())
        if "Prepend" in str(tokenizer.normalizer):
            self._continuing.normalizer = normalizers.Replace(" ", "▁")
        decoder = tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in decoder.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def id_of(self, text: str) -> int:
        """The id of the token that is written as `text`."""
        found = self.tokenizer.token_to_id(text)
        assert found is not None, text
        return int(found)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[list[list[int]], bool]:
        """The ids of each piece of a text, and whether the pieces' borders are borders of tokens in the whole text.

        Where they are, the ids are those of the whole text. Where one token would reach across a border, each piece
        is tokenised alone: a server has tokenised the prompt before there is an answer.
        """
        whole = self.encode("".join(pieces))
        starts = [self.encode("".join(pieces[:count])) for count in range(len(pieces) + 1)]
        if all(whole[: len(start)] == start for start in starts):
            lengths = [len(start) for start in starts]
            return [whole[begin:end] for begin, end in itertools.pairwise(lengths)], True
        found: list[list[int]] = []
        previous: int | None = None
        for piece in pieces:
            follows_special = previous is None or previous in self._special
            tokenizer = self.tokenizer if follows_special else self._continuing
            found.append(list(tokenizer.encode(piece, add_special_tokens=False).ids))
            previous = found[-1][-1] if found[-1] else previous
        return found, False


@lru_cache(maxsize=2)
def reference_tokenizer(name: str) -> ReferenceTokenizer:
    """The reference for a vocabulary that `vocab_metadata` knows."""
    if name in PUBLISHED_VOCABS:
        return ReferenceTokenizer(Tokenizer.from_str(json.dumps(tokenizer_files(name)[0])))
    metadata = {key: value for key, (value, _) in vocab_metadata(name).items()}
    return ReferenceTokenizer(_sentencepiece(metadata, strips_right=name == "ggml:phi-3"))


@lru_cache(maxsize=2)
def smollm2_tokenizer(path: Path) -> ReferenceTokenizer:
    """SmolLM2's, from the tokens and merges in its GGUF file and the pre-tokenizer of its published tokenizer.json."""
    from ollatune.gguf.reader import GGUFFile

    with GGUFFile.open(path) as file:
        tokens = list(file.metadata[f"{_KEY}tokens"])
        types = list(file.metadata[f"{_KEY}token_type"])
        merges = [tuple(merge.split(" ")) for merge in file.metadata[f"{_KEY}merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_tokens([_special(text) for text in special])
    return ReferenceTokenizer(tokenizer)


def _sentencepiece(metadata: dict[str, Any], *, strips_right: bool) -> Tokenizer:
    """As Transformers converts a SentencePiece model: scores become an order of merges."""
    from transformers.convert_slow_tokenizer import generate_merges

    tokens, types = metadata[f"{_KEY}tokens"], metadata[f"{_KEY}token_type"]
    scores = dict(zip(tokens, metadata[f"{_KEY}scores"], strict=True))
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=generate_merges(ids, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    added = [
        _special(token, strips_right=strips_right and token not in _PHI3_KEEPS_SPACE)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _special(text: str, *, strips_right: bool = False) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, rstrip=strips_right)
