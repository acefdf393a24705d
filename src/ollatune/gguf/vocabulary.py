"""The vocabulary in a GGUF header: tokens, their kinds, special ids and flags, by llama.cpp's rules.

Source of every rule: llama.cpp, src/llama-vocab.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.text import printable
from ollatune.gguf.pretokenizers import PreTokenizer, find_pre_tokenizer

BPE = "gpt2"
SPM = "llama"
_KEY = "tokenizer.ggml."
_NEWER_HINT = "Convert or download the model again."


class Kind(IntFlag):
    """What a token is; llama.cpp adds CONTROL to some tokens by their text, so several can hold."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 4
    USER_DEFINED = 8
    UNUSED = 16
    BYTE = 32
    STRIPS_RIGHT = 64


# tokenizer.ggml.token_type → Kind
_KINDS_BY_TYPE = {
    1: Kind.NORMAL,
    2: Kind.UNKNOWN,
    3: Kind.CONTROL,
    4: Kind.USER_DEFINED,
    5: Kind.UNUSED,
    6: Kind.BYTE,
}

_EOT_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip
_EOM_TEXTS = ("<|eom_id|>",)
_END_TEXTS = (
    *_EOT_TEXTS, *_EOM_TEXTS, "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
# Fill-in-the-middle tokens: key in the file (without prefix), older key, texts, whether it ends generation.
_FILL_IN = (
    ("fim_pre_token_id", "prefix_token_id", ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>",
     "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"), False),
    ("fim_suf_token_id", "suffix_token_id", ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>",
     "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"), False),
    ("fim_mid_token_id", "middle_token_id", ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",
     "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"), False),
    ("fim_pad_token_id", "", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    ("fim_rep_token_id", "", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), True),
    ("fim_sep_token_id", "", ("<|file_sep|>",), True),
)  # fmt: skip
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_PHI3_KEPT_SPACES = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as llama.cpp sees it after loading. Ids index `tokens`, `kinds` and `scores`."""

    model: str
    pre: str
    tokens: list[str]
    ids: dict[str, int]
    kinds: list[int]
    scores: Sequence[float]
    merges: list[str]
    pre_tokenizer: PreTokenizer | None
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    pad_id: int | None
    end_of_generation_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @property
    def is_bpe(self) -> bool:
        return self.model == BPE

    def digest(self) -> str:
        """Hex SHA-256 over all that decides how text becomes ids and back."""
        hasher = hashlib.sha256()
        flags = (
            self.model, self.pre, self.bos_id, self.eos_id, self.eot_id, self.eom_id, self.unk_id, self.pad_id,
            sorted(self.end_of_generation_ids), self.add_bos, self.add_eos, self.add_space_prefix,
        )  # fmt: skip
        hasher.update(repr(flags).encode())
        for texts in (self.tokens, self.merges):
            encoded = [text.encode() for text in texts]
            hasher.update(array("q", map(len, encoded)).tobytes())
            hasher.update(b"".join(encoded))
        hasher.update(bytes(self.kinds))
        if not self.is_bpe:
            hasher.update(array("d", self.scores).tobytes())
        return hasher.hexdigest()


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a GGUF header. Raises InputError where it is missing, damaged or of a kind not known here."""
    model = _text(metadata, "model")
    if model not in (BPE, SPM):
        raise InputError(
            f"The tokenizer of this model (tokenizer.ggml.model: `{printable(model)}`) cannot be reproduced exactly.",
            hint=f"Known ones: `{BPE}` (byte-level BPE) and `{SPM}` (SentencePiece BPE).",
        )
    tokens = _tokens(metadata)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise InputError(
            f"The vocabulary lists the token `{printable(twice)}` twice.", hint=_NEWER_HINT
        )
    pre = _text(metadata, "pre")
    pre_tokenizer = find_pre_tokenizer(pre) if model == BPE else None
    kinds = _kinds(metadata, len(tokens))
    special = _special_ids(metadata, model, pre_tokenizer, len(tokens))
    ends = _detect_special_tokens(ids, tokens, kinds, special)
    _apply_phi3_rule(metadata, ids, kinds)
    default_bos = pre_tokenizer.add_bos if pre_tokenizer else True
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        ids=ids,
        kinds=kinds,
        scores=_scores(metadata, len(tokens)) if model == SPM else (),
        merges=_merges(metadata) if model == BPE else [],
        pre_tokenizer=pre_tokenizer,
        bos_id=special["bos_token_id"],
        eos_id=special["eos_token_id"],
        eot_id=special["eot_token_id"],
        eom_id=special["eom_token_id"],
        unk_id=special["unknown_token_id"],
        pad_id=special["padding_token_id"],
        end_of_generation_ids=frozenset(ends),
        add_bos=_flag(metadata, "add_bos_token", default_bos),
        add_eos=_flag(metadata, "add_eos_token", False),
        add_space_prefix=_flag(metadata, "add_space_prefix", model == SPM),
    )


def _text(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(_KEY + name, "")
    if not isinstance(value, str):
        raise InputError(f"{_KEY}{name} is {value!r}, a text was expected.", hint=_NEWER_HINT)
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_KEY + name, default)
    if not isinstance(value, bool):
        raise InputError(f"{_KEY}{name} is {value!r}, true or false was expected.")
    return value


