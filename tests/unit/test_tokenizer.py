"""Tokenizers on tiny vocabularies: against the rules written down naively, and what must be refused."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ollatune.base.errors import InputError
from ollatune.base.log import get_logger
from ollatune.gguf.ascii_words import AsciiWords, independent_pieces
from ollatune.gguf.byte_level import (
    BYTE_CHARACTERS,
    ByteLevelEncoder,
    decode_byte_level,
    parse_merges,
    pre_tokenizer_pipeline,
)
from ollatune.gguf.pretokenizers import PRE_TOKENIZERS
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.gguf.vocabulary import read_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Metadata = dict[str, Any]


def spm_metadata(
    pieces: Mapping[str, float], special: Mapping[str, int] | None = None, **more: Any
) -> Metadata:
    """<unk>, <s>, </s>, the 256 bytes, `pieces` with their scores, then `special` tokens with their types."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scores = [0.0] * len(tokens)
    for piece, score in pieces.items():
        tokens.append(piece)
        types.append(NORMAL)
        scores.append(score)
    for token, token_type in (special or {}).items():
        tokens.append(token)
        types.append(token_type)
        scores.append(-1000.0)
    return _metadata("llama", tokens, types, scores=scores, **more)


def bpe_metadata(
    merges: Sequence[str], special: Mapping[str, int] | None = None, **more: Any
) -> Metadata:
    """The 256 bytes, what `merges` make, then `special` tokens with their types."""
    tokens = [*BYTE_CHARACTERS, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    types = [NORMAL] * len(tokens) + list((special or {}).values())
    tokens += special or {}
    return _metadata("gpt2", tokens, types, **{"pre": "gpt-2", "merges": list(merges)} | more)


def _metadata(model: str, tokens: list[str], types: list[int], **more: Any) -> Metadata:
    keys = {"model": model, "tokens": tokens, "token_type": types} | more
    return {f"tokenizer.ggml.{key}" if "." not in key else key: v for key, v in keys.items()}


def texts_of(tokenizer: GGUFTokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


# ----- merges --------------------------------------------------------------------------------------------------------


def naive_spm(metadata: Metadata, text: str) -> list[str]:
    """Merge the best-scored neighbours, the leftmost of equals, until none is a token; the rest becomes bytes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (scores[left + right], -i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    result: list[str] = []
    for symbol in symbols:
        as_bytes = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        result += [symbol] if symbol in scores else as_bytes
    return result


def naive_bpe(merges: Sequence[str], word: str) -> list[str]:
    """Merge the pair of lowest rank, the leftmost of equals, until none is a merge."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in reversed(list(enumerate(merges)))}
    symbols = [BYTE_CHARACTERS[byte] for byte in word.encode()]
    while True:
        pairs = list(itertools.pairwise(symbols))
        known = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
        if not known:
            return symbols
        i = min(known)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


PIECE = st.text("ab▁é", min_size=1, max_size=5)
SCORE = st.integers(-4, 0).map(float)  # few values, so that many scores are equal


@settings(max_examples=120, deadline=None)
@given(
    st.dictionaries(PIECE, SCORE, max_size=14),
    st.lists(st.text("ab ▁éx", max_size=24), min_size=1, max_size=4),
)
@example({"aa": 0.0}, ["aaa"])
@example({"ab": 0.0, "ba": 0.0, "a▁": -1.0}, ["abab", "baba", "a a"])
def test_sentencepiece_merges_like_the_naive_procedure(
    pieces: dict[str, float], texts: list[str]
) -> None:
    metadata = spm_metadata(pieces, add_space_prefix=False)
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    for text in texts:
        assert texts_of(tokenizer, tokenizer.encode(text)) == naive_spm(metadata, text)


def random_merges(generator: random.Random) -> list[str]:
    symbols = ["a", "b", "c"]
    merges: list[str] = []
    for _ in range(generator.randint(1, 20)):
        merge = f"{generator.choice(symbols)} {generator.choice(symbols)}"
        if merge not in merges:
            merges.append(merge)
            symbols.append(merge.replace(" ", ""))
    return merges


@settings(max_examples=80, deadline=None)
@given(st.randoms(use_true_random=False), st.text("abcé", min_size=1, max_size=30))
def test_byte_level_merges_like_the_naive_procedure(generator: random.Random, word: str) -> None:
    merges = random_merges(generator)
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(merges))
    assert texts_of(tokenizer, tokenizer.encode(word)) == naive_bpe(merges, word)


def test_a_word_that_is_a_token_skips_the_merges_only_where_the_pre_tokenizer_says_so() -> None:
    more = {"special": {"abc": NORMAL}}
    plain = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], **more))
    whole = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], **more, pre="llama-bpe"))
    assert texts_of(plain, plain.encode("abc")) == ["ab", "c"]
    assert texts_of(whole, whole.encode("abc")) == ["abc"]


