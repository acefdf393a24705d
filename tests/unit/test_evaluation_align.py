"""Answers in tokens of their own, and alternatives that are known by their bytes only."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ollatune.evaluation.align import answer_ids_of, by_id
from ollatune.evaluation.served import ServedAnswer, ServedToken, _by_bytes
from ollatune.ollama.answers import TokenLogprob


class Tokenizer:
    """Four tokens; a text is always taken apart into single letters."""

    texts = (b"a", b"b", b"ab", b"<end>")
    bos_id = None
    add_bos = False
    end_of_generation_ids = frozenset((3,))
    vocab_size = len(texts)

    def encode(self, text: str, **_: bool) -> list[int]:
        return [self.texts.index(letter.encode()) for letter in text]

    def token_bytes(self, token_id: int, /) -> bytes:
        return self.texts[token_id]


def answer(text: str, *raws: bytes | None) -> ServedAnswer:
    tokens = tuple(ServedToken(raw, None, {}) for raw in raws)
    return ServedAnswer(text, "stop", None, tokens)


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (answer("aab", b"a", b"ab"), [0, 2]),  # the model's own tokens
        (answer("aab", b"a", b"ab", b""), [0, 2]),  # and the end
        (answer("aab", b"a", b"a", b"b"), [0, 0, 1]),
        (answer("aab", b"a"), [0, 0, 1]),  # positions are missing: the text decides
        (answer("aab"), [0, 0, 1]),
    ],
)
def test_the_ids_of_an_answer_are_those_that_were_said(given: ServedAnswer, ids: list[int]) -> None:
    assert answer_ids_of(Tokenizer(), given) == ids


def test_of_two_tokens_with_the_same_bytes_the_one_that_texts_become_counts() -> None:
    class Gemma(Tokenizer):
        """As in SentencePiece's vocabularies, a token for the single byte lies before the one for the character."""

        texts = (b"a", b"b", b"ab", b"<end>", b"a")
        vocab_size = 5

    assert answer_ids_of(Gemma(), answer("aab", b"a", b"ab")) == [4, 2]


def test_an_alternative_without_bytes_is_the_end_only_where_the_model_ended() -> None:
    row = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    top = {b"": math.log(0.4), b"ab": math.log(0.3)}
    ended = by_id(Tokenizer(), row, ServedToken(b"", None, top))
    assert ended == {3: math.log(0.4), 2: math.log(0.3)}
    went_on = by_id(Tokenizer(), row, ServedToken(b"ab", None, top))
    assert went_on == {2: math.log(0.3)}
    assert by_id(Tokenizer(), row, ServedToken(None, 2, {2: -1.0})) == {2: -1.0}


def test_of_alternatives_with_the_same_bytes_the_likeliest_counts() -> None:
    given = [
        TokenLogprob("", -0.5, b""),
        TokenLogprob("a", -1.0, b"a"),
        TokenLogprob("", -9.0, b""),
    ]
    assert _by_bytes(given) == {b"": -0.5, b"a": -1.0}
