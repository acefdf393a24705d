"""Modelfiles: the grammar against a rune-by-rune port of Ollama's parser, and what render refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.base.errors import InputError
from ollatune.ollama.modelfile import INSTRUCTIONS, Command, Modelfile, sources
from ollatune.ollama.parameters import PARAMETER_KINDS, checked_parameters

HTTP_RECORDINGS = Path(__file__).parents[1] / "data" / "ollama-http.jsonl"


# --- the reference: a literal port of ParseFile, kept as close to the original's shape as Python allows ---


class Refused(Exception):
    pass


def is_alpha(r: str) -> bool:
    return "a" <= r <= "z" or "A" <= r <= "Z"


def transition(r: str, state: str) -> tuple[str, str]:
    blank, newline = r in (" ", "\t"), r in ("\r", "\n")
    if state == "nil":
        if r == "#":
            return "comment", ""
        return ("nil", "") if blank or newline else ("name", r)
    if state in ("name", "parameter", "message"):
        if is_alpha(r) or (state == "parameter" and ("0" <= r <= "9" or r == "_")):
            return state, r
        if blank:
            return "value", ""
        raise Refused(r)
    if state == "value":
        return ("nil", r) if blank or newline else ("value", r)
    return ("nil", "") if newline else ("comment", "")


def unquote(s: str) -> tuple[str, bool]:
    if len(s) >= 3 and s[:3] == '"""':
        if len(s) >= 6 and s[-3:] == '"""':
            return s[3:-3], True
        return "", False
    if len(s) >= 1 and s[0] == '"':
        if len(s) >= 2 and s[-1] == '"':
            return s[1:-1], True
        return "", False
    return s, True


def reference_parse(text: str) -> list[tuple[str, str, str]]:
    commands: list[tuple[str, str, str]] = []
    state, buffer, name, key = "nil", "", "", ""

    def finish() -> bool:
        value, closed = unquote(buffer.strip(" \t\r\n"))
        if closed:
            commands.append((name, key, value))
        return closed

    for character in text:
        following, r = transition(character, state)
        if following != state:
            if state == "name":
                if buffer.lower() not in INSTRUCTIONS:
                    raise Refused(buffer)
                name, key = buffer.lower(), ""
                if name in ("parameter", "message"):
                    following = name
            elif state == "parameter":
                key = buffer
            elif state == "message":
                if buffer not in ("system", "user", "assistant"):
                    raise Refused(buffer)
                key = buffer
            elif state == "value" and (r in (" ", "\t") or not finish()):
                buffer += r
                continue
            buffer, state = "", following
        if r and r.isprintable():
            buffer += r
    if state == "value":
        if not finish():
            raise Refused("open quotes")
    elif state not in ("comment", "nil"):
        raise Refused("unexpected end")
    # A parameter without a name parses, and is refused when the request is made from it.
    if any(name == "parameter" and not key for name, key, _ in commands):
        raise Refused("parameter without a name")
    if not any(name == "from" for name, _, _ in commands):
        raise Refused("no FROM line")
    return commands


def compare_with_reference(text: str) -> bool:
    try:
        expected = reference_parse(text)
    except Refused:
        with pytest.raises(InputError):
            Modelfile.parse(text)
        return False
    found = [
        (command.name, command.key, command.value) for command in Modelfile.parse(text).commands
    ]
    assert found == expected
    return True


PIECES = (
    "FROM ", "from x\n", "SYSTEM ", "TEMPLATE ", "PARAMETER ", "stop ", "MESSAGE ", "user ", "assistant ", "LICENSE ",
    "ADAPTER ./a\n", "RENDERER ", "#", "# c\n", '"', '""', '"""', "\n", "\r\n", "\r", " ", "\t", "  ", "a", "b c", "é",
    "\u200b", "\u00a0", "\x00", "\u3000", "1", "{{ .Prompt }}", "EMBED x\n", ":", "_",
)  # fmt: skip


def test_parses_as_the_original_does() -> None:
    generator = random.Random(3)
    num_accepted = 0
    for _ in range(2000):
        text = "".join(generator.choices(PIECES, k=generator.randrange(10)))
        text = generator.choice(("", "FROM m\n", "FROM m\n")) + text
        num_accepted += compare_with_reference(text)
    assert num_accepted > 350