_HARD_ASCII = st.text(
    "abzZ'sStTlLvVreEdmD09 \n\r\t\v\f.,!?-_/\\$+<>^`|~(){}[]&%\"\x00\x1c\x7f", max_size=40
)


_DISTINCT = {words.expressions: name for name, words in PRE_TOKENIZERS.items()}


@pytest.mark.parametrize("pre", sorted(_DISTINCT.values()))
def test_ascii_words_are_those_of_the_librarys_pipeline(pre: str) -> None:
    pipeline = pre_tokenizer_pipeline(PRE_TOKENIZERS[pre])
    words = AsciiWords(PRE_TOKENIZERS[pre].expressions)
    as_stand_ins = str.maketrans(dict(enumerate(BYTE_CHARACTERS[:128])))

    @settings(max_examples=60, deadline=None)
    @given(text=_HARD_ASCII | st.text(st.characters(max_codepoint=127), max_size=20))
    def check(text: str) -> None:
        expected = [word for word, _ in pipeline.pre_tokenize_str(text)]
        assert [word.translate(as_stand_ins) for word in words.split(text)] == expected

    check()


_WORDS_BEYOND_ASCII = [
    "naïve",
    "Straße",
    "слово",
    "Ёж",
    "λόγος",
    "你好",
    "①②",
    "٣",
    "🚀",
    "’s",
    "—",
    "\xa0",
    "\u3000",
    "é",
]


@pytest.mark.parametrize("pre", sorted(_DISTINCT.values()))
def test_words_of_independent_pieces_are_those_of_the_whole(pre: str) -> None:
    pipeline = pre_tokenizer_pipeline(PRE_TOKENIZERS[pre])
    parts = st.sampled_from(
        [
            *_WORDS_BEYOND_ASCII,
            " ",
            " ",
            " ",
            "  ",
            "\n",
            "\t",
            "a",
            "Z",
            "'ll",
            "9",
            "12",
            "-",
            "\x1c",
        ]
    )

    @settings(max_examples=150, deadline=None)
    @given(text=st.lists(parts, max_size=14).map("".join) | st.text(max_size=12))
    def check(text: str) -> None:
        def words(piece: str) -> list[str]:
            return [word for word, _ in pipeline.pre_tokenize_str(piece)]

        pieces = independent_pieces(text)
        assert "".join(pieces) == text
        assert [word for piece in pieces for word in words(piece)] == words(text)

    check()


def test_known_words_give_the_pipelines_ids_however_often_the_table_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ollatune.gguf.byte_level._MAX_KNOWN_TEXTS", 5)
    merges = ["Ġ t", "h e", "Ġt he", "a n", "an d", "Ġ and", "Ċ Ċ", "1 2"]
    for pre in ("gpt-2", "llama-bpe", "smollm"):
        encoder = ByteLevelEncoder(read_vocabulary(bpe_metadata(merges, pre=pre)))
        library = encoder._tokenizer
        rng = random.Random(pre)
        for _ in range(50):
            text = "".join(
                rng.choices(["the", " and", "\n\n", "12", " ", "x" * 70, "'s", "é", " à"], k=12)
            )
            for piece in (text, text.replace("é", "")):
                expected = library.encode(piece, add_special_tokens=False).ids
                assert encoder.encode(piece) == encoder.encode_batch(["", piece])[1] == expected


