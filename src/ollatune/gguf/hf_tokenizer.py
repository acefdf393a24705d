"""The tokenizer of a GGUF file in Hugging Face's format: `tokenizer.json` and `tokenizer_config.json`.

Byte-level BPE only: the same ids come out, because the same library does the same splitting and merging. A
SentencePiece vocabulary is refused: Hugging Face ranks merges strictly, llama.cpp compares scores and takes the
leftmost of equals, and no list of merges expresses that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from ollatune.base.errors import InputError
from ollatune.base.files import write_json, write_text
from ollatune.gguf.byte_level import BYTE_CHARACTERS, parse_merges, pre_tokenizer_pipeline
from ollatune.gguf.pretokenizers import PreTokenizer
from ollatune.gguf.vocabulary import Kind, Vocabulary

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The content of `tokenizer.json`. Raises InputError for a SentencePiece vocabulary."""
    if vocabulary.pre_tokenizer is None:
        raise InputError(
            "A SentencePiece vocabulary cannot be written as tokenizer.json with exactly the same tokens.",
            hint="Export to GGUF instead, or take the tokenizer of the original Hugging Face model.",
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=parse_merges(vocabulary.merges),
            ignore_merges=vocabulary.pre_tokenizer.ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary, vocabulary.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(vocabulary)
    tokenizer.add_tokens(_added_tokens(vocabulary))
    return str(tokenizer.to_str(pretty=True))


def save_hf_tokenizer(
    vocabulary: Vocabulary, folder: Path, chat_template: str | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the Jinja `chat_template`, if given) into `folder`.

    Raises InputError for a SentencePiece vocabulary, StorageError where the folder cannot be written.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    roles = {
        "bos_token": vocabulary.bos_id,
        "eos_token": vocabulary.eos_id,
        "unk_token": vocabulary.unk_id,
        "pad_token": vocabulary.pad_id,
    }
    config |= {role: vocabulary.tokens[i] for role, i in roles.items() if i is not None}
    if chat_template is not None:
        config["chat_template"] = chat_template
    content = tokenizer_json(vocabulary)
    write_text(folder / TOKENIZER_FILE, content)
    write_json(folder / TOKENIZER_CONFIG_FILE, config)


def _pre_tokenizer(vocabulary: Vocabulary, splitting: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Split into words; bytes without a token stand alone, so that nothing merges across them when they are dropped."""
    pipeline = pre_tokenizer_pipeline(splitting)
    missing = [character for character in BYTE_CHARACTERS if character not in vocabulary.ids]
    if not missing:
        return pipeline
    one_of_them = "".join(f"\\x{{{ord(character):x}}}" for character in missing)
    alone = pre_tokenizers.Split(Regex(f"[{one_of_them}]"), "isolated")
    return pre_tokenizers.Sequence([pipeline, alone])


def _added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    added: list[AddedToken] = []
    for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind & (Kind.CONTROL | Kind.UNKNOWN | Kind.USER_DEFINED):
            is_special = bool(kind & (Kind.CONTROL | Kind.UNKNOWN))
            strips = bool(kind & Kind.STRIPS_RIGHT)
            added.append(AddedToken(text, special=is_special, rstrip=strips, normalized=False))
    return added


def _post_processor(vocabulary: Vocabulary) -> processors.PostProcessor:
    """Puts BOS and EOS where llama.cpp does."""
    before = vocabulary.bos_id if vocabulary.add_bos else None
    after = vocabulary.eos_id if vocabulary.add_eos else None
    names = {
        role: vocabulary.tokens[i]
        for role, i in (("before", before), ("after", after))
        if i is not None
    }
    if not names:
        return processors.ByteLevel(trim_offsets=False)
    single = [names.get("before"), "$A", names.get("after")]
    pair = [*single, names.get("before"), "$B:1", names.get("after")]
    return processors.TemplateProcessing(
        single=[part for part in single if part],
        pair=[part for part in pair if part],
        special_tokens=[(text, vocabulary.ids[text]) for text in sorted(set(names.values()))],
    )
