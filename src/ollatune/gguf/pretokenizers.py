"""How text is split into words before the merges of byte-level BPE, by `tokenizer.ggml.pre`.

The expressions are those of llama.cpp (src/llama-vocab.cpp, `llm_tokenizer_bpe`), applied one after the other: each
splits the pieces that the one before has left, and what no expression matches stays a piece of its own. Two things
that llama.cpp does in code are spelled out here: every letter category counts as "letter" (it keeps no case beyond
ASCII), and the character classes are those of Unicode 15.1, whatever the regex engine knows beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

from ollatune.base.errors import InputError
from ollatune.base.log import get_logger
from ollatune.base.text import did_you_mean, printable

# Letters, digits, marks, punctuation and symbols that Unicode 16.0 added: unassigned to llama.cpp.
_ADDED_AFTER_UNICODE_15_1 = (
    r"\x{897}\x{1b4e}-\x{1b4f}\x{1b7f}\x{1c89}-\x{1c8a}\x{2427}-\x{2429}"
    r"\x{31e4}-\x{31e5}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}"
    r"\x{10d40}-\x{10d65}\x{10d69}-\x{10d85}\x{10d8e}-\x{10d8f}\x{10ec2}-\x{10ec4}"
    r"\x{10efc}\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}"
    r"\x{113b7}-\x{113c0}\x{113c2}\x{113c5}\x{113c7}-\x{113ca}\x{113cc}-\x{113d5}"
    r"\x{113d7}-\x{113d8}\x{113e1}-\x{113e2}\x{116d0}-\x{116e3}\x{11bc0}-\x{11be1}"
    r"\x{11bf0}-\x{11bf9}\x{11f5a}\x{13460}-\x{143fa}\x{16100}-\x{16139}"
    r"\x{16d40}-\x{16d79}\x{18cff}\x{1cc00}-\x{1ccf9}\x{1cd00}-\x{1ceb3}"
    r"\x{1e5d0}-\x{1e5fa}\x{1e5ff}\x{1f8b2}-\x{1f8bb}\x{1f8c0}-\x{1f8c1}\x{1fa89}"
    r"\x{1fa8f}\x{1fabe}\x{1fac6}\x{1fadc}\x{1fadf}\x{1fae9}\x{1fbcb}-\x{1fbef}"
)
_OLD = f"[^{_ADDED_AFTER_UNICODE_15_1}]"

LETTER = rf"[\p{{L}}&&{_OLD}]"
NUMBER = rf"[\p{{N}}&&{_OLD}]"
MARK = rf"[\p{{M}}&&{_OLD}]"
PUNCTUATION = rf"[\p{{P}}&&{_OLD}]"
SYMBOL = rf"[\p{{S}}&&{_OLD}]"

_NO_LOWER = f"[{LETTER}&&[^a-z]]"
_NO_UPPER = f"[{LETTER}&&[^A-Z]]"

# DeepSeek's letters, in its own list
_DEEPSEEK_LETTERS = (
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}"
    r"\x{1c4}-\x{293}\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}"
    r"\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}"
    r"\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}"
    r"\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}"
    r"\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}"
    r"\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}"
    r"\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}"
    r"\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}"
    r"\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}"
    r"\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}"
    r"\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}"
    r"\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}"
    r"\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}"
    r"\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}"
    r"\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}"
    r"\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}"
    r"\x{1e900}-\x{1e943}"
)
# Where an expression names characters beyond ASCII, llama.cpp shows it every blank beyond ASCII as a vertical tab:
# so none of those counts as one of the characters here, and U+3000 is missing from the punctuation below.
_CJK_AND_HANGUL = r"[[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]&&[^\s]]+"
_CJK_AND_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?{NUMBER}+| ?[^\s{LETTER}{NUMBER}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = rf" ?[^\s{LETTER}{NUMBER}]+[\r\n]*"
_WORD = rf"[^\r\n{LETTER}{NUMBER}]?{LETTER}+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|{NUMBER}{{1,3}}|{_OTHERS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|{NUMBER}|{_OTHERS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n{LETTER}{NUMBER}]?[{LETTER}{MARK}]+|{NUMBER}"
    rf"| ?[^\s{LETTER}{MARK}{NUMBER}]+[\r\n]*|{_SPACES}"
)
_CASED_WORD_1 = rf"[^\r\n{LETTER}{NUMBER}]?{_NO_LOWER}*{_NO_UPPER}+"
_CASED_WORD_2 = rf"[^\r\n{LETTER}{NUMBER}]?{_NO_LOWER}+{_NO_UPPER}*"
_OTHERS_AND_SLASH = rf" ?[^\s{LETTER}{NUMBER}]+[\r\n/]*"
_TEKKEN = rf"{_CASED_WORD_1}|{_CASED_WORD_2}|{NUMBER}|{_OTHERS_AND_SLASH}|{_SPACES}"
_GPT4O = (
    rf"{_CASED_WORD_1}{_CONTRACTION}?|{_CASED_WORD_2}{_CONTRACTION}?|{NUMBER}{{1,3}}"
    rf"|{_OTHERS_AND_SLASH}|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%\&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    rf"|[^\r\n{LETTER}{PUNCTUATION}{SYMBOL}]?[{LETTER}{MARK}]+"
    rf"| ?[{PUNCTUATION}{SYMBOL}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|{NUMBER}| ?[^\s{LETTER}{NUMBER}\r\n]+|{_SPACES}"
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|{NUMBER}|{_OTHERS}"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of splitting text into words, with the flags llama.cpp sets along with it."""

    expressions: tuple[str, ...]
    """Applied in turn, in Oniguruma's syntax."""
    ignore_merges: bool = False
    """A word that is a token as it stands is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether a prompt begins with BOS where the file does not say."""
    has_default_bos: bool = True