def test_merges_are_split_at_the_first_blank_behind_the_first_character() -> None:
    assert parse_merges(["a b", "c d", "a b"]) == [("a", "b"), ("c", "d")]
    assert parse_merges(["  b", "a  b", "ab"]) == [(" ", "b"), ("a", " b")]


def test_bytes_without_a_token_are_dropped_and_keep_their_neighbours_apart() -> None:
    metadata = bpe_metadata(["a b"])
    place = metadata["tokenizer.ggml.tokens"].index("x")
    metadata["tokenizer.ggml.tokens"][place] = "unused"
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    assert texts_of(tokenizer, tokenizer.encode("ab")) == ["ab"]
    assert texts_of(tokenizer, tokenizer.encode("axb")) == ["a", "b"]
    library = Tokenizer.from_str(tokenizer.to_tokenizer_json())
    assert library.encode("axb").tokens == ["a", "b"]


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-coder"])
def test_blanks_beyond_ascii_are_no_ideographs_though_in_their_range(pre: str) -> None:
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["Ġ â"], pre=pre))
    assert texts_of(tokenizer, tokenizer.encode(" \u2028"))[0] == "Ġâ"
    assert texts_of(tokenizer, tokenizer.encode(" \u2e80"))[0] == "Ġ"


# ----- special tokens ------------------------------------------------------------------------------------------------


def naive_partition(tokens: Sequence[str], text: str) -> list[tuple[bool, str]]:
    """llama.cpp's procedure: for each token, longest first, cut it out of what is still plain."""
    fragments = [(False, text)]
    for token in sorted(tokens, key=lambda token: -len(token.encode())):
        following: list[tuple[bool, str]] = []
        for is_special, fragment in fragments:
            while not is_special and token in fragment:
                before, _, fragment = fragment.partition(token)
                following += [(False, before), (True, token)]
            following.append((is_special, fragment))
        fragments = following
    return [fragment for fragment in fragments if fragment[1]]


TOKEN_SETS = [
    ["<a>", "<b>", "</a>"],
    ["<a>", "<a>x", "ab", "bcd", "<a"],
    ["\n\n", "\n\n\n", "\n\n\n\n", "  ", "   ", "<a>"],
    ["aa", "aaa", "ab", "b"],
    ["<", "<<", "<<<"],
]


@pytest.mark.parametrize("tokens", TOKEN_SETS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_special_tokens_are_cut_out_longest_first(tokens: list[str], data: st.DataObject) -> None:
    pieces = st.one_of(st.sampled_from(tokens), st.sampled_from("ab<>x \n/"))
    text = "".join(data.draw(st.lists(pieces, max_size=20)))
    special = {token: USER_DEFINED for token in tokens if len(token) > 1}
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["Q Z"], special))
    expected: list[str] = []
    for is_special, fragment in naive_partition(list(special), text):
        expected += [fragment] if is_special else (BYTE_CHARACTERS[b] for b in fragment.encode())
    ids = tokenizer.encode(text, parse_special=False)
    assert texts_of(tokenizer, ids) == expected


def test_control_tokens_are_text_unless_asked_for() -> None:
    special = {"<c>": CONTROL, "<u>": USER_DEFINED}
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], special))
    assert texts_of(tokenizer, tokenizer.encode("<c><u>")) == ["<c>", "<u>"]
    plain = tokenizer.encode("<c><u>", parse_special=False)
    assert texts_of(tokenizer, plain) == ["<", "c", ">", "<u>"]


def test_phi3_tokens_swallow_the_blanks_behind_them() -> None:
    special = {"<|user|>": CONTROL, "<|endoftext|>": CONTROL}
    metadata = spm_metadata({"a": 0.0, "▁": -1.0}, special, add_space_prefix=False)
    named = metadata | {"general.name": "Phi3 mini"}
    text = "<|user|> \n a<|endoftext|> a</s> a"
    kept = GGUFTokenizer.from_metadata(metadata)
    stripped = GGUFTokenizer.from_metadata(named)
    assert texts_of(kept, kept.encode(text)) == [
        "<|user|>", "▁", "<0x0A>", "▁", "a", "<|endoftext|>", "▁", "a", "</s>", "▁", "a",
    ]  # fmt: skip
    assert texts_of(stripped, stripped.encode(text)) == [
        "<|user|>", "a", "<|endoftext|>", "▁", "a", "</s>", "a",
    ]  # fmt: skip
    segments = ["a<|user|>", "\n", " a", " a<|endoftext|>", " a"]
    assert [texts_of(stripped, ids) for ids in stripped.encode_segments(segments)] == [
        ["a", "<|user|>"], [], ["a"], ["▁", "a", "<|endoftext|>"], ["▁", "a"],
    ]  # fmt: skip


