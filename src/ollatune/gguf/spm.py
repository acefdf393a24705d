"""SentencePiece BPE as llama.cpp does it (`llm_tokenizer_spm_session`): the best-scored neighbouring pair merges first.

Any two neighbours whose concatenation is a token may merge; the token's score decides, the leftmost pair wins a tie.
Characters that end up as no token become their bytes (`<0x0A>`).

Text is cut beforehand where no token of the vocabulary reaches across, so that merges on either side cannot affect
one another; the pieces (words, mostly) are then looked up in a cache. That keeps the result exact and most of the
work in C.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain

from ollatune.base.errors import InputError
from ollatune.gguf.vocabulary import Vocabulary

SPACE = "▁"  # U+2581, which stands for a blank in SentencePiece vocabularies
_BETWEEN_TOKENS = "\U0010ffff"  # a noncharacter: keeps tokens apart in one long string
_MAX_CACHED_PIECES = 1 << 18
_MAX_CACHED_CHARACTERS = 48


class SpmEncoder:
    """Turns plain text (no special tokens) into ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._scores = vocabulary.scores
        self._tokens = vocabulary.tokens
        self._cache = _PieceCache(self._encode_piece)
        self._find_pieces = _piece_pattern(vocabulary.tokens).findall

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, blanks already included where a prefix is wanted."""
        pieces = self._find_pieces(text.replace(" ", SPACE))
        return list(chain.from_iterable(map(self._cache.__getitem__, pieces)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def _encode_piece(self, piece: str) -> list[int]:
        """The ids of a piece that is not in the cache, from smaller pieces where it can be cut further."""
        neighbours = self._neighbours
        start = 0
        ids: list[int] = []
        for end in range(1, len(piece)):
            if piece[end - 1 : end + 1] not in neighbours:
                ids += self._cache[piece[start:end]]
                start = end
        return ids + self._cache[piece[start:]] if start else self._merge(piece)

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every two characters that stand side by side in some token."""
        text = _BETWEEN_TOKENS.join(self._tokens)
        return frozenset(map(str.__add__, text, text[1:]))

    def _merge(self, text: str) -> list[int]:
        num_symbols = len(text)
        if num_symbols == 1:
            return self._id_or_bytes(text)
        symbols = list(text)
        previous = list(range(-1, num_symbols - 1))
        following = [*range(1, num_symbols), -1]
        ids, scores = self._ids, self._scores
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right]
            token = ids.get(joined)
            if token is not None:
                heapq.heappush(queue, (-scores[token], left, right, len(joined)))

        for right in range(1, num_symbols):
            consider(right - 1, right)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            # an entry is stale when either side has merged since; both only ever grow or vanish
            if (
                not symbols[left]
                or not symbols[right]
                or len(symbols[left]) + len(symbols[right]) != size
            ):
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after = following[left] = following[right]
            if after >= 0:
                previous[after] = left
                consider(left, after)
            if previous[left] >= 0:
                consider(previous[left], left)
        result: list[int] = []
        for symbol in filter(None, symbols):
            found = ids.get(symbol)
            result += self._id_or_bytes(symbol) if found is None else (found,)
        return result

    def _id_or_bytes(self, character: str) -> list[int]:
        found = self._ids.get(character)
        if found is not None:
            return [found]
        return [self._byte_id(byte) for byte in character.encode()]

    def _byte_id(self, byte: int) -> int:
        found = self._ids.get(f"<0x{byte:02X}>")
        if found is None and byte < 128:
            found = self._ids.get(chr(byte))
        if found is None:
            raise InputError(
                f"The vocabulary has no token for byte 0x{byte:02X}, so this text cannot be encoded.",
                hint="llama.cpp cannot either; take that character out of the text.",
            )
        return found


def _piece_pattern(tokens: list[str]) -> re.Pattern[str]:
    """Cuts before each run of ▁, except after characters that some token has in front of a ▁."""
    text = _BETWEEN_TOKENS.join(tokens)
    joined_to_space = set(re.findall(f"([^{SPACE}{_BETWEEN_TOKENS}]){SPACE}", text))
    piece = f"(?:{SPACE}+[^{SPACE}]*|[^{SPACE}]+)"
    if joined_to_space:
        before = "".join(map(re.escape, sorted(joined_to_space)))
        piece += f"(?:(?<=[{before}]){SPACE}+[^{SPACE}]*)*"
    return re.compile(piece)


class _PieceCache(dict[str, list[int]]):
    """Ids by piece, computed on first use; emptied when full, and never holding long pieces."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, piece: str) -> list[int]:
        ids = self._encode(piece)
        if len(piece) <= _MAX_CACHED_CHARACTERS:
            if len(self) >= _MAX_CACHED_PIECES:
                self.clear()
            self[piece] = ids
        return ids
