"""Texts, tokens and logprobs of the two sides laid beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ollatune.evaluation.compare import top_gap, top_kl_divergence
from ollatune.evaluation.served import ServedAnswer, ServedToken

Logprobs = npt.NDArray[np.floating]

_CONTEXT_CHARACTERS = 40
_LIKELY_PER_ALTERNATIVE = 50
"""A served alternative is looked for among so many times their number of the trained model's likeliest tokens."""


class TrainedTokenizer(Protocol):
    """What is needed of the trainer's tokenizer; `gguf.tokenizer.GGUFTokenizer` has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def end_of_generation_ids(self) -> frozenset[int]: ...

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        parse_special: bool = True,
        is_continuation: bool = False,
    ) -> list[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...
    @property
    def vocab_size(self) -> int: ...


def text_difference(trained: str, served: str) -> str:
    """Where two texts part, with what stands there in each; "" for equal texts."""
    if trained == served:
        return ""
    shorter = min(len(trained), len(served))
    at = next((i for i in range(shorter) if trained[i] != served[i]), shorter)
    start = max(0, at - _CONTEXT_CHARACTERS // 2)
    excerpts = [text[start : at + _CONTEXT_CHARACTERS] for text in (trained, served)]
    return f"at character {at}: trained with {excerpts[0]!r}, served with {excerpts[1]!r}"


def token_difference(
    tokenizer: TrainedTokenizer, trained_ids: list[int], served_ids: list[int]
) -> str:
    """Where two token sequences part, with the tokens that stand there; an empty text for equal ones."""
    if trained_ids == served_ids:
        return ""
    shorter = min(len(trained_ids), len(served_ids))
    at = next((i for i in range(shorter) if trained_ids[i] != served_ids[i]), shorter)
    return (
        f"at token {at}: trained with {shown_token(tokenizer, trained_ids, at)}, "
        f"served with {shown_token(tokenizer, served_ids, at)} ({len(trained_ids)} and {len(served_ids)} tokens)"
    )


def shown_token(tokenizer: TrainedTokenizer, ids: Sequence[int], at: int) -> str:
    """The token at a place: its id and text, or that there is none."""
    if at >= len(ids):
        return "nothing"
    return f"{ids[at]} {tokenizer.token_bytes(ids[at]).decode(errors='replace')!r}"


def answer_ids_of(tokenizer: TrainedTokenizer, answer: ServedAnswer) -> list[int]:
    """The answer's ids: the server's where it gives them, else the text tokenised as training does.

    A model may say a text in other tokens than a tokenizer would make of it: where the server gives the bytes of every
    token, those tokens are taken.
    """
    known = [token.token_id for token in answer.tokens if token.raw != b""]
    if known and all(token is not None for token in known):
        return [token for token in known if token is not None]
    ids = tokenizer.encode(answer.text, is_continuation=True) if answer.text else []
    said = [token.raw for token in answer.tokens if token.raw]
    if b"".join(said) != answer.text.encode() or [tokenizer.token_bytes(i) for i in ids] == said:
        return ids
    id_of: dict[bytes, int] = {}
    # Of two tokens with the same bytes the later one: SentencePiece's tokens for single bytes, which are there for what
    # no other token says, come first.
    for token_id in reversed(range(tokenizer.vocab_size)):
        id_of.setdefault(tokenizer.token_bytes(token_id), token_id)
    return [id_of[raw] for raw in said] if all(raw in id_of for raw in said) else ids


def aligned_tokens(
    tokenizer: TrainedTokenizer, answer_ids: Sequence[int], tokens: Sequence[ServedToken]
) -> list[ServedToken]:
    """The served positions up to the first whose token is not the one at that place of `answer_ids`.

    A server may leave positions out, and a text may be tokenised otherwise than it was generated.
    """
    aligned: list[ServedToken] = []
    for index, token in enumerate(tokens):
        aligned.append(token)  # its distribution depends on the tokens before it only
        if index >= len(answer_ids):
            break
        expected = answer_ids[index]
        if token.token_id is None and token.raw != tokenizer.token_bytes(expected):
            aligned.pop()  # a position was left out before this one, perhaps
            break
    return aligned


def compare_positions(
    tokenizer: TrainedTokenizer, rows_PV: Logprobs, tokens: Sequence[ServedToken]
) -> tuple[tuple[float, ...], tuple[bool, ...], tuple[float, ...]]:
    """Per position with alternatives: KL(trained ‖ served), whether both choose one token, and the largest gap."""
    kls, same, gaps = [], [], []
    for row_V, token in zip(rows_PV, tokens, strict=False):
        top = by_id(tokenizer, row_V, token)
        if top:
            kls.append(top_kl_divergence(row_V, top))
            same.append(max(top, key=lambda key: top[key]) == int(row_V.argmax()))
            gaps.append(top_gap(row_V, top))
    return tuple(kls), tuple(same), tuple(gaps)


def by_id(tokenizer: TrainedTokenizer, row_V: Logprobs, token: ServedToken) -> dict[int, float]:
    """Alternatives by id. Bytes are looked up among the trained model's most probable tokens, the likeliest first.

    Servers give control tokens no bytes. Where the model chose to end, the likeliest such alternative is the end token;
    elsewhere there is no telling which it is, and it is left out.
    """
    top: Mapping[Any, float] = token.top_logprobs
    if not top or isinstance(next(iter(top)), int):
        return dict(top)
    ids_by_bytes: dict[bytes, int] = {}
    likely = np.argsort(row_V)[::-1][: _LIKELY_PER_ALTERNATIVE * len(top)]
    for token_id in likely:
        ids_by_bytes.setdefault(tokenizer.token_bytes(int(token_id)), int(token_id))
    ids_by_bytes.pop(b"", None)
    if token.raw == b"" and (ends := tokenizer.end_of_generation_ids):
        ids_by_bytes[b""] = max(ends, key=lambda end: float(row_V[end]))
    return {ids_by_bytes[raw]: value for raw, value in top.items() if raw in ids_by_bytes}