# ----- SentencePiece's blank in front --------------------------------------------------------------------------------

WORDS = {"▁a": -1.0, "▁b": -1.0, "▁": -2.0, "a": -3.0, "b": -3.0}


def test_a_blank_is_put_at_the_start_and_after_special_tokens() -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS))
    assert texts_of(tokenizer, tokenizer.encode("a b</s>a")) == ["▁a", "▁b", "</s>", "▁a"]
    assert texts_of(tokenizer, tokenizer.encode("a", is_continuation=True)) == ["a"]
    assert texts_of(tokenizer, tokenizer.encode("a</s>a", is_continuation=True)) == [
        "a", "</s>", "▁a",
    ]  # fmt: skip
    assert tokenizer.encode("") == []


def test_segments_carry_over_whether_a_blank_belongs_in_front() -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS))
    segments = tokenizer.encode_segments(["a b</s>", "", "a", "b", "</s>b"], add_bos=True)
    assert [texts_of(tokenizer, ids) for ids in segments] == [
        ["<s>", "▁a", "▁b", "</s>"],
        [],
        ["▁a"],
        ["b"],
        ["</s>", "▁b"],
    ]


def test_add_space_prefix_can_be_off() -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS, add_space_prefix=False))
    assert texts_of(tokenizer, tokenizer.encode("a b")) == ["a", "▁b"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


# ----- ids and flags -------------------------------------------------------------------------------------------------


def test_end_of_generation_follows_the_texts_and_the_ids() -> None:
    special = dict.fromkeys(
        ["<|im_end|>", "<|endoftext|>", "<|eom_id|>", "<|fim_pad|>", "<|file_sep|>", "<stop>"], CONTROL
    )  # fmt: skip
    metadata = bpe_metadata(["a b"], special)
    stop = metadata["tokenizer.ggml.tokens"].index("<stop>")
    tokenizer = GGUFTokenizer.from_metadata(metadata | {"tokenizer.ggml.eos_token_id": stop})
    assert sorted(texts_of(tokenizer, tokenizer.end_of_generation_ids)) == sorted(special)
    assert tokenizer.token_text(tokenizer.eot_id) == "<|im_end|>"
    assert tokenizer.token_text(tokenizer.eom_id) == "<|eom_id|>"


def test_end_of_generation_of_harmony_leaves_out_the_end_of_a_message() -> None:
    special = dict.fromkeys(["<|end|>", "<|return|>", "<|call|>", "<|start|>"], CONTROL)
    metadata = bpe_metadata(["a b"], special)
    end = metadata["tokenizer.ggml.tokens"].index("<|return|>")
    tokenizer = GGUFTokenizer.from_metadata(metadata | {"tokenizer.ggml.eos_token_id": end})
    assert sorted(texts_of(tokenizer, tokenizer.end_of_generation_ids)) == [
        "<|call|>", "<|return|>",
    ]  # fmt: skip
    shown = tokenizer.encode("<|start|><|end|><|call|>")
    assert tokenizer.decode(shown, skip_special=True) == "<|start|><|end|>"


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|return|>", "<|fim_middle|>"])
def test_a_token_with_a_role_is_a_control_token_whatever_its_type(end: str) -> None:
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], {end: USER_DEFINED}))
    assert len(tokenizer.encode(end)) == 1
    assert len(tokenizer.encode(end, parse_special=False)) == len(end)