@pytest.mark.parametrize(
    "text",
    [
        "\u200bFROM x\n",
        "\u200b\u200bFROM x\n",
        "FROM x\nPARAMETER  k v\n",
        "FROM x\nMESSAGE  user v\n",
        'FROM x\nSYSTEM """a"""b\nc"""\n',
        'FROM x\nSYSTEM "say "hi" now"\n',
        'FROM x\nSYSTEM """say "hi""""\n',
        "FROM x\nSYSTEM \n",
        "FROM x\nSYSTEM",
        "FROM x\nSYSTEM ",
        "FROM x # not a comment\n",
        "  FROM x",
        "FROM\tx\r\nSYSTEM y\r\n",
        'FROM x\nTEMPLATE """\n{{ .Prompt }}\r\n"""\r\n',
    ],
)
def test_corners_of_the_grammar(text: str) -> None:
    compare_with_reference(text)


# --- examples ---

SPECIFICATION_EXAMPLE = '''\
FROM llama3.2:8b

# Set parameters
PARAMETER temperature 0.7
PARAMETER top_p 0.9
PARAMETER top_k 40

# Set custom system message
SYSTEM """You are a helpful assistant trained on Ramsey data."""

# Add adapter weights (if using LoRA)
ADAPTER ./adapter_model
'''


def test_the_example_of_the_specification() -> None:
    modelfile = Modelfile.parse(SPECIFICATION_EXAMPLE)
    assert modelfile.source == "llama3.2:8b"
    assert modelfile.parameters == {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
    assert modelfile.system == "You are a helpful assistant trained on Ramsey data."
    assert modelfile.adapter == "./adapter_model"
    assert modelfile.template is None


def test_every_instruction() -> None:
    modelfile = Modelfile.parse(
        'from ./m.gguf\ndraft ./d.gguf\nTemplate {{ .Prompt }}\nLICENSE MIT\nlicense """Apache\n2"""\n'
        'PARAMETER stop <|im_end|>\nPARAMETER stop "</s>"\nPARAMETER use_mmap true\nPARAMETER mirostat 1\n'
        'MESSAGE user hi\nMESSAGE assistant """hel\nlo"""\nRENDERER qwen3\nPARSER qwen3\nREQUIRES 0.14.0\n'
    )
    assert modelfile.source == "./m.gguf"
    assert modelfile.template == "{{ .Prompt }}"
    assert modelfile.licenses == ("MIT", "Apache\n2")
    assert modelfile.parameters == {"stop": ["<|im_end|>", "</s>"], "use_mmap": True}
    assert modelfile.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hel\nlo"},
    )
    assert (modelfile.renderer, modelfile.parser, modelfile.requires) == (
        "qwen3",
        "qwen3",
        "0.14.0",
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_byte_order_marks(encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    modelfile = Modelfile.parse((mark + "FROM x\nSYSTEM größe\n").encode(encoding))
    assert (modelfile.source, modelfile.system) == ("x", "größe")


def test_invalid_utf8_becomes_the_replacement_character() -> None:
    assert Modelfile.parse(b"FROM x\nSYSTEM a\xffb\n").system == "a\ufffdb"


def test_the_last_of_several_wins() -> None:
    modelfile = Modelfile.parse("FROM a\nFROM b\nADAPTER 1\nADAPTER 2\nSYSTEM x\nSYSTEM y\n")
    assert (modelfile.source, modelfile.adapter, modelfile.system) == ("b", "2", "y")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Modelfile: no FROM line."),
        ("SYSTEM x\n", "Modelfile: no FROM line."),
        ("FROM x\nSYSTM y\n", "Modelfile:2: `SYSTM` is not an instruction. Did you mean SYSTEM?"),
        ("FROM x\nEMBED y\n", "Modelfile:2: `EMBED` is not an instruction. Known: FROM, ADAPTER,"),
        ("FROM x\r\n\r\nSYSTEM\r\n", "Modelfile:3: `SYSTEM\n` where an instruction"),
        (
            "FROM x\nMESSAGE tool hi\n",
            "Modelfile:2: message role `tool`, expected system, user, assistant.",
        ),
        ('FROM x\nSYSTEM """a\nb\n', "Modelfile:2: the quotes that begin here are not closed."),
        ("FROM x\nPARAMETER stop\n", "where a parameter's name, then a blank"),
        ("FROM", "where an instruction, then a blank and a value were expected"),
    ],
)
def test_errors_name_the_line(text: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Modelfile.parse(text)
    assert expected in str(caught.value).replace("\r", "\n").replace("\\x0d", "\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "temperatur 1",
            "Modelfile:2: unknown parameter `temperatur`. Did you mean `temperature`?",
        ),
        ("num_ctx many", "Modelfile:2: PARAMETER num_ctx is `many`, expected a whole number."),
        ("top_p x", "Modelfile:2: PARAMETER top_p is `x`, expected a number."),
        (
            "use_mmap perhaps",
            "Modelfile:2: PARAMETER use_mmap is `perhaps`, expected true or false.",
        ),
    ],
)
def test_parameters_are_checked(line: str, expected: str) -> None:
    modelfile = Modelfile.parse(f"FROM x\nPARAMETER {line}\n")
    with pytest.raises(InputError) as caught:
        _ = modelfile.parameters
    assert str(caught.value) == expected


