"""Byte-level BPE through Hugging Face's `tokenizers`, with the word splitting of llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ollatune.base.errors import InputError
from ollatune.gguf.ascii_words import AsciiWords, independent_pieces
from ollatune.gguf.pretokenizers import PreTokenizer
from ollatune.gguf.vocabulary import Vocabulary

_MAX_KNOWN_TEXTS = 1 << 15  # about 8 MB
_LONGEST_KNOWN_TEXT = 64


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, by byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(byte) for byte in printable}
    stand_ins |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_ins[byte] for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_CHARACTERS_BY_ASCII = {byte: BYTE_CHARACTERS[byte] for byte in range(128)}
_BYTES_BY_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def decode_byte_level(token: str) -> bytes:
    """The bytes of a token written in GPT-2's stand-ins (llama.cpp, `llama_decode_text`)."""
    try:
        return bytes(map(_BYTES_BY_CHARACTER.__getitem__, token))
    except KeyError:
        return b"".join(_character_bytes(character, token) for character in token)


def _character_bytes(character: str, token: str) -> bytes:
    byte = _BYTES_BY_CHARACTER.get(character)
    if byte is not None:
        return bytes([byte])
    return f"[UNK_BYTE_0x{character.encode().hex()}{token}]".encode()


def pre_tokenizer_pipeline(pre_tokenizer: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The splitting of `pre_tokenizer` and the byte stand-ins, for the `tokenizers` library."""
    return pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(expression), "isolated")
                for expression in pre_tokenizer.expressions
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class _Table(dict[str, list[int]]):
    """Ids by text, emptied when it is full."""

    def keep(self, text: str, ids: list[int]) -> list[int]:
        if len(text) <= _LONGEST_KNOWN_TEXT:
            if len(self) >= _MAX_KNOWN_TEXTS:
                self.clear()
            self[text] = ids
        return ids


class ByteLevelEncoder:
    """Turns plain text (no special tokens) into ids. Raises InputError where merges and tokens do not fit."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.pre_tokenizer is not None, "byte-level vocabularies have one"
        ids = vocabulary.ids
        # llama.cpp drops bytes that are no token. Without an entry the library would let their neighbours merge
        # across the gap, so such bytes get ids past the end, which are taken out again below.
        missing = [character for character in BYTE_CHARACTERS if character not in ids]
        self._num_tokens = len(vocabulary.tokens)
        self._has_missing_bytes = bool(missing)
        if missing:
            ids = ids | {c: self._num_tokens + i for i, c in enumerate(missing)}
        try:
            model = models.BPE(
                vocab=ids,
                merges=parse_merges(vocabulary.merges),
                ignore_merges=vocabulary.pre_tokenizer.ignore_merges,
            )
        except Exception as error:  # the library raises plain Exception
            raise InputError(
                f"The vocabulary's merges do not fit its tokens: {error}.",
                hint="Convert or download the model again.",
            ) from error
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizer_pipeline(vocabulary.pre_tokenizer)
        self._model = model
        self._words = AsciiWords(vocabulary.pre_tokenizer.expressions)
        self._known_words = _Table()
        self._known_pieces = _Table()

    def encode(self, text: str) -> list[int]:
        return self._encode_ascii(text) if text.isascii() else self._encode_pieces(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _encode_ascii(self, text: str) -> list[int]:
        """Word by word, most words from the table: equal to the pipeline, since no merge crosses a word's border."""
        ids: list[int] = []
        known = self._known_words
        for word in self._words.split(text):
            ids += known[word] if word in known else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        tokens = self._model.tokenize(word.translate(_CHARACTERS_BY_ASCII))
        return self._known_words.keep(
            word, self._without_missing_bytes([token.id for token in tokens])
        )

    def _encode_pieces(self, text: str) -> list[int]:
        """Piece by piece, most pieces from the table, the others through the pipeline."""
        pieces = independent_pieces(text)
        found = {piece: self._known_pieces.get(piece) for piece in pieces}
        others = []
        for piece in [piece for piece, ids in found.items() if ids is None]:
            if piece.isascii():
                found[piece] = self._known_pieces.keep(piece, self._encode_ascii(piece))
            else:
                others.append(piece)
        encodings = self._tokenizer.encode_batch_fast(others, add_special_tokens=False)
        for piece, encoding in zip(others, encodings, strict=True):
            ids = self._without_missing_bytes(list(encoding.ids))
            found[piece] = self._known_pieces.keep(piece, ids)
        return [i for piece in pieces for i in found[piece] or ()]

    def _without_missing_bytes(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i < self._num_tokens] if self._has_missing_bytes else ids


def parse_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Merges in order of rank, each once: `"Ġt he"` is `("Ġt", "he")`. The first character is never the separator."""
    once = dict.fromkeys(merges)
    split = [merge.split(" ") for merge in once]
    if all(len(pair) == 2 and pair[0] for pair in split):
        return [(left, right) for left, right in split]
    pairs: list[tuple[str, str]] = []
    for merge in once:
        left, separator, right = merge[1:].partition(" ")
        if separator:
            pairs.append((merge[0] + left, right))
    return pairs