_WORDS_BY_GPT2 = PreTokenizer((_GPT2,))
_DIGITS_THEN_GPT2 = PreTokenizer((NUMBER, _GPT2))
_WORDS_BY_LLAMA3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_WORDS_BY_QWEN2 = PreTokenizer((_QWEN2,))
_WORDS_BY_GPT4O = PreTokenizer((_GPT4O,))
_WORDS_BY_DEEPSEEK3 = PreTokenizer((rf"{NUMBER}{{1,3}}", _CJK_AND_KANA, _DEEPSEEK3))
_WORDS_BY_BAILING = PreTokenizer((_BAILING,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(
        (rf"[{PUNCTUATION}\$\+<=>\^~\|]+", _GPT2, rf"{NUMBER}+", "[0-9][0-9][0-9]")
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}\x{3002}]+",
            r"\s+\z",
            _CJK_AND_HANGUL,
            rf"{NUMBER}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", rf"\s?{LETTER}+", rf"\s?{PUNCTUATION}+", _CJK_AND_HANGUL, NUMBER)
    ),
    "falcon": PreTokenizer((rf"[{PUNCTUATION}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen35": PreTokenizer((_QWEN35,)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,), has_default_bos=False),
    "glm4": PreTokenizer((_LLAMA3,), ignore_merges=True, has_default_bos=False),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _WORDS_BY_LLAMA3,
    ),
    **dict.fromkeys(
        (
            "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open",
            "grok-2",
        ),
        _WORDS_BY_QWEN2,
    ),
    **dict.fromkeys(
        (
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
            "a.x-4.0", "mellum", "exaone4",
        ),
        _WORDS_BY_GPT2,
    ),
    **dict.fromkeys(
        (
            "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
            "mellum2",
        ),
        _DIGITS_THEN_GPT2,
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _WORDS_BY_GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _WORDS_BY_DEEPSEEK3),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _WORDS_BY_BAILING),
}  # fmt: skip


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that `tokenizer.ggml.pre` names. Raises InputError for one we do not know.

    Files of early 2024 lack the key; llama.cpp serves them with "default" and a warning, and so do we.
    """
    if not name:
        get_logger("gguf").warning(
            "The model file does not name its pre-tokenizer (tokenizer.ggml.pre); llama.cpp serves such a file with "
            "`default`, which is used here too. A newer conversion of the model would be better."
        )
        name = "default"
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    raise InputError(
        f"The model's pre-tokenizer (tokenizer.ggml.pre) is `{printable(name)}`, which this version cannot reproduce "
        f"exactly.{did_you_mean(name, PRE_TOKENIZERS)}",
        hint=f"Known ones: {', '.join(sorted(PRE_TOKENIZERS))}.",
    )