def _sequence(metadata: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        raise InputError(f"{_KEY}{name} is no list.", hint=_NEWER_HINT)
    return value  # type: ignore[no-any-return]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _sequence(metadata, "tokens")
    if tokens is None or set(map(type, tokens)) != {str}:
        raise InputError(f"The model file has no vocabulary ({_KEY}tokens).", hint=_NEWER_HINT)
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]


def _kinds(metadata: Mapping[str, Any], num_tokens: int) -> list[int]:
    types = _sequence(metadata, "token_type")
    if types is None:
        return [int(Kind.NORMAL)] * num_tokens
    _require_length("token_type", types, num_tokens)
    by_type = {number: int(kind) for number, kind in _KINDS_BY_TYPE.items()}
    undefined = int(Kind.UNDEFINED)
    return [by_type.get(number, undefined) for number in types[:num_tokens]]


def _scores(metadata: Mapping[str, Any], num_tokens: int) -> list[float]:
    scores = _sequence(metadata, "scores")
    if scores is None:
        return [0.0] * num_tokens
    _require_length("scores", scores, num_tokens)
    return [float(score) for score in scores[:num_tokens]]


def _merges(metadata: Mapping[str, Any]) -> list[str]:
    merges = _sequence(metadata, "merges")
    if merges is None or set(map(type, merges)) != {str}:
        raise InputError(f"The vocabulary has no merges ({_KEY}merges).", hint=_NEWER_HINT)
    return list(merges)


def _require_length(name: str, values: Sequence[Any], num_tokens: int) -> None:
    if len(values) < num_tokens:
        raise InputError(
            f"{_KEY}{name} has {len(values)} entries, but there are {num_tokens} tokens.",
            hint=_NEWER_HINT,
        )


def _special_ids(
    metadata: Mapping[str, Any], model: str, pre: PreTokenizer | None, num_tokens: int
) -> dict[str, int | None]:
    """Special ids by key: what the file says where that is a token, else llama.cpp's default for the model."""
    special: dict[str, int | None] = {"eot_token_id": None, "eom_token_id": None}
    if model == SPM:
        special |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    else:
        has_bos = pre is None or pre.has_default_bos
        special |= {"bos_token_id": 11 if has_bos else None, "eos_token_id": 11}
        special |= {"unknown_token_id": None}
    special |= {"padding_token_id": None} | dict.fromkeys((row[0] for row in _FILL_IN), None)
    renamed = {old: key for key, old, _, _ in _FILL_IN if old}
    for name in (*special, *renamed):
        key = renamed.get(name, name)
        current = special[key]
        if current is not None and current >= num_tokens:
            special[key] = None
        value = metadata.get(_KEY + name)
        if value is not None and 0 <= int(value) < num_tokens:
            special[key] = int(value)
    return special


def _detect_special_tokens(
    ids: Mapping[str, int], tokens: Sequence[str], kinds: list[int], special: dict[str, int | None]
) -> set[int]:
    """Fill in special ids by the tokens' texts, mark such tokens as CONTROL, and return what ends generation.

    Where several texts fit one role, llama.cpp takes whichever its hash table yields first; here the first listed.
    """
    ends: set[int] = set()
    roles = [("eot_token_id", _EOT_TEXTS), ("eom_token_id", _EOM_TEXTS)]
    for key, texts in (*roles, *((row[0], row[2]) for row in _FILL_IN)):
        found = next((ids[text] for text in texts if text in ids), None)
        if special[key] is None and found is not None:
            special[key] = found
            kinds[found] |= int(Kind.CONTROL)
    ends |= _known(special[key] for key, _, _, is_end in _FILL_IN if is_end)
    for text in _END_TEXTS:
        if text in ids:
            ends.add(ids[text])
            kinds[ids[text]] |= int(Kind.CONTROL)
    for text in _HARMONY_TEXTS:
        if text in ids:
            kinds[ids[text]] = int(Kind.USER_DEFINED)
    ends |= _known(special[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    end_texts = {tokens[i] for i in ends}
    has_call = bool(end_texts & {"<|call|>", "<|calls|>"})
    if "<|end|>" in end_texts and has_call and end_texts & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = int(Kind.USER_DEFINED)
    if "</s>" in end_texts and end_texts & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.discard(ids["</s>"])
        kinds[ids["</s>"]] = int(Kind.NORMAL)
    return ends


def _known(found: Iterable[int | None]) -> set[int]:
    return {i for i in found if i is not None}


def _apply_phi3_rule(metadata: Mapping[str, Any], ids: Mapping[str, int], kinds: list[int]) -> None:
    """Phi-3's special tokens swallow the white space after them; llama.cpp knows the model by its name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return
    kept = {ids[text] for text in _PHI3_KEPT_SPACES if text in ids}
    special = int(Kind.CONTROL | Kind.USER_DEFINED | Kind.UNKNOWN)
    for i, kind in enumerate(kinds):
        if (kind & special or i == ids.get("</s>")) and i not in kept:
            kinds[i] = kind | int(Kind.STRIPS_RIGHT)
