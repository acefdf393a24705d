"""An explicit Ollama TEMPLATE that renders exactly what was trained, and when a GGUF's own Jinja would win over it.

A Go template is kept as it is. For a Jinja template one is written from how it renders marks (`style`), and given out
only where it renders every probe conversation to the same bytes. Tools are never part of a written one: Jinja writes
JSON with blanks and Go without, so the two could not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ollatune.base.errors import InputError
from ollatune.base.text import printable
from ollatune.templates.chat import ChatTemplate
from ollatune.templates.go.printf import is_printable, quoted
from ollatune.templates.messages import Message
from ollatune.templates.ollama_render import OllamaTemplate
from ollatune.templates.probes import probe_conversations
from ollatune.templates.style import ChatStyle, StyleReader, Wrapper
from ollatune.templates.turns import KNOWN_END_OF_TURN

_FEWEST_PROBES = 12

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

# Python's str.strip and Jinja's trim remove these; Go's templates have no trim, but can look at bytes.
_ASCII_SPACE = "32 9 10 11 12 13 28 29 30 31"
_TWO_BYTE_SPACE = r'"\u0085" "\u00a0"'
_THREE_BYTE_SPACE = " ".join(
    f'"\\u{code:04x}"'
    for code in (0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
)
_TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $z := len (slice . 1) }}'
    f"{{{{ if eq (index . 0) {_ASCII_SPACE} }}}}"
    '{{ template "trim" (slice . 1) }}'
    f"{{{{ else if eq (index . $z) {_ASCII_SPACE} }}}}"
    '{{ template "trim" (slice . 0 $z) }}'
    "{{ else }}{{ $n := len . }}{{ $two := false }}{{ $three := false }}{{ $y := 0 }}{{ $x := 0 }}"
    "{{ if ge $n 2 }}{{ $y = len (slice . 2) }}"
    f"{{{{ $two = eq (slice . 0 2) {_TWO_BYTE_SPACE} }}}}{{{{ end }}}}"
    "{{ if ge $n 3 }}{{ $x = len (slice . 3) }}"
    f"{{{{ $three = eq (slice . 0 3) {_THREE_BYTE_SPACE} }}}}{{{{ end }}}}"
    '{{ if $two }}{{ template "trim" (slice . 2) }}'
    '{{ else if $three }}{{ template "trim" (slice . 3) }}'
    f'{{{{ else if and (ge $n 2) (eq (slice . $y) {_TWO_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 0 $y) }}}}'
    f'{{{{ else if and (ge $n 3) (eq (slice . $x) {_THREE_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 0 $x) }}}}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}{{ end }}"
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
    sample = chat_template.render_prompt(probe_conversations()[2])
    family = next((name for name, texts in _FAMILIES if all(t in sample for t in texts)), "other")
    return GoConversion(text, _stops(chat_template, stop_texts), family, num_probes, tuple(notes))


def _written(chat_template: ChatTemplate, notes: list[str]) -> str:
    """A Go template written from the style of a Jinja template. Raises InputError where it has no known style."""
    texts = [*chat_template.end_of_turn_texts, chat_template.eos_text, *KNOWN_END_OF_TURN]
    try:
        style = StyleReader(chat_template.render_prompt, texts).read()
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
        notes.append("The model's template refuses system messages; the TEMPLATE leaves them out.")
    if "strftime_now" in chat_template.text:
        notes.append(
            f"The date in the TEMPLATE is the one trained with, {chat_template.today.isoformat()}."
        )
    if "</think>" in chat_template.text:
        notes.append(
            "Thinking in earlier answers is shown as it is given; the GGUF's own template may remove it."
        )
    return write_template(style)


def write_template(style: ChatStyle) -> str:
    """`style` in Go's template language."""
    is_own = style.system_place == "own"
    later = style.later_system or style.system
    has_positions = style.system_place in ("first_user", "last_user") or (
        is_own and later != style.system
    )
    wrappers = (style.user, style.assistant, style.system, later)
    pieces = [_TRIM] if any(wrapper.is_trimmed for wrapper in wrappers) else []
    if has_positions or (is_own and style.opening):
        pieces.append("{{ $first := index .Messages 0 }}")
    opening = _literal(style.opening)
    if is_own and opening:
        opening = f'{{{{ if ne $first.Role "system" }}}}{opening}{{{{ end }}}}'
    pieces.append(opening)
    pieces.append("{{ range $i, $_ := .Messages }}" if has_positions else "{{ range .Messages }}")
    pieces.append('{{ if eq .Role "user" }}' + _user(style))
    pieces.append('{{ else if eq .Role "assistant" }}' + _wrapped(style.assistant))
    if is_own:
        test = (
            'eq .Role "system"' if style.writes_empty_system else 'and (eq .Role "system") .Content'
        )
        first = _wrapped(style.system)
        if later != style.system:
            first = f"{{{{ if eq $i 0 }}}}{first}{{{{ else }}}}{_wrapped(later)}{{{{ end }}}}"
        pieces.append(f"{{{{ else if {test} }}}}{first}")
    pieces.append("{{ end }}{{ end }}" + _literal(style.generation))
    return "".join(pieces)


def _user(style: ChatStyle) -> str:
    """A user's turn, with the system message inside the first or the last one where it belongs there."""
    before, _, after = _wrapped(style.user).partition(_content(style.user))
    inner = ""
    if style.system_place in ("first_user", "last_user"):
        is_there = (
            "eq $i 1" if style.system_place == "first_user" else "eq (len (slice $.Messages $i)) 1"
        )
        system = _wrapped(style.system, "$first.Content")
        inner = f'{{{{ if and (eq $first.Role "system") ({is_there}) }}}}{system}{{{{ end }}}}'
    return f"{before}{inner}{_content(style.user)}{after}"


def _wrapped(wrapper: Wrapper, content: str = ".Content") -> str:
    return _literal(wrapper.before) + _content(wrapper, content) + _literal(wrapper.after)


def _content(wrapper: Wrapper, content: str = ".Content") -> str:
    return f'{{{{ template "trim" {content} }}}}' if wrapper.is_trimmed else f"{{{{ {content} }}}}"


def _literal(text: str) -> str:
    """Text outside actions. Braces that would begin one, and what a Modelfile drops, stand in a string constant."""
    pieces = []
    for index, character in enumerate(text):
        is_brace = character == "{" and text[index + 1 : index + 2] in ("{", "")
        if is_brace or not (is_printable(character) or character in "\n\t"):
            pieces.append("{{ " + quoted(character) + " }}")
        else:
            pieces.append(character)
    return "".join(pieces)


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
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
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