def test_parameters_for_the_server() -> None:
    assert checked_parameters({"stop": "<|im_end|>", "num_ctx": 4096, "temperature": 0, "use_mmap": True}) == {
        "stop": ["<|im_end|>"], "num_ctx": 4096, "temperature": 0.0, "use_mmap": True,
    }  # fmt: skip
    assert checked_parameters({"stop": ["a", "b"]}) == {"stop": ["a", "b"]}
    with pytest.raises(InputError, match="unknown parameter `num_ctxx`"):
        checked_parameters({"num_ctxx": 1})
    with pytest.raises(InputError, match="expected a whole number"):
        checked_parameters({"num_ctx": 4096.5})


# --- writing ---

VALUES = st.text(
    st.one_of(
        st.sampled_from('"\n\r\t #{}<|>'),
        st.characters(codec="utf-8", exclude_categories=("Cs",)),
    ),
    max_size=30,
) | st.sampled_from(
    ['"""', '"', '""', 'a"""\nb', '"""\nFROM evil', "\n", "", " x ", 'say "hi"', '"a" b']
)
COMMANDS = st.one_of(
    st.builds(
        Command,
        st.sampled_from([name for name in INSTRUCTIONS if name not in ("parameter", "message")]),
        VALUES,
    ),
    st.builds(Command, st.just("parameter"), VALUES, st.sampled_from(sorted(PARAMETER_KINDS))),
    st.builds(
        Command, st.just("message"), VALUES, st.sampled_from(["system", "user", "assistant"])
    ),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(COMMANDS, max_size=4))
def test_what_is_written_reads_back_as_it_was(commands: list[Command]) -> None:
    modelfile = Modelfile((Command("from", "base"), *commands))
    try:
        text = modelfile.render(comment="made by a test\nFROM nothing")
    except InputError:
        return
    assert Modelfile.parse(text) == modelfile
    assert Modelfile.parse(text.encode()) == modelfile
    found = [(name, value) for name, _, value in reference_parse(text)]
    assert found == [(command.name, command.value) for command in modelfile.commands]


HOSTILE = [
    '"""\nFROM evil\n"""', '"', '""', '"""', '""""""', 'a"""', '"""a', 'x"""\nFROM evil', "\nFROM evil", "a\n",
    "\n\na", " lead", "trail ", "\ttab\t", "# comment", "a # b", "a\r\nb", "a\rb", '{{ if .System }}"{{ end }}',
    "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n", "", "\\n \\\" \\", "größe 日本語 🎉", "'single'", '"quoted"',
    "=1+1", "PARAMETER stop x", "${HOME} $(id)",
]  # fmt: skip


