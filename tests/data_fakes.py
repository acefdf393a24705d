"""A tokenizer of single bytes and a ChatML template, small enough to check ids by hand; a stream that is a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollatune.config.schema import DataConfig
from ollatune.data.render import Renderer

BOS, EOS, START, END = 256, 257, 258, 259
SPECIALS = {"<s>": BOS, "</s>": EOS, "<|im_start|>": START, "<|im_end|>": END}
_TEXTS = {number: text for text, number in SPECIALS.items()}
_SPLIT = re.compile("|".join(f"({re.escape(text)})" for text in SPECIALS))


class Terminal(io.StringIO):
    """What a progress bar takes for a terminal."""

    def isatty(self) -> bool:
        return True


class ByteTokenizer:
    """Ids are UTF-8 bytes; four special tokens above them."""

    bos_id, eos_id, eot_id, pad_id = BOS, EOS, END, None
    end_of_generation_ids = frozenset({EOS, END})
    vocab_size = 260

    def __init__(self, *, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self.digest = f"bytes-{add_bos}"

    def encode_segments(self, texts: Sequence[str], *, add_bos: bool = False) -> list[list[int]]:
        found = [self.encode(text) for text in texts]
        return [[BOS, *found[0]], *found[1:]] if add_bos else found

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        ids: list[int] = []
        for part in _SPLIT.split(text) if parse_special else [text]:
            if part:
                ids += [SPECIALS[part]] if parse_special and part in SPECIALS else part.encode()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        out = bytearray()
        for token in ids:
            out += _TEXTS[int(token)].encode() if int(token) in _TEXTS else bytes([int(token)])
        return out.decode(errors="replace")


@dataclass(frozen=True)
class Piece:
    text: str
    is_target: bool


class ChatMLTemplate:
    """`<|im_start|>role\\ncontent<|im_end|>\\n` per turn; answers and their `<|im_end|>` are targets."""

    digest = "chatml"

    def __init__(self, *, prefix: str = "", end: str = "<|im_end|>") -> None:
        self._prefix = prefix
        self._end = end

    def render_training_examples(
        self, messages: Sequence[Any], tools: Any = None, targets: str = "all"
    ) -> list[list[Piece]]:
        pieces = [Piece(self._prefix, False)]
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        for index, message in enumerate(messages):
            pieces.append(Piece(f"<|im_start|>{message.role}\n", False))
            is_target = index in (answers if targets == "all" else answers[-1:])
            pieces.append(Piece(f"{message.content}{self._end}", is_target))
            pieces.append(Piece("\n", False))
        return [pieces]


def make_renderer(max_length: int = 4096, **settings: Any) -> Renderer:
    """A renderer of the two fakes; `add_bos`, `prefix` and `end` go to them."""
    tokenizer = ByteTokenizer(add_bos=settings.pop("add_bos", False))
    fakes = {key: settings.pop(key) for key in ("prefix", "end") if key in settings}
    return Renderer(tokenizer, ChatMLTemplate(**fakes), max_length=max_length, **settings)


def make_config(**settings: Any) -> DataConfig:
    """A data section with everything else at its default."""
    return DataConfig(**settings)