@pytest.mark.parametrize(
    ("metadata", "add_bos", "bos", "eos"),
    [
        (spm_metadata(WORDS), True, 1, 2),
        (spm_metadata(WORDS, add_bos_token=False), False, 1, 2),
        (bpe_metadata(["a b"]), False, 11, 11),
        (bpe_metadata(["a b"], pre="llama-bpe"), True, 11, 11),
        (bpe_metadata(["a b"], pre="tekken", bos_token_id=3), True, 3, 11),
        (bpe_metadata(["a b"], pre="glm4", eos_token_id=4), False, None, 4),
        (bpe_metadata(["a b"], eos_token_id=999_999), False, 11, 11),
    ],
)
def test_flags_and_ids_default_as_in_llama_cpp(
    metadata: Metadata, add_bos: bool, bos: int | None, eos: int
) -> None:
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    assert (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id) == (add_bos, bos, eos)


def test_bos_is_put_in_front_on_request_and_refused_without_one() -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS))
    assert texts_of(tokenizer, tokenizer.encode("a", add_bos=True)) == ["<s>", "▁a"]
    without = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], pre="glm4"))
    with pytest.raises(InputError, match="no BOS"):
        without.encode("a", add_bos=True)


# ----- text again ----------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT.filter(lambda text: "▁" not in text))
def test_text_comes_back_from_sentencepiece(text: str) -> None:
    pieces = WORDS | {"▁▁": -0.5, "th": -0.1, "é": -1.0}
    for metadata in (spm_metadata(pieces), spm_metadata(pieces, add_space_prefix=False)):
        tokenizer = GGUFTokenizer.from_metadata(metadata)
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, st.sampled_from(sorted(PRE_TOKENIZERS)))
def test_text_comes_back_from_byte_level(text: str, pre: str) -> None:
    tokenizer = GGUFTokenizer.from_metadata(
        bpe_metadata(["Ġ t", "h e", "Ġt he", "Ċ Ċ", "1 2"], {"<c>": CONTROL}, pre=pre)
    )
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_half_characters_are_replaced_and_special_tokens_can_be_left_out() -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS))
    ids = tokenizer.encode("</s>a é")
    assert tokenizer.decode(ids[:-1]) == "</s> a �"
    assert tokenizer.decode(ids, skip_special=True) == " a é"
    answer = tokenizer.encode("a b")
    assert tokenizer.decode(answer) == "a b"
    assert tokenizer.decode(answer, is_continuation=True) == " a b"


def test_unused_tokens_have_no_text() -> None:
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["a b"], {"[PAD7]": UNUSED}))
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == b""
    assert decode_byte_level("Ġ€") == b" [UNK_BYTE_0xe282ac\xc4\xa0\xe2\x82\xac]"


def test_a_batch_is_the_same_as_one_by_one() -> None:
    texts = ["a b", "", "</s>", "ab</s>a", "é</s></s>"]
    for metadata in (spm_metadata(WORDS), bpe_metadata(["a b"], {"</s>": CONTROL})):
        tokenizer = GGUFTokenizer.from_metadata(metadata)
        for options in ({}, {"add_bos": True}, {"parse_special": False}, {"is_continuation": True}):
            one_by_one = [tokenizer.encode(text, **options) for text in texts]
            assert tokenizer.encode_batch(texts, **options) == one_by_one


# ----- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gemma4"}, "gemma4.*gpt2"),
        ({"model": "bert"}, "bert.*gpt2"),
        ({"model": 7}, "a text was expected"),
        ({"pre": "llama-bpf"}, "llama-bpf.*Did you mean `llama-bpe`.*smollm"),
        ({"tokens": None}, "no vocabulary"),
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": ["a", 1]}, "no vocabulary"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "`a` twice"),
        ({"token_type": [1, 1]}, "token_type has 2 entries"),
        ({"merges": None}, "no merges"),
        ({"merges": ["a b", "ab nothing"]}, "do not fit"),
        ({"add_bos_token": 1}, "true or false"),
    ],
)
def test_damaged_or_unknown_vocabularies_are_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    metadata = bpe_metadata(["a b"])
    for key, value in change.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(InputError, match=message):
        GGUFTokenizer.from_metadata(metadata)


