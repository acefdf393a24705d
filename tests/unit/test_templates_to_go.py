"""TEMPLATEs written for Ollama. All families' real templates are in tests/parity."""

from __future__ import annotations

import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base.errors import InputError
from ollatune.templates import Message, jinja, load_chat_template, to_go_template
from ollatune.templates.ollama_render import OllamaTemplate
from ollatune.templates.probes import probe_conversations

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TRIMMED = TURN.replace("m.content", "m.content | trim") + PROMPT


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process: what it does has tests of its own."""
    monkeypatch.setattr(jinja, "_child_refusal", lambda request: "")


def test_a_go_template_stays_as_it_is() -> None:
    text = "{{ range .Messages }}<{{ .Role }}>{{ .Content }}</s>{{ end }}<assistant>"
    conversion = to_go_template(load_chat_template(text))
    assert conversion.text == text
    assert conversion.stops == ("</s>",)
    assert conversion.num_probes == len(probe_conversations())


def test_a_literal_bos_is_dropped_from_a_go_template_where_the_tokenizer_adds_it() -> None:
    text = "<s>{{ range .Messages }}<{{ .Role }}>{{ .Content }}</s>{{ end }}<assistant>"
    added = to_go_template(load_chat_template(text, bos_text="<s>", adds_bos=True))
    assert added.text == text.removeprefix("<s>")
    assert to_go_template(load_chat_template(text, bos_text="<s>")).text == text


def test_stops_are_the_end_of_turn_and_what_is_asked_for() -> None:
    template = load_chat_template(jinja_text=TURN + PROMPT, end_of_turn_texts=["<|x|>"])
    assert to_go_template(template).stops == ("</s>", "<|x|>")
    assert to_go_template(template, stop_texts=["<user>", "</s>"]).stops == ("</s>", "<user>")


def test_literal_text_that_go_or_a_modelfile_would_not_keep() -> None:
    jinja_text = (
        "{{ '{{x}} {' }}\u00a0{% for m in messages %}<{{ m.role }}>{{ '{' }}{{ m.content }}{{ '}' }}</s>{% endfor %}"
        + PROMPT
    )
    template = load_chat_template(jinja_text=jinja_text)
    conversion = to_go_template(template)
    assert "\u00a0" not in conversion.text
    message = [Message("user", "{{ .System }}")]
    expected = "{{x}} {\u00a0<user>{{{ .System }}}</s><assistant>"
    assert OllamaTemplate(conversion.text).render(message) == expected


SPACES = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from(SPACES), st.sampled_from("aé日👩\u200b\u0084\u2011")), max_size=8
    ).map("".join)
)
def test_the_trim_written_for_go_is_pythons(text: str) -> None:
    prompt = trimmed_go().render([Message("user", text)])
    assert prompt == f"<user>{text.strip()}</s><assistant>"


@cache
def trimmed_go() -> OllamaTemplate:
    return OllamaTemplate(to_go_template(load_chat_template(jinja_text=TRIMMED)).text)


def test_every_white_space_character_is_trimmed() -> None:
    for space in SPACES:
        prompt = trimmed_go().render([Message("user", f"{space}a{space}b{space}")])
        assert prompt == f"<user>a{space}b</s><assistant>"


def test_long_white_space_is_trimmed() -> None:
    prompt = trimmed_go().render([Message("user", " \n" * 100 + "a" + "\n" * 200)])
    assert prompt == "<user>a</s><assistant>"


def test_a_template_that_no_go_template_equals_is_refused_with_the_probe() -> None:
    template = load_chat_template(
        jinja_text=TURN.replace("m.content", "m.content | upper") + PROMPT
    )
    with pytest.raises(InputError) as caught:
        to_go_template(template)
    assert "leaves out a message" in str(caught.value)
    odd = (
        TURN.replace("{{ m.content }}", "{{ m.content }}{{ '!' if 'Hello' in m.content }}") + PROMPT
    )
    with pytest.raises(InputError) as caught:
        to_go_template(load_chat_template(jinja_text=odd))
    assert "For the conversation [user: 'Hello']" in str(caught.value)
    assert "'!</s><assistant>'" in str(caught.value)


def test_a_template_that_refuses_most_conversations_is_refused() -> None:
    picky = "{% if 'Zq' not in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    picky += TURN + PROMPT
    with pytest.raises(
        InputError, match="accepts 0 of the probe conversations; expected at least 20"
    ):
        to_go_template(load_chat_template(jinja_text=picky))


def test_a_later_system_message_is_left_out_where_the_template_leaves_it_out() -> None:
    text = TURN.replace("<{{", "{% if m.role != 'system' or loop.first %}<{{").replace(
        "</s>", "</s>{% endif %}"
    )
    template = load_chat_template(jinja_text=text + PROMPT)
    later = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("system", "s"),
        Message("user", "c"),
    ]
    expected = "<user>a</s><assistant>b</s><user>c</s><assistant>"
    assert OllamaTemplate(to_go_template(template).text).render(later) == expected


THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and SHOWN %}<think>{{ m.reasoning_content }}</think>"
    "{% elif m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("shown", ["true", "loop.last"])
def test_thinking_can_be_switched_as_in_the_jinja(shown: str) -> None:
    template = load_chat_template(jinja_text=THINKING.replace("SHOWN", shown))
    go = OllamaTemplate(to_go_template(template).text)
    assert go.supports_thinking
    history = [Message("user", "a"), Message("assistant", "b", thinking="t"), Message("user", "c")]
    for think in (None, True, False):
        assert go.render(history, think=think) == template.with_think(think).render_prompt(history)
    assert go.render(history, think=False).endswith("<assistant><think></think>")


def test_a_model_trained_without_thinking_is_served_without_a_switch() -> None:
    template = load_chat_template(jinja_text=THINKING.replace("SHOWN", "true"), think=False)
    go = OllamaTemplate(to_go_template(template).text)
    assert not go.supports_thinking
    assert go.render([Message("user", "a")]) == "<user>a</s><assistant><think></think>"
