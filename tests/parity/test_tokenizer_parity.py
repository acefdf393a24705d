"""Tokenizers against llama.cpp: its golden tokenisations, its character tables, and itself, on real vocabularies."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers

from ollatune.gguf.pretokenizers import LETTER, MARK, NUMBER, PRE_TOKENIZERS, PUNCTUATION, SYMBOL
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.tokenizer import GGUFTokenizer
from tests.assets import ggml_vocab, llama_cpp_source, vocab_golden
from tests.engine import EngineTokenizer, write_vocabulary_model
from tests.random_texts import random_texts
from tests.vocab_metadata import Metadata, vocab_metadata

FAMILIES = ("llama-bpe", "llama-spm", "phi-3", "qwen2", "gpt-2")
OTHERS = (
    "qwen35", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "mpt", "refact", "starcoder"
)  # fmt: skip
NUM_TEXTS = 2000
# llama.cpp's splitting is slow for some vocabularies
pytestmark = pytest.mark.timeout(1200)
# one name for each way of splitting; the others are aliases
DISTINCT_PRE_TOKENIZERS = {value: name for name, value in PRE_TOKENIZERS.items()}.values()


def load(path: Path) -> GGUFTokenizer:
    with GGUFFile.open(path) as file:
        return GGUFTokenizer.from_metadata(file.metadata)


def from_vocabulary(metadata: Metadata, **more: Any) -> GGUFTokenizer:
    return GGUFTokenizer.from_metadata({key: value for key, (value, _) in metadata.items()} | more)


# ----- golden tokenisations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_golden_tokenisations(name: str) -> None:
    tokenizer = load(ggml_vocab(name))
    golden = vocab_golden(name)
    assert len(golden) >= 46
    texts = [text for text, _ in golden]
    expected = [ids for _, ids in golden]
    assert tokenizer.encode_batch(texts, parse_special=False) == expected


# ----- character classes ---------------------------------------------------------------------------------------------

CLASSES = {NUMBER: 0x02, LETTER: 0x04, MARK: 0x10, PUNCTUATION: 0x20, SYMBOL: 0x40}
NUM_CODE_POINTS = 0x110000


@pytest.mark.slow
def test_character_classes_are_those_of_llama_cpp() -> None:
    source = llama_cpp_source("unicode-data.cpp")
    flags = _flags_by_code_point(source)
    whitespace = {int(number, 16) for number in _table(source, "unicode_set_whitespace")}
    for expression, flag in CLASSES.items():
        expected = {code for code, value in enumerate(flags) if value & flag}
        assert _matched_by(expression) == expected, expression
    assert _matched_by(r"\s") == whitespace


def _table(source: str, name: str) -> list[str]:
    start = source.index(name)
    return re.findall(r"0x[0-9A-Fa-f]+", source[start : source.index("};", start)])


def _flags_by_code_point(source: str) -> list[int]:
    numbers = [int(number, 16) for number in _table(source, "unicode_ranges_flags")]
    starts, values = numbers[::2], numbers[1::2]
    flags: list[int] = []
    for value, start, end in zip(values, starts, starts[1:], strict=False):
        flags += [value] * (end - start)
    assert len(flags) == NUM_CODE_POINTS
    return flags


def _matched_by(expression: str) -> set[int]:
    """Every code point that `expression` matches, in the regex engine that splits words."""
    remover = pre_tokenizers.Split(Regex(expression), "removed")
    matched: set[int] = set()
    for start in range(0, NUM_CODE_POINTS, 4096):
        codes = [c for c in range(start, start + 4096) if not 0xD800 <= c < 0xE000]
        kept = remover.pre_tokenize_str("".join(map(chr, codes)))
        matched |= set(codes) - {ord(character) for piece, _ in kept for character in piece}
    return matched


# ----- the engine, on real vocabularies ------------------------------------------------------------------------------


def assert_same_tokens(tokenizer: GGUFTokenizer, engine: EngineTokenizer, texts: list[str]) -> None:
    """Equal ids with and without special tokens parsed, and equal text from the ids."""
    for text in texts:
        for parse_special in (True, False):
            ids = tokenizer.encode(text, add_bos=tokenizer.add_bos, parse_special=parse_special)
            expected = engine.tokenize(text, add_special=True, parse_special=parse_special)
            assert ids == expected, (text, parse_special)
        assert tokenizer.decode(ids, is_continuation=True) == engine.detokenize(ids)


def special_texts(tokenizer: GGUFTokenizer) -> list[str]:
    vocabulary = tokenizer.vocabulary
    return [
        token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind & 14
    ]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama3_2", "qwen2_5", "qwen3", "gemma2", "gemma3", "mistral_nemo", "llama2", "mistral:v1", "mistral:v3",
     "ggml:llama-spm", "ggml:qwen35", "ggml:deepseek-llm", "ggml:falcon"],
)  # fmt: skip
def test_same_tokens_as_the_engine(name: str, tmp_path: Path) -> None:
    metadata = vocab_metadata(name)
    tokenizer = from_vocabulary(metadata)
    texts = random_texts(11, NUM_TEXTS, special_texts(tokenizer))
    with EngineTokenizer(write_vocabulary_model(tmp_path / "model.gguf", metadata)) as engine:
        assert_same_tokens(tokenizer, engine, texts)


@pytest.mark.engine
@pytest.mark.slow
def test_same_tokens_as_the_engine_where_the_model_is_called_phi3(tmp_path: Path) -> None:
    metadata = vocab_metadata("ggml:phi-3")
    name = "Phi3 mini"
    tokenizer = from_vocabulary(metadata, **{"general.name": name})
    texts = random_texts(12, NUM_TEXTS, special_texts(tokenizer))
    path = write_vocabulary_model(tmp_path / "model.gguf", metadata, name=name)
    with EngineTokenizer(path) as engine:
        assert_same_tokens(tokenizer, engine, texts)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.weights
def test_same_tokens_as_the_engine_on_the_real_file(smollm2_path: Path) -> None:
    tokenizer = load(smollm2_path)
    texts = random_texts(13, NUM_TEXTS, special_texts(tokenizer))
    with EngineTokenizer(smollm2_path) as engine:
        assert_same_tokens(tokenizer, engine, texts)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("pre", sorted(DISTINCT_PRE_TOKENIZERS))
def test_same_words_as_the_engine(pre: str, tmp_path: Path) -> None:
    """Every pre-tokenizer, on GPT-2's vocabulary: how words are split does not depend on the tokens."""
    metadata = vocab_metadata("ggml:gpt-2")
    metadata["tokenizer.ggml.pre"] = (pre, gguf.GGUFValueType.STRING)
    metadata["tokenizer.ggml.add_bos_token"] = (False, gguf.GGUFValueType.BOOL)
    tokenizer = from_vocabulary(metadata)
    with EngineTokenizer(write_vocabulary_model(tmp_path / "model.gguf", metadata)) as engine:
        assert_same_tokens(tokenizer, engine, random_texts(15, NUM_TEXTS // 2))


# ----- the engine, on vocabularies made to be difficult --------------------------------------------------------------


def _random_vocabulary(seed: int) -> Metadata:
    """Ties between scores, pieces with a blank inside, overlapping special tokens, flags either way."""
    generator = random.Random(seed)
    kinds = gguf.GGUFValueType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    scores = [generator.choice((0.0, -1000.0))] * len(tokens)
    pieces = {"".join(generator.choices("ab▁é\n", k=generator.randint(1, 5))) for _ in range(60)}
    special = {"".join(generator.choices("<ab>", k=generator.randint(2, 5))) for _ in range(8)}
    # which of two equally long overlapping tokens goes first is left open, so one of each length
    special = set({len(text): text for text in sorted(special)}.values())
    for piece in sorted(pieces - special):
        tokens.append(piece)
        types.append(1)
        scores.append(float(generator.randint(-6, 0)))
    for text in sorted(special):
        tokens.append(text)
        types.append(generator.choice((3, 4)))
        scores.append(float(generator.randint(-6, 0)))
    return {
        "tokenizer.ggml.model": ("llama", kinds.STRING),
        "tokenizer.ggml.pre": ("default", kinds.STRING),
        "tokenizer.ggml.tokens": (tokens, kinds.ARRAY),
        "tokenizer.ggml.token_type": (types, kinds.ARRAY),
        "tokenizer.ggml.scores": (scores, kinds.ARRAY),
        "tokenizer.ggml.add_space_prefix": (generator.random() < 0.5, kinds.BOOL),
    }


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_same_tokens_as_the_engine_on_difficult_vocabularies(seed: int, tmp_path: Path) -> None:
    metadata = _random_vocabulary(seed)
    # a vocabulary for Phi-3 has its blanks stripped behind special tokens
    name = "phi-3" if seed % 3 == 0 else "tiny"
    if name == "phi-3":
        metadata["tokenizer.ggml.tokens"][0].append("<|endoftext|>")
        metadata["tokenizer.ggml.token_type"][0].append(3)
        metadata["tokenizer.ggml.scores"][0].append(0.0)
    tokenizer = from_vocabulary(metadata, **{"general.name": name})
    generator = random.Random(seed)
    special = special_texts(tokenizer)
    texts = [
        "".join(generator.choice((*"ab ▁é\nx", *special)) for _ in range(generator.randint(1, 40)))
        for _ in range(300)
    ]
    path = write_vocabulary_model(tmp_path / "model.gguf", metadata, name=name)
    with EngineTokenizer(path) as engine:
        assert_same_tokens(tokenizer, engine, texts)


# ----- special ids ---------------------------------------------------------------------------------------------------

# leaves without tearing the server down: that can hang while the log is still being written
_PRINT_VOCABULARY = """
import os, sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.warmup, parameters.port, parameters.verbosity = 256, False, 0, 4
server = xllamacpp.Server(parameters)
time.sleep(1)
os._exit(0)
"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama3_2", "qwen3", "gemma3", "mistral_nemo", "ggml:phi-3", "ggml:refact", "ggml:command-r"],
)
def test_same_special_ids_as_the_engine(name: str, tmp_path: Path) -> None:
    metadata = vocab_metadata(name)
    tokenizer = from_vocabulary(metadata)
    path = write_vocabulary_model(tmp_path / "model.gguf", metadata)
    command = [sys.executable, "-c", _PRINT_VOCABULARY, str(path)]
    result = subprocess.run(command, capture_output=True, check=True, timeout=120)
    said = dict(_printed_ids((result.stdout + result.stderr).decode("utf-8", "replace")))
    assert said["EOG"] == tokenizer.end_of_generation_ids
    assert said.get("BOS", set()) == {tokenizer.bos_id} - {None}
    assert said.get("EOS", set()) == {tokenizer.eos_id} - {None}
    assert said.get("UNK", set()) == {tokenizer.unk_id} - {None}
    assert said.get("PAD", set()) == {tokenizer.pad_id} - {None}
    if said.get("EOT") != {
        tokenizer.eot_id
    }:  # one of several fits; which one depends on a hash table
        assert said.get("EOT", set()) <= tokenizer.end_of_generation_ids


def _printed_ids(log: str) -> Iterator[tuple[str, set[int]]]:
    for role in ("BOS", "EOS", "EOT", "UNK", "PAD", "EOG"):
        found = {int(number) for number in re.findall(rf": {role} token +=\s+(\d+)", log)}
        if found:
            yield role, found


# ----- Hugging Face's format -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "refact"])
def test_exported_for_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load(ggml_vocab(name))
    tokenizer.save_hf(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    # Hugging Face decodes special tokens beyond ASCII as if they were byte stand-ins
    special = [text for text in special_texts(tokenizer) if text.isascii()]
    texts = random_texts(14, 500, special)
    texts += [text for text, _ in vocab_golden(name)]
    for text in texts:
        ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
        assert loaded(text).input_ids == ids, text
        assert loaded.decode(ids) == tokenizer.decode(ids)
