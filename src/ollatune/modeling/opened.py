"""A base model opened: its file, its exact tokenizer, the chat template that decides what it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.modeling.base import BaseSource
from ollatune.templates.chat import ChatTemplate, load_chat_template


@dataclass(frozen=True)
class OpenBase:
    """A base model's file with its tokenizer and chat template."""

    source: BaseSource
    gguf: GGUFFile
    tokenizer: GGUFTokenizer
    template: ChatTemplate

    @property
    def architecture(self) -> str:
        return str(self.gguf.metadata.get("general.architecture", ""))

    @property
    def context_length(self) -> int | None:
        """Tokens the base was made for, None where the file does not say."""
        value = self.gguf.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None


def open_base(source: BaseSource) -> OpenBase:
    """Open the file, build the tokenizer, choose the template: the store's Go TEMPLATE, else the GGUF's Jinja."""
    gguf = source.open()
    tokenizer = GGUFTokenizer.from_metadata(gguf.metadata)
    return OpenBase(source, gguf, tokenizer, chat_template(source, gguf.metadata, tokenizer))


def chat_template(
    source: BaseSource, metadata: Mapping[str, Any], tokenizer: GGUFTokenizer
) -> ChatTemplate:
    """The template that decides what the served model sees. Raises InputError where there is none."""
    jinja = metadata.get("tokenizer.chat_template")
    return load_chat_template(
        go_text=source.template,
        jinja_text=jinja if isinstance(jinja, str) else None,
        bos_text=_text(tokenizer, tokenizer.bos_id),
        eos_text=_text(tokenizer, tokenizer.eos_id),
        adds_bos=tokenizer.add_bos,
        end_of_turn_texts=[
            tokenizer.token_text(i) for i in sorted(tokenizer.end_of_generation_ids)
        ],
    )


def _text(tokenizer: GGUFTokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id)


def renderer_parts(source: BaseSource) -> tuple[GGUFTokenizer, ChatTemplate]:
    """Tokenizer and template of a base model: what worker processes that prepare data start with."""
    base = open_base(source)
    return base.tokenizer, base.template
