"""A model's chat template, Go or Jinja, as prompts to serve and as conversations to train on."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from ollatune.base.errors import InputError, UsageError
from ollatune.base.text import did_you_mean
from ollatune.templates.jinja import JinjaTemplate
from ollatune.templates.messages import ROLES, Message, Segment, merge_consecutive
from ollatune.templates.ollama_render import DEFAULT_DATE, OllamaTemplate
from ollatune.templates.turns import TurnReader

# Goes into every digest, so that caches of rendered data are made anew when the rules here change.
_RULES_VERSION = 1

Tools = Sequence[Mapping[str, Any]] | None
Targets = Literal["all", "last"]


class ChatTemplate:
    """A template and all it needs: rendered for serving, and cut into segments for training.

    The beginning-of-text token never stands in the rendered text where the tokenizer adds it (`adds_bos`).
    """

    def __init__(
        self,
        source: Literal["go", "jinja"],
        text: str,
        *,
        bos_text: str = "",
        eos_text: str = "",
        adds_bos: bool = False,
        end_of_turn_texts: Sequence[str] = (),
        today: datetime.date = DEFAULT_DATE,
        think: bool | None = None,
    ) -> None:
        self.source = source
        self.text = text
        self.bos_text = bos_text
        self.eos_text = eos_text
        self.adds_bos = adds_bos
        self.end_of_turn_texts = tuple(end_of_turn_texts)
        self.today = today
        self.think = think
        self._go = OllamaTemplate(text) if source == "go" else None
        variables = {} if think is None else {"enable_thinking": think}
        self._jinja = JinjaTemplate(
            text, today=today, bos_text=bos_text, eos_text=eos_text, variables=variables
        )

    @property
    def digest(self) -> str:
        """Hex digest of everything a rendering depends on beside the messages."""
        parts = [
            _RULES_VERSION, self.source, self.text, self.bos_text, self.eos_text, self.adds_bos,
            self.end_of_turn_texts, self.today.isoformat(), self.think,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def render_prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """The string the server feeds the model for `messages`, ending where the answer begins.

        Raises InputError where the template refuses the conversation, or cannot be rendered exactly.
        """
        return self._render(tools, merge_consecutive(_checked(messages)), True)

    def render_training(
        self, messages: Sequence[Message], tools: Tools = None, targets: Targets = "all"
    ) -> list[Segment]:
        """The conversation up to its last assistant message, in segments; targets are answers with their end of turn.

        Raises InputError where nothing is said by the assistant, where the template cannot be rendered exactly, and
        where answers before the last are wanted but need examples of their own (`render_training_examples`).
        """
        reader, kept = self._prepare(messages, tools, targets)
        segments = reader.segments(kept, is_every_answer_target=targets == "all")
        if segments is None:
            raise InputError(
                "This chat template shows earlier answers otherwise than the model said them, so one example cannot "
                "train them all.",
                hint="Train each answer as its own example, or the last answer only (targets: last).",
            )
        return segments

    def render_training_examples(
        self, messages: Sequence[Message], tools: Tools = None, targets: Targets = "all"
    ) -> list[list[Segment]]:
        """As `render_training`, but split into one example per answer where one example cannot hold them all."""
        reader, kept = self._prepare(messages, tools, targets)
        segments = reader.segments(kept, is_every_answer_target=targets == "all")
        if segments is not None:
            return [segments]
        examples = []
        for index, message in enumerate(kept):
            if message.role == "assistant":
                example = reader.segments(kept[: index + 1], is_every_answer_target=False)
                assert example is not None, "one answer never needs a split"
                examples.append(example)
        return examples

    def with_think(self, think: bool | None) -> ChatTemplate:
        """The same template for requests whose `think` is this."""
        return ChatTemplate(
            self.source,
            self.text,
            bos_text=self.bos_text,
            eos_text=self.eos_text,
            adds_bos=self.adds_bos,
            end_of_turn_texts=self.end_of_turn_texts,
            today=self.today,
            think=think,
        )

    def end_of_turn(self) -> str:
        """The text that ends an answer, such as `<|im_end|>`. Raises InputError where there is none to be found."""
        question = [Message("user", "Hello")]
        return self._reader(None).read(question, Message("assistant", "Hi")).ending

    def _prepare(
        self, messages: Sequence[Message], tools: Tools, targets: Targets
    ) -> tuple[TurnReader, list[Message]]:
        if targets not in ("all", "last"):
            raise UsageError(f"targets is {targets!r}; expected 'all' or 'last'.")
        merged = merge_consecutive(_checked(messages))
        answers = [index for index, message in enumerate(merged) if message.role == "assistant"]
        if not answers:
            raise InputError(
                "The conversation has no assistant message, so there is nothing to train on.",
                hint="Add the answer as a message with role assistant.",
            )
        return self._reader(tools), merged[: answers[-1] + 1]

    def _reader(self, tools: Tools) -> TurnReader:
        if tools:
            return self._new_reader(tools)
        if not hasattr(self, "_plain_reader"):
            self._plain_reader = self._new_reader(None)
        return self._plain_reader

    def _new_reader(self, tools: Tools) -> TurnReader:
        return TurnReader(
            partial(self._render, tools),
            end_of_turn_texts=self.end_of_turn_texts,
            eos_text=self.eos_text,
            closes_conversations=self.source == "jinja",
        )

    def _render(self, tools: Tools, messages: Sequence[Message], is_prompt: bool) -> str:
        if self._go is not None:
            text = self._go.render(messages, tools, think=self.think, today=self.today)
        else:
            text = self._jinja.render(messages, tools, add_generation_prompt=is_prompt)
        if self.adds_bos and self.bos_text:
            text = text.removeprefix(self.bos_text)
        return text


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    """Messages whose roles are known and whose merging loses nothing. Raises InputError."""
    previous: Message | None = None
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise InputError(
                f"Message {number} has role {message.role!r}; expected one of {', '.join(ROLES)}."
                f"{did_you_mean(message.role, ROLES)}"
            )
        follows_itself = previous is not None and previous.role == message.role == "assistant"
        if follows_itself and (message.tool_calls or message.thinking):
            raise InputError(
                f"Messages {number - 1} and {number} are both from the assistant, and merging them would lose "
                "tool calls or thinking.",
                hint="Put a tool or user message between them.",
            )
        previous = message
    return messages


def load_chat_template(
    go_text: str | None = None,
    jinja_text: str | None = None,
    bos_text: str = "",
    eos_text: str = "",
    *,
    adds_bos: bool = False,
    end_of_turn_texts: Sequence[str] = (),
    today: datetime.date = DEFAULT_DATE,
    think: bool | None = None,
) -> ChatTemplate:
    """The template that decides: the Ollama model's Go TEMPLATE where there is one, else the GGUF's Jinja.

    `end_of_turn_texts` are the texts of the tokenizer's end-of-generation tokens. `today` is the date templates see, by
    default a fixed one so that renderings do not change from day to day. `think` is the request's field of that name.
    Raises InputError where neither text is given or the template cannot be parsed.
    """
    if not go_text and not jinja_text:
        raise InputError(
            "The base model has no chat template, neither a TEMPLATE layer nor tokenizer.chat_template.",
            hint="Name one in the configuration, or train on plain text (continued pre-training).",
        )
    return ChatTemplate(
        "go" if go_text else "jinja",
        go_text or jinja_text or "",
        bos_text=bos_text,
        eos_text=eos_text,
        adds_bos=adds_bos,
        end_of_turn_texts=end_of_turn_texts,
        today=today,
        think=think,
    )
