"""Rendering: exact ids and masks, BOS once, EOS always, truncation that keeps the answer's end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base.errors import InputError
from ollatune.data.conversation import ChatMessage, Conversation, Document
from ollatune.data.position import Position, RecordError
from ollatune.data.render import Rendered
from ollatune.data.shown import Hidden
from ollatune.templates import load_chat_template
from tests.data_fakes import BOS, END, EOS, START, ByteTokenizer, ChatMLTemplate, make_renderer

HERE = Position("a.jsonl", 3)


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(ChatMessage(role, text) for role, text in turns))


def render(sample: Any, max_length: int = 4096, **settings: Any) -> Rendered:
    (rendered,) = make_renderer(max_length, **settings)(sample, HERE)
    return rendered


def text(rendered: Rendered) -> str:
    return ByteTokenizer().decode(rendered.example.token_ids)


def target_text(rendered: Rendered) -> str:
    example = rendered.example
    return ByteTokenizer().decode(example.token_ids[example.is_target])


QUESTION = chat(("user", "hi"), ("assistant", "yo"))


def test_exact_ids_and_mask() -> None:
    example = render(QUESTION).example
    prompt = [START, *b"user\nhi", END, *b"\n", START, *b"assistant\n"]
    assert example.token_ids.tolist() == [*prompt, *b"yo", END, *b"\n"]
    assert example.is_target.tolist() == [False] * len(prompt) + [True] * 3 + [False]
    assert example.token_ids.dtype == np.int32


@pytest.mark.parametrize("prefix", ["", "<s>", "<s><s>"])
def test_bos_stands_exactly_once(prefix: str) -> None:
    ids = render(QUESTION, add_bos=True, prefix=prefix).example.token_ids.tolist()
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert render(QUESTION).example.token_ids.tolist().count(BOS) == 0


def test_targets_all_or_last() -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert target_text(render(turns)) == "b<|im_end|>d<|im_end|>"
    assert target_text(render(turns, targets="last")) == "d<|im_end|>"


def test_answers_of_weight_zero_are_context() -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns.messages[1].is_trained = False
    assert target_text(render(turns)) == "d<|im_end|>"
    assert "b<|im_end|>" in text(render(turns))


def test_an_answer_without_end_of_generation_is_refused() -> None:
    with pytest.raises(RecordError, match=r"a\.jsonl:3: the rendered answer does not end"):
        render(QUESTION, end="")


def test_text_after_the_end_of_generation_is_no_target() -> None:
    assert target_text(render(QUESTION, end="<|im_end|>\n\n")) == "yo<|im_end|>"


def test_template_like_text_in_an_answer_is_counted() -> None:
    rendered = render(chat(("user", "a"), ("assistant", "b<|im_end|>c")))
    assert rendered.num_early_ends == 1
    assert target_text(rendered) == "b<|im_end|>c<|im_end|>"


def test_template_errors_get_the_position() -> None:
    class Refusing(ChatMLTemplate):
        def render_training_examples(
            self, messages: Any, tools: Any = None, targets: str = "all"
        ) -> Any:
            raise InputError("roles must alternate.", hint="Do so.")

    renderer = make_renderer()
    renderer.template = Refusing()
    with pytest.raises(RecordError, match=r"a\.jsonl:3: .*roles must alternate\. Do so\."):
        renderer(QUESTION, HERE)


def test_documents_get_bos_and_eos_and_no_special_parsing() -> None:
    example = render(Document("a</s>"), add_bos=True).example
    assert example.token_ids.tolist() == [BOS, *b"a</s>", EOS]
    assert example.is_target.tolist() == [False] + [True] * 6
    assert render(Document("ab", ends=False)).example.token_ids.tolist() == [*b"ab"]


def test_templates_that_hide_earlier_answers_give_one_example_each() -> None:
    class Hiding(ChatMLTemplate):
        """Shows earlier answers without their first letter, as reasoning templates drop thinking."""

        def render_training_examples(
            self, messages: Any, tools: Any = None, targets: str = "all"
        ) -> Any:
            answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
            shown = []
            for last in answers if targets == "all" else answers[-1:]:
                kept = [
                    ChatMessage(
                        m.role, m.content[1:] if m.role == "assistant" and i != last else m.content
                    )
                    for i, m in enumerate(messages[: last + 1])
                ]
                shown += super().render_training_examples(kept, tools, "last")
            return shown

    turns = chat(
        ("user", "a"),
        ("assistant", "Xb"),
        ("user", "c"),
        ("assistant", "Xd"),
        ("user", "e"),
        ("assistant", "Xf"),
    )
    renderer = make_renderer()
    renderer.template = Hiding()
    found = renderer(turns, HERE)
    assert [target_text(r) for r in found] == ["Xb<|im_end|>", "Xd<|im_end|>", "Xf<|im_end|>"]
    assert "assistant\nb<|im_end|>\n" in text(found[1])
    turns.messages[3].is_trained = False
    assert [target_text(r) for r in renderer(turns, HERE)] == ["Xb<|im_end|>", "Xf<|im_end|>"]


LONG = chat(("system", "S"), ("user", "begin " + "x" * 300 + " end"), ("assistant", "the answer"))


def test_middle_keeps_both_ends_of_the_context_and_the_markup() -> None:
    rendered = render(LONG, 120)
    assert len(rendered.example) <= 120
    assert rendered.is_truncated
    assert not rendered.is_answer_cut
    shown = text(rendered)
    assert shown.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nbegin x")
    assert " end<|im_end|>\n<|im_start|>assistant\nthe answer<|im_end|>\n" in shown
    assert target_text(rendered) == "the answer<|im_end|>"
    assert len(rendered.example) > 100  # no more is cut than has to be


def test_left_keeps_the_end_of_the_context() -> None:
    shown = text(render(LONG, 120, truncation="left"))
    assert shown.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nx")
    assert " end<|im_end|>" in shown


def test_left_drops_the_oldest_turns_first_as_the_server_does() -> None:
    turns = chat(
        ("system", "S"),
        ("user", "first " * 20),
        ("assistant", "one"),
        ("user", "second"),
        ("assistant", "two"),
    )
    rendered = render(turns, 100, truncation="left")
    assert text(rendered) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )


def test_an_answer_longer_than_everything_keeps_its_end_and_bos() -> None:
    turns = chat(("user", "q"), ("assistant", "a" * 200 + "Z"))
    rendered = render(turns, 50, add_bos=True)
    assert rendered.is_answer_cut
    ids = rendered.example.token_ids.tolist()
    assert len(ids) == 50
    assert ids[0] == BOS
    assert ids[-3:] == [ord("Z"), END, ord("\n")]
    assert rendered.example.is_target.tolist() == [False] + [True] * 48 + [False]


def test_the_first_token_of_a_cut_answer_is_no_target() -> None:
    """Nothing stands before it that it could be predicted from."""
    example = render(chat(("user", "q"), ("assistant", "a" * 200)), 50).example
    assert example.is_target.tolist() == [False] + [True] * 48 + [False]


def test_truncation_error_names_the_length() -> None:
    with pytest.raises(RecordError, match=r"a\.jsonl:3: \d+ tokens, at most 120 fit"):
        render(LONG, 120, truncation="error")


@pytest.mark.parametrize("where", ["middle", "left"])
def test_long_chats_lose_turns_or_context_but_no_answer_its_beginning(where: Any) -> None:
    turns = [
        t for i in range(40) for t in (("user", f"{i}: " + "q" * 60), ("assistant", f"a{i:02}."))
    ]
    # 40 answers with their markup and 16 characters of each question are longer than `left` leaves, and than 2800.
    rendered = render(chat(*turns), 600 if where == "left" else 2800, truncation=where)
    assert rendered.is_truncated
    assert not rendered.is_answer_cut
    shown = text(rendered)
    assert shown.startswith("<|im_start|>user\n")
    answers = target_text(rendered).removesuffix("<|im_end|>").split("<|im_end|>")
    assert answers == [f"a{i:02}." for i in range(40 - len(answers), 40)]
    if where == "middle":
        assert len(answers) == 40
    else:  # no turn more than has to be
        one_more = chat(*turns[-2 * (len(answers) + 1) :])
        assert len(render(one_more).example) > 600


def test_an_answer_of_weight_zero_cannot_be_the_only_one_learned() -> None:
    turns = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    turns.messages[3].is_trained = False
    with pytest.raises(
        RecordError, match=r"only the last answer is learned .*, and its weight is 0"
    ):
        render(turns, targets="last")


CHATML = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def served(jinja: str) -> Any:
    renderer = make_renderer()
    renderer.template = load_chat_template(jinja_text=jinja, end_of_turn_texts=["<|im_end|>"])
    return renderer


def test_what_the_template_does_not_show_is_told() -> None:
    sample = chat(("system", "Speak Latin only."), ("user", "Hi"), ("assistant", "Ave"))
    sample.messages[2].thinking = "A greeting."
    (rendered,) = served(CHATML)(sample, HERE)
    assert rendered.hidden == Hidden(system=True, thinking=True)
    with_system = CHATML.replace("{% if m.role != 'system' %}", "{% if true %}")
    sample.messages[2].thinking = ""
    (rendered,) = served(with_system)(sample, HERE)
    assert rendered.hidden == Hidden()
    with_system = with_system.replace(
        "m.content", "m.content if m.role == 'assistant' else m.content|upper"
    )
    (rendered,) = served(with_system)(sample, HERE)
    assert rendered.hidden == Hidden(system=True, turns=True)


def test_tools_and_calls_that_the_template_does_not_show_are_refused() -> None:
    call = ChatMessage("assistant", "", tool_calls=(CALL,))
    messages = (
        ChatMessage("user", "Weather?"),
        call,
        ChatMessage("tool", "Sunny", tool_name="weather"),
        ChatMessage("assistant", "Sunny."),
    )
    with pytest.raises(RecordError, match=r"a\.jsonl:3: the chat template has no place for tool c"):
        served(CHATML)(Conversation(messages), HERE)
    plain = (ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello"))
    with pytest.raises(RecordError, match="the chat template has no place for tools"):
        served(CHATML)(Conversation(plain, (TOOL,)), HERE)
    calls = "{% for c in m.tool_calls %}<call>{{ c.function.name }}{% endfor %}{{ m.content }}"
    shows_calls = CHATML.replace("{{ m.content }}", calls)
    (rendered,) = served(shows_calls)(Conversation(messages), HERE)
    assert target_text(rendered) == "<call>weather<|im_end|>Sunny.<|im_end|>"


def test_thinking_alone_that_the_template_does_not_show_is_no_answer() -> None:
    sample = Conversation((ChatMessage("user", "Hi"), ChatMessage("assistant", "", "Hm.")))
    with pytest.raises(RecordError, match="shows nothing of an answer"):
        served(CHATML)(sample, HERE)


roles = st.lists(
    st.tuples(st.text(max_size=60), st.text(min_size=1, max_size=60)), min_size=1, max_size=4
)


@settings(max_examples=50, deadline=None)
@given(
    exchanges=roles,
    max_length=st.integers(24, 200),
    where=st.sampled_from(["middle", "left"]),
    add_bos=st.booleans(),
)
def test_whatever_is_cut_the_answer_ends_and_something_is_learned(
    exchanges: list[tuple[str, str]], max_length: int, where: Any, add_bos: bool
) -> None:
    turns = [t for q, a in exchanges for t in (("user", q), ("assistant", a))]
    rendered = render(chat(*turns), max_length, truncation=where, add_bos=add_bos)
    example = rendered.example
    assert len(example) <= max_length
    assert example.num_targets >= 1
    last = np.flatnonzero(example.is_target)[-1]
    assert example.token_ids[last] == END
    assert not example.is_target[0]
    assert (example.token_ids == BOS).sum() == int(add_bos)
    whole = render(chat(*turns), 1 << 20, add_bos=add_bos)
    assert rendered.is_truncated == (len(whole.example) > max_length)
    if not rendered.is_truncated:
        assert example.token_ids.tolist() == whole.example.token_ids.tolist()


@pytest.mark.parametrize("where", ["middle", "left"])
@pytest.mark.parametrize("times", [1.01, 1.5, 3, 30, 300])
@pytest.mark.parametrize("letter", ["x", "日", " y"])
def test_what_is_cut_leaves_a_full_window(where: Any, times: float, letter: str) -> None:
    """However many times too long the record is, and however many tokens a character has."""
    size = 400
    question = letter * (int(times * size / len(letter.encode())) + 1)
    rendered = render(chat(("user", question), ("assistant", "ok")), size, truncation=where)
    assert rendered.is_truncated
    assert size * 0.97 <= len(rendered.example) <= size
