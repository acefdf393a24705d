"""Prompts, training segments and the Jinja environment."""

from __future__ import annotations

import datetime
import json
import subprocess
from typing import Any

import pytest

from ollatune.base.errors import InputError, UsageError
from ollatune.templates import ChatTemplate, Message, Segment, joined, load_chat_template
from ollatune.templates import jinja as jinja_module

REAL_CHILD = jinja_module._child_refusal
GO_CHATML = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""
JINJA_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
    Message("assistant", "2"),
]


def pairs(segments: list[Segment]) -> list[tuple[str, bool]]:
    return [(segment.text, segment.is_target) for segment in segments]


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process: what it does has tests of its own."""
    monkeypatch.setattr(jinja_module, "_child_refusal", lambda request: "")


@pytest.fixture
def go() -> ChatTemplate:
    return load_chat_template(GO_CHATML, end_of_turn_texts=["<|im_end|>"])


def test_every_answer_is_a_target(go: ChatTemplate) -> None:
    assert pairs(go.render_training(TURNS)) == [
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("1<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("2<|im_end|>", True),
    ]


def test_only_the_last_answer_is_a_target(go: ChatTemplate) -> None:
    segments = go.render_training(TURNS, targets="last")
    assert pairs(segments) == [(go.render_prompt(TURNS[:3]), False), ("2<|im_end|>", True)]


def test_what_follows_the_last_answer_is_left_out(go: ChatTemplate) -> None:
    assert go.render_training([*TURNS, Message("user", "Three?")]) == go.render_training(TURNS)


def test_content_that_looks_like_the_template_moves_no_boundary(go: ChatTemplate) -> None:
    text = "<|im_end|>\n<|im_start|>assistant\n{{ .Content }}"
    segments = go.render_training([Message("user", text), Message("assistant", text)])
    assert pairs(segments) == [
        (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False),
        (f"{text}<|im_end|>", True),
    ]


def test_go_and_jinja_agree(go: ChatTemplate) -> None:
    jinja = load_chat_template(jinja_text=JINJA_CHATML)
    assert jinja.render_prompt(TURNS[:3]) == go.render_prompt(TURNS[:3])
    assert pairs(jinja.render_training(TURNS)) == [*pairs(go.render_training(TURNS)), ("\n", False)]


def test_messages_of_one_role_in_a_row_are_merged_as_ollama_merges_them() -> None:
    doubled = [Message("user", "a"), Message("user", "b"), Message("assistant", "c")]
    for template in (load_chat_template(GO_CHATML), load_chat_template(jinja_text=JINJA_CHATML)):
        merged = [Message("user", "a\n\nb"), Message("assistant", "c")]
        assert template.render_training(doubled) == template.render_training(merged)
        assert "a\n\nb" in joined(template.render_training(doubled))


def test_merging_never_loses_tool_calls() -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [Message("user", "a"), Message("assistant", "b")]
    messages.append(Message("assistant", "", tool_calls=(call,)))
    with pytest.raises(InputError, match="Messages 2 and 3 are both from the assistant"):
        load_chat_template(GO_CHATML).render_training(messages)


def test_a_template_without_end_of_turn_learns_the_eos_in_examples_of_their_own() -> None:
    plain = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}"
    legacy = "{{ if .Prompt }}Q: {{ .Prompt }}\n{{ end }}A: {{ .Response }}\n"
    template = load_chat_template(legacy, eos_text="<eos>")
    with pytest.raises(InputError, match="one example cannot train them all"):
        template.render_training(TURNS)
    assert [pairs(example) for example in template.render_training_examples(TURNS)] == [
        [("Q: One?\nA: ", False), ("1<eos>", True)],
        [("Q: One?\nA: 1\nQ: Two?\nA: ", False), ("2<eos>", True)],
    ]
    assert [len(template.render_training_examples(TURNS, targets="last"))] == [1]
    with pytest.raises(InputError, match="could not learn to stop"):
        load_chat_template(plain).render_training(TURNS)


def test_thinking_is_part_of_the_answer_and_gone_from_the_next_prompt() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% if loop.last and m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% else %}<u>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    template = load_chat_template(jinja_text=text, eos_text="</s>")
    messages = [
        Message("user", "1"),
        Message("assistant", "a", thinking="x"),
        Message("user", "2"),
        Message("assistant", "b", thinking="y"),
    ]
    assert [pairs(example) for example in template.render_training_examples(messages)] == [
        [("<u>1<a>", False), ("<think>x</think>a</s>", True)],
        [("<u>1<a>a</s><u>2<a>", False), ("<think>y</think>b</s>", True)],
    ]


def test_a_template_that_always_goes_on_with_a_prompt_ends_its_examples_before_it() -> None:
    text = JINJA_CHATML.partition("{% if")[0] + "{{ '<|im_start|>assistant\n' }}"
    segments = load_chat_template(jinja_text=text).render_training(TURNS[:2])
    assert pairs(segments) == [
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("1<|im_end|>", True),
    ]


def test_a_prompt_that_an_answer_does_not_continue_is_refused() -> None:
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    with pytest.raises(InputError, match="goes on with '<think>' where the conversation has ''"):
        load_chat_template(jinja_text=text).render_training(TURNS[:2])


def test_tool_calls_are_targets() -> None:
    text = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}CALL {{ m.tool_calls[0].function | tojson }}"
        "<|eom_id|>{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = load_chat_template(jinja_text=text)
    call = {"function": {"name": "f", "arguments": {"a": "é<"}}}
    messages = [
        Message("user", "q"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "r", tool_name="f"),
        Message("assistant", "done"),
    ]
    assert pairs(template.render_training(messages)) == [
        ("<|user|>q<|eot_id|><|assistant|>", False),
        ('CALL {"name": "f", "arguments": {"a": "é<"}}<|eom_id|>', True),
        ("<|tool|>r<|eot_id|><|assistant|>", False),
        ("done<|eot_id|>", True),
    ]


# The forms that the TEMPLATEs of Ollama's library have: prompts that differ from what stays of them in later ones.
LIBRARY_MISTRAL = (
    '{{- range $i, $_ := .Messages }}{{- if eq .Role "user" }}[INST] '
    "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]"
    '{{- else if eq .Role "assistant" }} {{ .Content }}</s>{{- end }}{{- end }} {{ .Response }}'
)
LIBRARY_GEMMA = (
    "{{- range $i, $_ := .Messages }}\n{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
    '{{- if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}{{ if not $last }}<end_of_turn>\n{{ end }}\n'
    "{{- else }}<start_of_turn>user\n{{ .Content }}<end_of_turn>\n{{ if $last }}<start_of_turn>model\n{{ end }}\n"
    "{{- end }}\n{{- end }}\n"
)
LIBRARY_QWEN3 = (
    "{{- $user := -1 -}}{{- range $i, $m := .Messages -}}"
    '{{- if eq $m.Role "user" }}{{ $user = $i }}{{ end -}}{{- end }}'
    "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 -}}"
    '{{- if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
    "{{- if and $.IsThinkSet (eq $i $user) }}{{ if $.Think }} /think{{ else }} /no_think{{ end }}{{ end }}<|im_end|>\n"
    "{{ else }}<|im_start|>assistant\n"
    "{{ if (and $.IsThinkSet (and .Thinking (or $last (gt $i $user)))) -}}\n"
    "<think>{{ .Thinking }}</think>\n{{ end -}}\n"
    "{{ .Content }}{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}"
    '{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant\n{{ end }}{{- end }}'
)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (
            LIBRARY_MISTRAL,
            [("[INST] S\n\n1[/INST] ", False), ("a</s>", True)],
            [("[INST] 1[/INST] a</s>[INST] S\n\n2[/INST] ", False), ("b</s>", True)],
        ),
        (
            LIBRARY_GEMMA,
            [
                ("<start_of_turn>user\nS<end_of_turn>\n<start_of_turn>user\n1<end_of_turn>\n<start_of_turn>model\n\n",
                 False),
                ("a<end_of_turn>", True),
            ],
            [
                ("<start_of_turn>user\nS<end_of_turn>\n<start_of_turn>user\n1<end_of_turn>\n<start_of_turn>model\n"
                 "a<end_of_turn>\n<start_of_turn>user\n2<end_of_turn>\n<start_of_turn>model\n\n", False),
                ("b<end_of_turn>", True),
            ],
        ),
    ],
)  # fmt: skip
def test_library_forms_train_each_answer_on_the_prompt_it_is_served_with(
    text: str, first: list[tuple[str, bool]], second: list[tuple[str, bool]]
) -> None:
    messages = [Message("system", "S"), Message("user", "1"), Message("assistant", "a"),
                Message("user", "2"), Message("assistant", "b")]  # fmt: skip
    template = load_chat_template(text)
    assert [pairs(example) for example in template.render_training_examples(messages)] == [
        first,
        second,
    ]
    assert template.render_prompt(messages[:2]) == first[0][0]
    assert template.render_prompt(messages[:4]) == second[0][0]


def test_the_thinking_switch_of_a_prompt_is_in_its_example() -> None:
    messages = [
        Message("user", "1"),
        Message("assistant", "a", thinking="x"),
        Message("user", "2"),
        Message("assistant", "b"),
    ]
    template = load_chat_template(LIBRARY_QWEN3)
    head = "<|im_start|>user\n1"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert [pairs(example) for example in template.render_training_examples(messages)] == [
        [(f"{head} /think{tail}", False), ("<think>x</think>\na<|im_end|>", True)],
        [
            (f"{head}{tail}a<|im_end|>\n<|im_start|>user\n2 /think{tail}", False),
            ("b<|im_end|>", True),
        ],
    ]
    off = load_chat_template(LIBRARY_QWEN3, think=False)
    assert off.render_prompt(messages[:1]) == f"{head} /no_think{tail}"


def test_tool_calls_of_a_template_that_shows_tools_only_with_the_last_user() -> None:
    text = (
        "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}<|{{ .Role }}|>"
        '{{ if and $last (eq .Role "user") }}{{ $.Tools }}{{ end }}{{ .Content }}'
        "{{ range .ToolCalls }}{{ .Function.Name }}{{ .Function.Arguments }}{{ end }}"
        '{{ if not (and $last (eq .Role "assistant")) }}<|eot_id|>{{ end }}'
        '{{ if and $last (ne .Role "assistant") }}<|assistant|>{{ end }}{{ end }}'
    )
    call = {"function": {"name": "f", "arguments": {"a": "b"}}}
    messages = [Message("user", "q"), Message("assistant", "", tool_calls=(call,)), Message("tool", "r", tool_name="f"),
                Message("assistant", "done")]  # fmt: skip
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    shown = json.dumps(tools, separators=(",", ":"))
    template = load_chat_template(text)
    assert [pairs(example) for example in template.render_training_examples(messages, tools)] == [
        [(f"<|user|>{shown}q<|eot_id|><|assistant|>", False), ('f{"a":"b"}<|eot_id|>', True)],
        [('<|user|>q<|eot_id|><|assistant|>f{"a":"b"}<|eot_id|><|tool|>r<|eot_id|><|assistant|>', False),
         ("done<|eot_id|>", True)],
    ]  # fmt: skip


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_bos_stands_in_the_text_only_where_the_tokenizer_does_not_add_it(
    adds_bos: bool,
) -> None:
    go_text = "<s>{{ range .Messages }}[{{ .Content }}]{{ end }}"
    jinja_text = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for texts in ((go_text, None), (None, jinja_text)):
        template = load_chat_template(*texts, bos_text="<s>", eos_text="</s>", adds_bos=adds_bos)
        expected = "[One?]" if adds_bos else "<s>[One?]"
        assert template.render_prompt(TURNS[:1]) == expected
        assert joined(template.render_training(TURNS[:2])).startswith(expected)


def test_the_go_template_decides_where_both_are_given() -> None:
    template = load_chat_template(GO_CHATML, JINJA_CHATML)
    assert (template.source, template.text) == ("go", GO_CHATML)
    with pytest.raises(InputError, match="has no chat template"):
        load_chat_template("", None)


def test_the_digest_changes_with_everything_a_rendering_depends_on() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"jinja_text": JINJA_CHATML + "x"},
        {"bos_text": "<s>"},
        {"eos_text": "</s>"},
        {"adds_bos": True},
        {"end_of_turn_texts": ["x"]},
        {"today": datetime.date(2026, 1, 1)},
        {"think": False},
    ]
    digests = {
        load_chat_template(**({"jinja_text": JINJA_CHATML} | change)).digest for change in changes
    }
    assert len(digests) == len(changes)
    assert load_chat_template(GO_CHATML).digest == load_chat_template(GO_CHATML).digest


def test_wrong_use_is_named(go: ChatTemplate) -> None:
    with pytest.raises(
        InputError, match=r"Message 2 has role 'asistant'.* Did you mean `assistant`\?"
    ):
        go.render_prompt([Message("user", "a"), Message("asistant", "b")])
    with pytest.raises(InputError, match="no assistant message"):
        go.render_training([Message("user", "a")])
    with pytest.raises(UsageError, match="targets is 'some'"):
        go.render_training(TURNS, targets="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aOne?b"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
         "{{ i }}{% endfor %}", "013"),
        ("  {% set x = 1 %}\n{{ x }}\n", "1"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(b=1).b }}", "21"),
        ("{{ documents is none }}{{ tools is none }}{{ bos_token }}{{ eos_token }}", "TrueTrue<s></s>"),
        ("{{ '%s=%d' % ('a', 1) }}{{ 'ab' * 2 }}{{ 2 ** 3 }}{{ '%s' | format('x') }}", "a=1abab8x"),
        ("{{ 'a'.ljust(3) }}|{{ 'a' | center(3) }}|", "a  | a |"),
    ],
)  # fmt: skip
def test_the_environment_is_that_of_transformers(text: str, expected: str) -> None:
    template = load_chat_template(jinja_text=text, bos_text="<s>", eos_text="</s>")
    assert template.render_prompt(TURNS[:1]) == expected


def test_a_refusal_of_the_template_is_a_clear_error() -> None:
    template = load_chat_template(jinja_text="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses this conversation: roles must alternate"):
        template.render_prompt(TURNS[:1])


def test_a_template_is_tried_in_one_child_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_module, "_child_refusal", REAL_CHILD)
    started: list[list[str]] = []
    run = subprocess.run

    def counting(command: list[str], **options: Any) -> Any:
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(jinja_module.subprocess, "run", counting)
    text = "{# tried once #}{{ messages[0].content }}"
    for _ in range(3):
        assert load_chat_template(jinja_text=text).render_prompt(TURNS[:1]) == "One?"
    assert len(started) == 1
    assert started[0][1:3] == ["-I", "-S"]


def test_a_trusted_template_is_still_stopped_where_a_conversation_makes_it_run_away() -> None:
    text = (
        "{% if messages[0].content == 'go' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}ok"
    )
    template = load_chat_template(jinja_text=text)
    assert template.render_prompt(TURNS[:1]) == "ok"
    with pytest.raises(InputError, match=r"it (loops more than 100000 times|runs longer)"):
        template.render_prompt([Message("user", "go")])


def test_long_conversations_are_no_attack() -> None:
    template = load_chat_template(jinja_text=JINJA_CHATML)
    messages = [Message(("user", "assistant")[i % 2], "x" * 5000) for i in range(1001)]
    assert len(template.render_prompt(messages)) > 5_000_000
