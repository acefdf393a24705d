"""Go's text/template as far as chat templates use it: results checked against what Go's own packages print."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base.errors import InputError
from ollatune.templates.go.executor import execute
from ollatune.templates.go.functions import BUILTINS, LAZY
from ollatune.templates.go.lexer import GoTemplateError
from ollatune.templates.go.parser import parse
from ollatune.templates.go.printf import quoted, sprintf
from ollatune.templates.go.values import Uint, printed, to_json

NAMES = {*BUILTINS, *LAZY}


def run(source: str, **data: Any) -> str:
    parsed = parse(source, NAMES)
    return execute(parsed.root, data, defined=parsed.defined, functions={})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a  {{- 1 }} b", "a1 b"),
        ("a \n{{- 1 -}} \n\t b", "a1b"),
        ("{{1 -}}   {{- 2}}", "12"),
        ("a {{/* no */}} b", "a  b"),
        ("a {{- /* no */ -}} b", "ab"),
        ("{{ -1 }}", "-1"),
        ("{{ 1 \n -}} b", "1b"),
        ("{{ $x := 0 }}{{ range .l }}{{ $x }}{{ $x := . }}{{ end }}", "0000"),
        ("{{ `a\nb` }}{{ \"\\u00e9\\x41\\n\" }}{{ 'a' }} {{ 0x1F }} {{ 1e3 }} {{ 1_000 }}", "a\nbéA\n97 31 1000 1000"),
        ("{{ true }} {{ and 1 0 2 }} {{ or 0 \"\" 3 }} {{ not 0 }}", "true 0 3 true"),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ $x := 3 }}{{ $x }}{{ end }}{{ $x }}", "32"),
        ("{{ if .a }}1{{ else if .b }}2{{ else }}3{{ end }}", "2"),
        ("{{ with .b }}{{ . }}{{ else }}no{{ end }}{{ with .a }}x{{ else with .b }}[{{ . }}]{{ end }}", "yes[yes]"),
        ("{{ range $k, $v := .m }}{{ $k }}={{ $v }};{{ else }}none{{ end }}", "a=1;b=2;"),
        ("{{ range .none }}x{{ else }}none{{ end }}", "none"),
        ("{{ range .l }}{{ if eq . 2 }}{{ continue }}{{ end }}{{ . }}{{ end }}", "134"),
        ("{{ range .l }}{{ if gt . 2 }}{{ break }}{{ end }}{{ . }}{{ end }}", "12"),
        ("{{ $n := 0 }}{{ range $n = .l }}{{ end }}{{ $n }}", "4"),
        ("{{ define \"t\" }}<{{ . }}{{ $ }}>{{ end }}{{ template \"t\" .b }}", "<yesyes>"),
        ("{{ block \"t\" .b }}[{{ . }}]{{ end }}{{ template \"t\" 1 }}", "[yes][1]"),
        ("{{ (index .l 1) }} {{ index .m \"b\" }} {{ (slice .l 1 3) }}", "2 2 [2 3]"),
        ("{{ slice .b 1 }} {{ index .b 0 }}", "es 121"),
        ("{{ len .b }} {{ len .l }} {{ .b | printf \"%s-%s\" .c }}", "3 4 é-yes"),
        ("{{ slice .c 0 2 }}{{ len .c }}", "é2"),
        ("{{ eq .b \"no\" \"yes\" }} {{ ne 1 2 }} {{ lt \"a\" \"b\" }}", "true true true"),
        ("{{ le 2 2 }} {{ ge 1.5 0.5 }}", "true true"),
        ("{{ eq (index .b 0) 121 }} {{ eq .missing \"x\" }} {{ eq nil nil }}", "true false true"),
        ("{{ .missing }} {{ .l }} {{ .m }} {{ .f }}", "<no value> [1 2 3 4] map[a:1 b:2] 1e+06"),
        ("{{ print \"a\" 1 2 \"b\" }}|{{ println 1 \"b\" }}|{{ html \"<a href='x'>&\\\"\" }}|{{ urlquery \"a b&ć\" }}",
         "a1 2b|1 b\n|&lt;a href=&#39;x&#39;&gt;&amp;&#34;|a+b%26%C4%87"),
        ("{{ $v := .missing }}{{ $v.Field }}", "<no value>"),
        ("{{ \"}}\" }}{{ \"{{\" }}", "}}{{"),
        ("{ {{ 1 }} } }}", "{ 1 } }}"),
    ],
)  # fmt: skip
def test_renders_what_go_renders(source: str, expected: str) -> None:
    assert run(source, a="", b="yes", c="é", l=[1, 2, 3, 4], m={"b": 2, "a": 1}, f=1e6) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ if .a }}", "template: :1: unexpected EOF"),
        ("\n\n{{ upper .a }}", 'template: :3: function "upper" not defined'),
        ("{{ $x }}", 'template: :1: undefined variable "$x"'),
        ("{{ end }}", "template: :1: unexpected {{end}}"),
        ("{{ .a", "template: :1: unclosed action"),
        ("{{ (.a }}", "template: :1: unclosed left paren"),
        ("{{ /* x */ }}", "template: :1: unrecognized character in action: U+002F '/'"),
        ("{{ /* x", "template: :1: unrecognized character"),
        ("{{/* x", "template: :1: unclosed comment"),
        ("{{/* x */ y}}", "template: :1: comment ends before closing delimiter"),
        ('{{ "a }}', "template: :1: unterminated quoted string"),
        ("{{ `a }}", "template: :1: unterminated raw quoted string"),
        ("{{ }}", "template: :1: missing value for command"),
        ("{{ if }}{{ end }}", "template: :1: missing value for if"),
        ("{{ 1 | 2 }}", "template: :1: non executable command in pipeline stage 2"),
        ("{{ break }}", "template: :1: {{break}} outside {{range}}"),
        ("{{ range $a, $b, $c := .x }}{{ end }}", "template: :1: too many declarations in range"),
        ("{{ $a, $b := .x }}", "template: :1: too many declarations in command"),
        ("{{ if .a }}{{ else }}{{ else }}{{ end }}", "template: :1: expected end; found {{else}}"),
        ("{{ 1.Field }}", "template: :1: "),
        ("{{ .a.b.$ }}", "template: :1: bad character U+0024 '$'"),
        ('{{ define "t" }}1{{ end }}{{ define "t" }}2{{ end }}', 'multiple definition of template "t"'),
        ("{{ range .x }}{{ else if .y }}{{ end }}", "template: :1: unexpected <if> in input"),
        ('{{ "\\q" }}', "template: :1: invalid syntax"),
    ],
)  # fmt: skip
def test_refuses_what_go_refuses_to_parse(source: str, message: str) -> None:
    with pytest.raises(GoTemplateError) as caught:
        parse(source, NAMES)
    assert message in str(caught.value)
    assert str(caught.value).startswith("template error: template: :")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ .s.Field }}", "can't evaluate field Field in type string"),
        ("{{ .missing.Field }}", "nil pointer evaluating interface {}.Field"),
        ("{{ index .l 9 }}", "index out of range: 9"),
        ("{{ index .l -1 }}", "index out of range: -1"),
        ("{{ slice .l 2 1 }}", "invalid slice index: 2 > 1"),
        ("{{ len 3 }}", "len of type int"),
        ("{{ eq 1 \"a\" }}", "incompatible types for comparison"),
        ("{{ eq 1 1.0 }}", "incompatible types for comparison"),
        ("{{ lt true false }}", "invalid type for comparison"),
        ("{{ eq .l .l }}", "non-comparable type slice"),
        ("{{ template \"none\" }}", 'template "none" not defined'),
        ("{{ .s 1 }}", "can't give argument to non-function"),
        ("{{ range .s }}{{ end }}", "range can't iterate over"),
        ("{{ range 3 }}{{ end }}", "range can't iterate over 3 in every version of Ollama"),
        ("{{ printf \"%d\" .s }}", "`%d` is not supported for the value it is given"),
        ("{{ printf \"%s %s\" .s }}", "`%s` is not supported"),
        ("{{ printf \"%s\" .s .s }}", "is given 2 values for 1 verbs"),
        ("{{ printf 1 }}", "expected string; got int"),
        ("{{ js .s }}", "calls `js`, which is not supported"),
        ("{{ not }}", "wrong number of args for not"),
        ("{{ and }}", "wrong number of args for and"),
        ("{{ define \"t\" }}{{ template \"t\" . }}{{ end }}{{ template \"t\" . }}", "calls itself too deeply"),
    ],
)  # fmt: skip
def test_refuses_what_go_refuses_to_execute(source: str, message: str) -> None:
    with pytest.raises(GoTemplateError) as caught:
        run(source, s="text", l=[1, 2, 3])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("%5d|%-5d|%05d|%+d|% d", [42, 42, 42, 42, 42], "   42|42   |00042|+42| 42"),
        ("%s|%10s|%-4s|%.2s", ["é", "ab", "ab", "abc"], "é|        ab|ab  |ab"),
        (
            "%q %q",
            ['a"\\\n\t\x01\u200d\u00a0é👩', "\U000e0001"],
            r'"a\"\\\n\t\x01\u200d\u00a0é👩" "\U000e0001"',
        ),
        ("%v %v %v %v", ["a", 1.5, True, [1, "b"]], "a 1.5 true [1 b]"),
        ("%x %X %x", ["hé", 255, 255], "68c3a9 FF ff"),
        ("%.2f %e %g", [3.14159, 1234.5, 1e21], "3.14 1.234500e+03 1e+21"),
        ("%c%%%t", [233, False], "é%false"),
    ],
)
def test_printf_is_gos(template: str, values: list[Any], expected: str) -> None:
    assert sprintf(template, values) == expected


def test_quoting_shows_bytes_that_are_no_text() -> None:
    assert quoted(b"a\xffb".decode("utf-8", "surrogateescape")) == '"a\\xffb"'


@pytest.mark.parametrize(
    ("value", "shown", "as_json"),
    [
        (0.0, "0", "0"),
        (-1.5, "-1.5", "-1.5"),
        (123456.0, "123456", "123456"),
        (1234567.0, "1.234567e+06", "1234567"),
        (1e20, "1e+20", "100000000000000000000"),
        (1e21, "1e+21", "1e+21"),
        (0.0001, "0.0001", "0.0001"),
        (0.00001, "1e-05", "0.00001"),
        (1e-7, "1e-07", "1e-7"),
        (1.5e-10, "1.5e-10", "1.5e-10"),
        (0.1, "0.1", "0.1"),
    ],
)
def test_floats_print_and_marshal_as_in_go(value: float, shown: str, as_json: str) -> None:
    assert printed(value) == shown
    assert to_json(value) == as_json


def test_json_is_gos() -> None:
    value = {
        "b<": ['a&b"\\\n\x01\u2028é', None, True, 1.0, Uint(7)],
        "a": {},
    }
    expected = '{"a":{},"b\\u003c":["a\\u0026b\\"\\\\\\n\\u0001\\u2028é",null,true,1,7]}'
    assert to_json(value) == expected


@given(st.text().filter(lambda text: "{{" not in text))
def test_text_without_actions_is_itself(text: str) -> None:
    assert run(text) == text


PIECES = st.sampled_from(
    ["{{", "}}", "{{-", "-}}", " ", "\n", ".a", ".", "$", "$x", ":=", "=", "|", "(", ")", ",", '"s"', "`r`", "1", "-1",
     "if", "else", "end", "range", "with", "define", "template", "block", "break", "continue", "len", "eq", "printf",
     "index", "slice", "text", "nil", "true", "'c'", "/*", "*/", "{", "}"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=25).map("".join))
def test_no_template_ends_in_anything_but_an_input_error(source: str) -> None:
    with contextlib.suppress(InputError):
        run(source, a=[1, 2])
