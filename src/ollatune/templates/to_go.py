"""An explicit Ollama TEMPLATE that renders exactly what was trained, and when a GGUF's own Jinja would win over it.

A Go template is kept as it is. For a Jinja template one is written from how it renders marks (`style`), and given out
only where it renders every probe conversation to the same bytes. Tools are never part of a written one: Jinja writes
JSON with blanks and Go without, so the two could not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ollatune.base.errors import InputError
from ollatune.base.text import printable
from ollatune.templates.chat import ChatTemplate
from ollatune.templates.go_writer import write_template
from ollatune.templates.messages import Message, shared_start
from ollatune.templates.ollama_render import OllamaTemplate
from ollatune.templates.probes import probe_conversations
from ollatune.templates.style import StyleReader
from ollatune.templates.turns import KNOWN_END_OF_TURN

_FEWEST_PROBES = 20

_FAMILIES = (  # the first whose texts all occur in a rendering
    ("llama3", ("<|start_header_id|>",)),
    ("chatml", ("<|im_start|>",)),
    ("gemma", ("<start_of_turn>",)),
    ("phi3", ("<|user|>", "<|end|>")),
    ("zephyr", ("<|user|>", "</s>")),
    ("llama2", ("[INST]", "<<SYS>>")),
    ("mistral", ("[INST]",)),
    ("alpaca", ("### Instruction:",)),
    ("neural-chat", ("### User:",)),
)


@dataclass(frozen=True)
class GoConversion:
    """A TEMPLATE for Ollama, its stop strings, the family it belongs to, and what a user should know about it."""

    text: str
    stops: tuple[str, ...]
    family: str
    num_probes: int
    notes: tuple[str, ...] = ()


def to_go_template(
    chat_template: ChatTemplate, *, stop_texts: Sequence[str] | None = None
) -> GoConversion:
    """The TEMPLATE that renders what `chat_template` renders, byte for byte on every probe conversation it accepts.

    `stop_texts` are further strings to stop at, by default the template's end-of-turn texts. Raises InputError that
    names the first probe that differs where no equal template was found.
    """
    notes: list[str] = []
    if chat_template.source == "go":
        text = _without_bos(chat_template)
    else:
        text = _written(chat_template, notes)
    num_probes = _verify(chat_template, text)
    if chat_template.source == "jinja" and OllamaTemplate(text).supports_thinking:
        num_probes += _verify(chat_template.with_think(False), text)
    sample = chat_template.render_prompt(probe_conversations()[2])
    family = next((name for name, texts in _FAMILIES if all(t in sample for t in texts)), "other")
    return GoConversion(text, _stops(chat_template, stop_texts), family, num_probes, tuple(notes))


def _written(chat_template: ChatTemplate, notes: list[str]) -> str:
    """A Go template written from the style of a Jinja template. Raises InputError where it has no known style."""
    texts = [*chat_template.end_of_turn_texts, chat_template.eos_text, *KNOWN_END_OF_TURN]
    try:
        without_thinking = chat_template.with_think(False).render_prompt
        style = StyleReader(chat_template.render_prompt, without_thinking, texts).read()
    except InputError as error:
        raise InputError(
            f"Cannot write this chat template as an Ollama TEMPLATE: {error.message}",
            hint="Train with the TEMPLATE of the same model from Ollama instead of the GGUF's Jinja.",
        ) from error
    if "tools" in chat_template.text:
        notes.append(
            "Tool definitions and calls are not part of the TEMPLATE; the GGUF's own template has them."
        )
    if style.system_place == "none":
        notes.append("The model's template takes no system message; the TEMPLATE leaves it out.")
    if "strftime_now" in chat_template.text:
        notes.append(
            f"The date in the TEMPLATE is the one trained with, {chat_template.today.isoformat()}."
        )
    if chat_template.think is False:
        # Trained with thinking switched off: the TEMPLATE must not show Ollama a switch, or it would be on by default.
        style = replace(style, thinking=None)
    return write_template(style)


def _without_bos(chat_template: ChatTemplate) -> str:
    """A Go TEMPLATE as it is, less a literal beginning-of-text token where the tokenizer adds that itself."""
    text = chat_template.text
    if chat_template.adds_bos and chat_template.bos_text:
        raw = OllamaTemplate(text).render(
            probe_conversations()[0], think=chat_template.think, today=chat_template.today
        )
        if raw.startswith(chat_template.bos_text):
            return text.replace(chat_template.bos_text, "", 1)
    return text


def _verify(chat_template: ChatTemplate, text: str) -> int:
    """The number of probe conversations that both render alike. Raises InputError at the first that they do not."""
    template = OllamaTemplate(text)
    num_equal = 0
    for conversation in probe_conversations():
        if chat_template.think is False and any(message.thinking for message in conversation):
            continue  # where thinking is off there is none to show
        try:
            expected = chat_template.render_prompt(conversation)
        except InputError:
            continue  # the model's own template refuses this one, so there is nothing to be equal to
        got = template.render(conversation, think=chat_template.think, today=chat_template.today)
        if got != expected:
            raise _differs(conversation, expected, got)
        num_equal += 1
    if num_equal < _FEWEST_PROBES:
        raise InputError(
            f"The chat template accepts {num_equal} of the probe conversations; expected at least {_FEWEST_PROBES}."
        )
    return num_equal


def _differs(conversation: Sequence[Message], expected: str, got: str) -> InputError:
    at = len(shared_start(expected, got))
    shown = ", ".join(
        f"{message.role}: {printable(message.content, limit=40)!r}" for message in conversation
    )
    return InputError(
        f"No Ollama TEMPLATE was found that renders what was trained. For the conversation [{shown}] the model's "
        f"template goes on at character {at} with {printable(expected[at : at + 40])!r}, the written one with "
        f"{printable(got[at : at + 40])!r}.",
        hint="Train with the TEMPLATE of the same model from Ollama instead of the GGUF's Jinja.",
    )


def _stops(chat_template: ChatTemplate, stop_texts: Sequence[str] | None) -> tuple[str, ...]:
    wanted = chat_template.end_of_turn_texts if stop_texts is None else stop_texts
    stops = [chat_template.end_of_turn().strip(), *wanted]
    return tuple(dict.fromkeys(text for text in stops if text))