INEXPRESSIBLE = ['"""\nFROM evil\n"""', 'x"""\nFROM evil']


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize("instruction", ["system", "template", "license"])
def test_hostile_texts_come_back_unchanged_or_are_refused(instruction: str, text: str) -> None:
    modelfile = Modelfile((Command("from", "base"), Command(instruction, text)))
    if text in INEXPRESSIBLE:
        with pytest.raises(InputError, match="its quotes would end early, and Modelfiles have no"):
            modelfile.render()
    else:
        rendered = modelfile.render()
        assert reference_parse(rendered) == [("from", "", "base"), (instruction, "", text)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\u200bb", "U+200B"),
        ("a\u00a0b", "U+00A0"),
        ("\x1b[31m", "U+001B"),
        ("a\x00", "U+0000"),
        ("\u2028", "U+2028"),
    ],
)
def test_characters_that_would_be_dropped_are_refused(text: str, code: str) -> None:
    modelfile = Modelfile.build("base", system=text)
    with pytest.raises(
        InputError, match=f"Ollama's parser drops the character {code.replace('+', '.')}"
    ):
        modelfile.render()


def test_a_value_that_closes_its_own_quotes_is_refused() -> None:
    with pytest.raises(InputError, match="SYSTEM cannot be written in a Modelfile"):
        Modelfile.build("base", system='"x"""\ny').render()


def test_build_gives_the_text_a_person_would_write() -> None:
    modelfile = Modelfile.build(
        "./model.gguf",
        template="{{ .Prompt }}\n",
        system="Be brief.",
        parameters={
            "stop": ["<|im_end|>", "<|im_start|>"],
            "num_ctx": 4096,
            "temperature": 0.0,
            "use_mmap": False,
        },
        messages=[{"role": "user", "content": "hi"}],
        licenses=["MIT"],
        requires="0.14.0",
    )
    text = modelfile.render(comment="Written by Ollatune.")
    assert text == (
        '# Written by Ollatune.\n\nFROM ./model.gguf\nTEMPLATE """{{ .Prompt }}\n"""\n'
        'SYSTEM """Be brief."""\nREQUIRES 0.14.0\nPARAMETER stop <|im_end|>\nPARAMETER stop <|im_start|>\n'
        "PARAMETER num_ctx 4096\nPARAMETER temperature 0.0\nPARAMETER use_mmap false\nMESSAGE user hi\n"
        'LICENSE """MIT"""\n'
    )
    parsed = Modelfile.parse(text)
    assert parsed.parameters == {
        "stop": ["<|im_end|>", "<|im_start|>"], "num_ctx": 4096, "temperature": 0.0, "use_mmap": False,
    }  # fmt: skip


def recorded_show_answers() -> list[dict[str, Any]]:
    answers = []
    for line in HTTP_RECORDINGS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["path"] == "/api/show":
            answers += [
                json.loads(record[v]["body"])
                for v in ("0.24.0", "0.32.15")
                if record[v]["status"] == 200
            ]
    return answers


def test_modelfiles_of_real_servers() -> None:
    answers = recorded_show_answers()
    assert len(answers) == 6
    for answer in answers:
        modelfile = Modelfile.parse(answer["modelfile"])
        assert modelfile.template == answer["template"]
        assert (modelfile.system or "") == answer.get("system", "")
        assert "".join(modelfile.licenses) == answer.get("license", "")
        assert list(modelfile.messages) == answer.get("messages", [])
        assert modelfile.source.startswith("/models/blobs/sha256-")
        assert sources(answer["modelfile"]) == [modelfile.source]
        assert modelfile.parameters["stop"]


def test_sources_of_a_generated_modelfile() -> None:
    assert sources("") == []
    assert sources("# FROM x\nSYSTEM FROM\n") == []
    assert sources('from "/a b/c"\n') == ["/a b/c"]
    text = 'FROM /m\nFROM /n\nADAPTER /x\nADAPTER "/y z"\nTEMPLATE """\nADAPTER /none\n"""\n'
    assert sources(text) == ["/m", "/n"]
    assert sources(text, "ADAPTER") == ["/x", "/y z"]


def test_mutants_give_only_our_error() -> None:
    generator = random.Random(5)
    original = SPECIFICATION_EXAMPLE.encode()
    for _ in range(500):
        content = bytearray(original)
        for _ in range(generator.randrange(1, 6)):
            content[generator.randrange(len(content))] = generator.choice(
                b'"\n #\x00\xff\xfe aFROM'
            )
        try:
            Modelfile.parse(bytes(content)).render()
        except InputError:
            continue