def test_a_missing_pre_tokenizer_is_the_servers_default_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = bpe_metadata(["a b"])
    del metadata["tokenizer.ggml.pre"]
    get_logger().addHandler(
        caplog.handler
    )  # other tests may have cut our loggers off from the root
    try:
        tokenizer = GGUFTokenizer.from_metadata(metadata)
    finally:
        get_logger().removeHandler(caplog.handler)
    assert tokenizer.vocabulary.pre_tokenizer == PRE_TOKENIZERS["default"]
    assert "tokenizer.ggml.pre" in caplog.text


def test_text_that_is_no_unicode_is_refused() -> None:
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["a b"]))
    with pytest.raises(InputError, match=r"U\+D800\) at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_ids_out_of_range_are_refused(wrong: int) -> None:
    tokenizer = GGUFTokenizer.from_metadata(bpe_metadata(["a b"]))
    with pytest.raises(InputError, match=f"no token {wrong}: the vocabulary has 257"):
        tokenizer.decode([wrong])


def test_a_sentencepiece_vocabulary_without_the_byte_is_refused_on_use() -> None:
    metadata = spm_metadata({"a": 0.0})
    place = metadata["tokenizer.ggml.tokens"].index("<0xC3>")
    metadata["tokenizer.ggml.tokens"][place] = "other"
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    with pytest.raises(InputError, match="0xC3"):
        tokenizer.encode("é")


# ----- digest and export ---------------------------------------------------------------------------------------------


def test_the_digest_changes_with_whatever_changes_ids() -> None:
    base = bpe_metadata(["a b", "b c"], {"<c>": CONTROL})
    retyped = [*base["tokenizer.ggml.token_type"][:-1], NORMAL]
    variants = [
        base,
        base | {"tokenizer.ggml.merges": ["b c", "a b"]},
        base | {"tokenizer.ggml.pre": "smollm"},
        base | {"tokenizer.ggml.token_type": retyped},
        base | {"tokenizer.ggml.add_bos_token": True},
        base | {"tokenizer.ggml.eos_token_id": 5},
        base | {"tokenizer.ggml.tokens": [*base["tokenizer.ggml.tokens"][:-1], "<d>"]},
        spm_metadata({"a": 0.0}),
        spm_metadata({"a": -1.0}),
        spm_metadata({"a": 0.0}, add_space_prefix=False),
    ]
    digests = [GGUFTokenizer.from_metadata(variant).digest for variant in variants]
    assert len(set(digests)) == len(variants)
    assert GGUFTokenizer.from_metadata(dict(base)).digest == digests[0]
    assert read_vocabulary(base | {"general.name": "other"}).digest() == digests[0]


def test_hugging_faces_format_gives_the_same_ids() -> None:
    special = {"<s>": CONTROL, "<u>": USER_DEFINED, "</s>": CONTROL}
    flags = {"add_bos_token": True, "bos_token_id": 259, "eos_token_id": 261}
    metadata = bpe_metadata(["Ġ t", "h e", "Ġt he"], special, **flags)
    tokenizer = GGUFTokenizer.from_metadata(metadata)
    library = Tokenizer.from_str(tokenizer.to_tokenizer_json())
    for text in ("the the", "<s>the<u></s> it's 12 é", ""):
        ids = tokenizer.encode(text, add_bos=True)
        assert library.encode(text).ids == ids
        assert library.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    assert library.get_vocab_size() == tokenizer.vocab_size


def test_hugging_faces_files_name_the_special_tokens(tmp_path: Path) -> None:
    flags = {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}
    GGUFTokenizer.from_metadata(bpe_metadata(["a b"], **flags)).save_hf(tmp_path, "{{ messages }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [config[f"{role}_token"] for role in ("bos", "eos", "pad")] == BYTE_CHARACTERS[:3]
    assert config["chat_template"] == "{{ messages }}"
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_sentencepiece_vocabulary_is_not_written_in_hugging_faces_format(tmp_path: Path) -> None:
    tokenizer = GGUFTokenizer.from_metadata(spm_metadata(WORDS))
    with pytest.raises(InputError, match="SentencePiece"):
        tokenizer.save_hf(tmp_path)
    assert not list(tmp_path.iterdir())
