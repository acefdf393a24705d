"""Text to token ids and back, exactly as llama.cpp does it with the vocabulary in a GGUF file.

Two kinds of vocabulary: byte-level BPE (`tokenizer.ggml.model` = gpt2: Llama 3, Qwen, SmolLM, Mistral Nemo, Phi-4)
goes through Hugging Face's `tokenizers` (Rust) with llama.cpp's word splitting; SentencePiece BPE (llama: Llama 2,
Mistral, Gemma, Phi-3) through our own merges. docs/tokenizers.md says which are exact and how that is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ollatune.base.errors import InputError
from ollatune.gguf.byte_level import ByteLevelEncoder, decode_byte_level
from ollatune.gguf.hf_tokenizer import save_hf_tokenizer, tokenizer_json
from ollatune.gguf.special_tokens import Fragment, SpecialTokens
from ollatune.gguf.spm import SPACE, SpmEncoder
from ollatune.gguf.vocabulary import Kind, Vocabulary, read_vocabulary

_SHOWN_AS_IS = int(Kind.CONTROL | Kind.USER_DEFINED | Kind.UNKNOWN)
_HIDDEN = int(Kind.CONTROL | Kind.UNKNOWN)


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class GGUFTokenizer:
    """The tokenizer of a GGUF file. Immutable, apart from caches; the same text always gives the same ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eot_id = vocabulary.eot_id
        self.eom_id = vocabulary.eom_id
        self.pad_id = vocabulary.pad_id
        self.unk_id = vocabulary.unk_id
        self.end_of_generation_ids = vocabulary.end_of_generation_ids
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.vocab_size = len(vocabulary.tokens)
        self._special_tokens = SpecialTokens(vocabulary)
        self._encoder: _Encoder
        if vocabulary.is_bpe:
            self._encoder = ByteLevelEncoder(vocabulary)
        else:
            self._encoder = SpmEncoder(vocabulary)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> GGUFTokenizer:
        """The tokenizer that a GGUF header describes (its `tokenizer.ggml.*` and `general.name` keys).

        Raises InputError where the vocabulary is missing, damaged, or of a kind that we cannot reproduce exactly.
        """
        return cls(read_vocabulary(metadata))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over tokens, kinds, merges or scores, pre-tokenizer, special ids and flags."""
        return self.vocabulary.digest()

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        parse_special: bool = True,
        is_continuation: bool = False,
    ) -> list[int]:
        """The ids of `text`.

        add_bos: put BOS in front (pass `tokenizer.add_bos` to do what the server does with a prompt).
        parse_special: texts of CONTROL tokens become those tokens; without it they are plain text.
        is_continuation: the text goes on where other text ended, so a SentencePiece vocabulary's blank is not put
        in front of it.

        Raises InputError for a lone surrogate, or for `add_bos` where the vocabulary has no BOS.
        """
        return self.encode_batch(
            [text], add_bos=add_bos, parse_special=parse_special, is_continuation=is_continuation
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = False,
        parse_special: bool = True,
        is_continuation: bool = False,
    ) -> list[list[int]]:
        """`encode` of each text; byte-level BPE uses all cores unless TOKENIZERS_PARALLELISM is false."""
        plain: list[str] = []
        layouts: list[list[Fragment]] = []
        for text in texts:
            _require_unicode(text)
            fragments = self._special_tokens.split(text, parse_special=parse_special)
            layouts.append(fragments)
            plain += self._with_space_prefixes(fragments, after_special=not is_continuation)
        return self._joined(layouts, plain, add_bos=[add_bos] * len(texts))

    def _joined(
        self,
        layouts: Sequence[Sequence[Fragment]],
        plain: Sequence[str],
        *,
        add_bos: Sequence[bool],
    ) -> list[list[int]]:
        """Ids of each layout, its plain fragments replaced by the encodings of `plain` in order."""
        encoded = iter(self._encoder.encode_batch(plain))
        results: list[list[int]] = []
        for fragments, has_bos in zip(layouts, add_bos, strict=True):
            ids = [self._required_bos()] if has_bos else []
            for fragment in fragments:
                ids += (fragment,) if isinstance(fragment, int) else next(encoded)
            results.append(ids)
        return results

    def encode_segments(
        self, texts: Sequence[str], *, add_bos: bool = False, parse_special: bool = True
    ) -> list[list[int]]:
        """The ids of texts that follow one another, each encoded alone; BOS, if asked for, begins the first.

        Blanks are as in the whole text: a SentencePiece vocabulary's blank is put at the start and after a special
        token, and Phi-3's special tokens swallow the white space after them, be that in the same text or at the end
        of the one before.
        """
        plain: list[str] = []
        layouts: list[list[Fragment]] = []
        previous: Fragment | None = None
        for text in texts:
            _require_unicode(text)
            if isinstance(previous, int):
                text = self._special_tokens.without_swallowed_space(text, previous)
            fragments = self._special_tokens.split(text, parse_special=parse_special)
            layouts.append(fragments)
            after_special = not isinstance(previous, str)
            plain += self._with_space_prefixes(fragments, after_special=after_special)
            previous = fragments[-1] if fragments else previous
        has_bos = [add_bos and number == 0 for number in range(len(texts))]
        return self._joined(layouts, plain, add_bos=has_bos)

    def _with_space_prefixes(
        self, fragments: Sequence[Fragment], *, after_special: bool
    ) -> list[str]:
        """The plain fragments, with the blank that SentencePiece puts at the start and after special tokens."""
        plain: list[str] = []
        for fragment in fragments:
            if isinstance(fragment, str):
                has_prefix = self.vocabulary.add_space_prefix and after_special
                plain.append(f" {fragment}" if has_prefix else fragment)
            after_special = isinstance(fragment, int)
        return plain

    def _required_bos(self) -> int:
        if self.bos_id is None:
            raise InputError("BOS was asked for, but the model's vocabulary has no BOS token.")
        return self.bos_id

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = False, is_continuation: bool = False
    ) -> str:
        """The text of `ids`, bytes that are no UTF-8 replaced by U+FFFD.

        skip_special leaves out CONTROL and UNKNOWN tokens, as the server does in answers. Without is_continuation,
        the blank that `encode` puts in front of SentencePiece text is taken off; with it, the text is the plain
        concatenation of the pieces, which is what the server sends for generated tokens.
        """
        pieces: list[bytes] = []
        kinds = self.vocabulary.kinds
        for i, token_id in enumerate(ids):
            piece = self.token_bytes(token_id)
            if skip_special and kinds[token_id] & _HIDDEN:
                continue
            if i == 0 and self.vocabulary.add_space_prefix and not is_continuation:
                piece = piece.removeprefix(b" ")
            pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for; special tokens stand for their own text. Raises InputError for a wrong id."""
        known = self._pieces.get(token_id)
        if known is not None:
            return known
        token = self.token_text(token_id)
        kind = self.vocabulary.kinds[token_id]
        if kind & _SHOWN_AS_IS:
            piece = token.encode()
        elif kind & Kind.NORMAL and self.vocabulary.is_bpe:
            piece = decode_byte_level(token)
        elif kind & Kind.NORMAL:
            piece = token.replace(SPACE, " ").encode()
        elif kind & Kind.BYTE:
            piece = bytes([int(token[3:5], 16)])
        else:  # unused and undefined tokens have no text
            piece = b""
        self._pieces[token_id] = piece
        return piece

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it, e.g. `Ġthe`, `▁the`, `<0x0A>`. Raises InputError for a wrong id."""
        if not 0 <= token_id < self.vocab_size:
            raise InputError(
                f"There is no token {token_id}: the vocabulary has {self.vocab_size} tokens."
            )
        return self.vocabulary.tokens[token_id]

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary writes as `text`, or None."""
        return self.vocabulary.ids.get(text)

    def to_tokenizer_json(self) -> str:
        """The tokenizer as Hugging Face's `tokenizer.json`. Raises InputError for a SentencePiece vocabulary."""
        return tokenizer_json(self.vocabulary)

    def save_hf(self, folder: Path, chat_template: str | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer.from_pretrained(folder)`.

        Raises InputError for a SentencePiece vocabulary, StorageError where the folder cannot be written.
        """
        save_hf_tokenizer(self.vocabulary, folder, chat_template)


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}.",
            hint="It was cut or decoded wrongly; such text cannot be sent to a server either.",
        ) from None
