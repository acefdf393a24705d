"""What Ollama's server does around a template: turns, cutting, capabilities, tools, dates. The recordings of real
servers are in tests/parity; here is what they do not show."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from ollatune.base.errors import InputError
from ollatune.templates.messages import Message
from ollatune.templates.ollama_render import OllamaTemplate
from ollatune.templates.precedence import prefers_jinja

HELLO = [Message("user", "Hello")]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f<1>",
        "description": "d & e",
        "parameters": {
            "type": "object",
            "properties": {
                "z": {"type": ["string", "null"], "enum": [1, "a"]},
                "a": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
                "m": {"type": "object", "properties": {"y": {"type": "number"}, "b": {"type": "boolean"}}},
            },
        },
    },
}  # fmt: skip


def render(template: str, messages: list[Message] | None = None, **options: Any) -> str:
    return OllamaTemplate(template).render(messages or HELLO, **options)


def test_tools_print_as_go_marshals_them() -> None:
    function = (
        '{"type":"function","function":{"name":"f\\u003c1\\u003e","description":"d \\u0026 e","parameters":'
        '{"type":"object","properties":{"a":{"anyOf":[{"type":"integer"},{"type":"array","items":{"type":"string"}}]},'
        '"m":{"type":"object","properties":{"y":{"type":"number"},"b":{"type":"boolean"}}},'
        '"z":{"type":["string","null"],"enum":[1,"a"]}}}}}'
    )
    messages = "{{ range .Messages }}{{ end }}"
    assert render(messages + "{{ .Tools }}", tools=[TOOL]) == f"[{function}]"
    assert render(messages + "{{ range .Tools }}{{ . }}{{ end }}", tools=[TOOL]) == function
    assert render(messages + "{{ json .Tools }}", tools=[TOOL]) == f"[{function}]"


def test_a_parameters_type_is_a_list_that_prints_as_its_only_name() -> None:
    template = (
        "{{ range .Messages }}{{ end }}{{ range .Tools }}{{ range .Function.Parameters.Properties }}"
        "{{ .Type }}/{{ len .Type }}/{{ range .Type }}{{ . }}+{{ end }};{{ end }}{{ end }}"
    )
    assert render(template, tools=[TOOL]) == "/0/;object/1/object+;[string null]/2/string+null+;"


def test_typescript_types() -> None:
    template = (
        "{{ range .Messages }}{{ end }}{{ range .Tools }}"
        "{{ range $name, $p := .Function.Parameters.Properties }}{{ $name }}: {{ toTypeScriptType $p }}; {{ end }}"
        "{{ end }}"
    )
    expected = "a: number | any[]; m: Record<string, any>; z: string | null; "
    assert render(template, tools=[TOOL]) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ range .Messages }}{{ . }}{{ end }}", "prints a whole template.templateMessage"),
        ("{{ range .Messages }}{{ json . }}{{ end }}", "calls `json` on a whole template.templateMessage"),
        ("{{ range .Messages }}{{ .Name }}{{ end }}", "can't evaluate field Name in type template.templateMessage"),
        ("{{ range .Messages }}{{ slice .Content 1 }}{{ end }}", "cuts a character in two"),
        ('{{ define "a" }}{{ .Messages }}{{ end }}{{ template "a" }}', "undefined template specified"),
        ("{{ if .System }}{{ .Response }}{{ else }}{{ .Prompt }}{{ end }}", "Ollama itself fails on that"),
        ("{{ .Prompt }}{{ json .Prompt }}{{ .Response }}", '"json" is not a defined function'),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered_is_refused_by_name(template: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        render(template, [Message("user", "é")])
    assert message in str(caught.value)


def test_printing_a_tools_function_is_refused_because_versions_differ() -> None:
    template = "{{ range .Messages }}{{ end }}{{ range .Tools }}{{ .Function }}{{ end }}"
    with pytest.raises(InputError, match=r"prints a whole template\.templateToolFunction"):
        render(template, tools=[TOOL])


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"type": "function"}, 'expected {"type": "function"'),
        (
            {"function": {"parameters": {"properties": {"a": {"type": "object", "required": []}}}}},
            "`required` fields of its own",
        ),
    ],
)
def test_tools_that_cannot_be_shown_are_refused(tool: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        render("{{ range .Messages }}{{ end }}{{ .Tools }}", tools=[tool])
    assert message in str(caught.value)


def test_tool_call_arguments_must_be_an_object() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    with pytest.raises(InputError, match="Arguments given as a JSON string must be parsed first"):
        render("{{ range .Messages }}{{ end }}", [Message("assistant", "", tool_calls=(call,))])


def test_tool_calls_and_results() -> None:
    call = {"function": {"name": "f", "arguments": {"b": 1234567, "a": [1.5, None, True]}}}
    messages = [
        Message("assistant", "", tool_calls=(call, call)),
        Message("tool", "1", tool_name="f"),
        Message("tool", "2", tool_name="g"),
    ]
    template = (
        "{{ range .Messages }}{{ range .ToolCalls }}{{ .Function.Index }}{{ .Function.Name }}{{ .Function.Arguments }}"
        "{{ range $k, $v := .Function.Arguments }}{{ $k }}:{{ $v }} {{ end }}{{ end }}"
        "{{ .ToolName }}{{ .Content }};{{ end }}"
    )
    one = '0f{"a":[1.5,null,true],"b":1234567}a:[1.5 <nil> true] b:1.234567e+06 '
    assert render(template, messages) == f"{one}{one};f1;g2;"


def test_dates_are_those_given() -> None:
    template = (
        '{{ range .Messages }}{{ end }}{{ currentDate }} {{ yesterdayDate }} {{ currentDate "x" }}'
    )
    today = datetime.date(2026, 3, 1)
    assert render(template, today=today) == "2026-03-01 2026-02-28 2026-03-01"


def test_response_is_appended_only_where_nothing_else_shows_answers() -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert render("[{{ .Prompt }}]", turns) == "[a]b[c]"
    assert render("[{{ .Prompt }}]{{ .Response }}.", turns) == "[a]b.[c]"


LIST = "{{ range .Messages }}{{ .Content }}{{ end }}"
TOOLS = "{{ .Tools }}" + LIST
ROUND_TRIP = (
    TOOLS + '{{ range .Messages }}{{ .ToolCalls }}{{ if eq .Role "tool" }}x{{ end }}{{ end }}'
)
THINKING = "{{ range .Messages }}{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ end }}"
JINJA_TOOLS = "{% if tools %}{{ tools }}{% endif %}"
JINJA_ROUND_TRIP = (
    JINJA_TOOLS + "{{ message.tool_calls }}{% if message.role == 'tool' %}{% endif %}"
)
JINJA_THINKING = "{{ '<think>' }}{{ '</think>' }}"


@pytest.mark.parametrize(
    ("go", "jinja", "expected"),
    [
        (LIST, "", False),
        ("", "x", True),
        (LIST, "{{ messages }}", False),
        (LIST, JINJA_TOOLS, True),
        (LIST, "{{ tool_calls }}", True),
        (LIST, JINJA_THINKING, True),
        (LIST, "{{ '</think>' }}", False),
        (TOOLS, JINJA_TOOLS, False),
        (TOOLS, JINJA_ROUND_TRIP, True),
        (ROUND_TRIP, JINJA_ROUND_TRIP, False),
        (TOOLS, JINJA_THINKING, False),
        (TOOLS, JINJA_TOOLS + JINJA_THINKING, True),
        (ROUND_TRIP, JINJA_TOOLS + JINJA_THINKING, False),
        (ROUND_TRIP, JINJA_ROUND_TRIP + JINJA_THINKING, True),
        (THINKING, JINJA_THINKING, False),
        (THINKING + "{{ .Suffix }}", JINJA_TOOLS, False),
    ],
)
def test_whether_ollama_prefers_the_jinja(go: str, jinja: str, expected: bool) -> None:
    assert prefers_jinja(go, jinja) is expected
