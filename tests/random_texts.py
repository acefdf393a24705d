"""Seeded random texts that are hard on tokenizers: scripts, digits, blanks, emoji, marks, control characters, code."""

from __future__ import annotations

import random
from collections.abc import Sequence

_RANGES = (
    (0x20, 0x7E), (0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x00, 0x1F), (0x80, 0xFF), (0x100, 0x24F),
    (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
    (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x218F),
    (0x2460, 0x24FF), (0x2580, 0x259F), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xA640, 0xA7FF), (0xAC00, 0xD7A3),
    (0xE000, 0xE010), (0xFB00, 0xFDFF), (0xFE00, 0xFE6F), (0xFF00, 0xFFEF), (0x10400, 0x1047F), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x200FF), (0x2EBF0, 0x2EC00), (0x10D40, 0x10D85),
    (0x1CC00, 0x1CC40), (0xE0000, 0xE007F), (0x10FFF0, 0x10FFFD),
)  # fmt: skip
_WORDS = (
    "the", "of", "and", "Hello", "world", "don't", "I'LL", "we'Ve", "it's", "'S", "O'Brien's", "naïve", "Straße",
    "Привет", "мир", "你好", "世界", "こんにちは", "안녕하세요", "مرحبا", "שלום", "नमस्ते", "สวัสดี", "Cửa", "Việt",
    "JSON", "camelCaseWord", "snake_case_name", "HTTPServer2Go", "x86_64", "3.14159", "1,234,567", "2026-11-22",
    "0xDEADBEEF", "€100", "½", "①②③", "10²", "٣٤٥", "http://a.b/c?d=e&f=g#h", "user@example.com", "C++", "#!/bin/sh",
    "====", "----", "....", "!!!", "???", "```python", "def f(x):", "{\"a\": [1, 2]}", "</div>", "<|", "|>", "[INST]",
    "🚀", "👩‍👩‍👧‍👦", "🇩🇪", "é", "ﬁ", "\u200b", "\ufeff", "\xa0", "\u3000", "\u2028", "\x85", "\x1c", "\x00",
    "▁", "▁▁", "Ġ", "Ċ", "<0x0A>", "<s>", "</s>", "<unk>", "aaaa", "aaaaa", "abababab", "xxxxxxx", "hahahahaha",
)  # fmt: skip
_BLANKS = (
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    "\n\n\n\n",
    "",
)


def random_texts(seed: int, count: int, special: Sequence[str] = ()) -> list[str]:
    """`count` texts of up to about a hundred pieces; `special` texts are strewn into some of them."""
    generator = random.Random(seed)
    return [_text(generator, special) for _ in range(count)]


def _text(generator: random.Random, special: Sequence[str]) -> str:
    style = generator.random()
    pieces: list[str] = []
    for _ in range(generator.choice((1, 2, 3, 5, 8, 13, 30, 100))):
        if special and generator.random() < 0.1:
            pieces.append(generator.choice(special))
        if style < 0.35:
            pieces += [generator.choice(_WORDS), generator.choice(_BLANKS)]
        elif style < 0.6:
            first, last = generator.choice(_RANGES)
            pieces += [chr(generator.randint(first, last)) for _ in range(generator.randint(1, 4))]
        elif style < 0.7:
            pieces.append(generator.choice("a=-. \n\t*#_1x▁") * generator.randint(1, 40))
        elif style < 0.8:
            pieces.append(_any_character(generator))
        else:
            first, last = generator.choice(_RANGES)
            pieces += [
                generator.choice(_BLANKS),
                generator.choice(_WORDS),
                chr(generator.randint(first, last)),
            ]
    return "".join(pieces)


def _any_character(generator: random.Random) -> str:
    while 0xD800 <= (code := generator.randint(0, 0x10FFFF)) <= 0xDFFF:
        pass
    return chr(code)
