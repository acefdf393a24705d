"""Jinja chat templates of every family in the catalog: rendered as Transformers renders them, cut at exact places, and
written as an Ollama TEMPLATE that renders the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from ollatune.base.errors import InputError
from ollatune.templates import ChatTemplate, Message, Segment, joined, load_chat_template
from ollatune.templates.jinja import message_variables
from ollatune.templates.messages import merge_consecutive
from ollatune.templates.ollama_render import OllamaTemplate
from ollatune.templates.to_go import to_go_template
from tests.assets import hf_tokenizer_dir, jinja_template

# As published with the models; too old or too small to be in the collections that tests/assets.py fetches.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
NEURAL_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '### System:\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Assistant:\n' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
ALPACA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n' }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral 7B 0.3, without its part about tools.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)

PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
    "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    text: Callable[[], str]
    bos: str
    eos: str
    adds_bos: bool
    name: str  # of the family, as a converted template reports it
    num_probes: int


def published(name: str) -> Callable[[], str]:
    def text() -> str:
        config = json.loads((hf_tokenizer_dir(name) / "tokenizer_config.json").read_bytes())
        return str(config["chat_template"])

    return text


def collected(file: str) -> Callable[[], str]:
    return lambda: jinja_template(file)


def given(text: str) -> Callable[[], str]:
    return lambda: text


BEGIN = "<|begin_of_text|>"
FAMILIES = {
    "chatml": Family(given(CHATML), "", "<|im_end|>", False, "chatml", 39),
    "smollm2": Family(given(SMOLLM2), "<|im_start|>", "<|im_end|>", False, "chatml", 39),
    "qwen2.5": Family(collected("Qwen-Qwen2.5-7B-Instruct.jinja"), "", "<|im_end|>", False, "chatml", 39),
    "qwen3": Family(collected("Qwen-Qwen3-0.6B.jinja"), "", "<|im_end|>", False, "chatml", 76),
    "llama3": Family(published("llama3"), BEGIN, "<|eot_id|>", True, "llama3", 39),
    "llama3.1": Family(
        collected("meta-llama-Llama-3.1-8B-Instruct.jinja"), BEGIN, "<|eot_id|>", True, "llama3", 39
    ),
    "llama3.2": Family(
        collected("meta-llama-Llama-3.2-3B-Instruct.jinja"), BEGIN, "<|eot_id|>", True, "llama3", 39
    ),
    "llama3.3": Family(
        collected("meta-llama-Llama-3.3-70B-Instruct.jinja"), BEGIN, "<|eot_id|>", True, "llama3", 39
    ),
    "gemma2": Family(collected("google-gemma-2-2b-it.jinja"), "<bos>", "<eos>", True, "gemma", 22),
    "gemma3": Family(published("gemma3"), "<bos>", "<end_of_turn>", True, "gemma", 37),
    "mistral": Family(given(MISTRAL), "<s>", "</s>", True, "mistral", 37),
    "mistral-nemo": Family(
        collected("mistralai-Mistral-Nemo-Instruct-2407.jinja"), "<s>", "</s>", True, "mistral", 37
    ),
    "phi3": Family(given(PHI3), "<s>", "<|endoftext|>", True, "phi3", 39),
    "phi3.5": Family(
        collected("microsoft-Phi-3.5-mini-instruct.jinja"), "<s>", "<|endoftext|>", True, "phi3", 39
    ),
    "zephyr": Family(given(ZEPHYR), "<s>", "</s>", True, "zephyr", 39),
    "tinyllama": Family(given(ZEPHYR), "<s>", "</s>", True, "zephyr", 39),
    "mistral-small": Family(
        collected("Mistral-Small-3.2-24B-Instruct-2506.jinja"), "<s>", "</s>", True, "mistral", 37
    ),
    "phi4": Family(given(PHI4), "<|endoftext|>", "<|im_end|>", False, "chatml", 39),
    "phi4-mini": Family(given(PHI4_MINI), "<|endoftext|>", "<|endoftext|>", False, "phi3", 39),
    "neural-chat": Family(given(NEURAL_CHAT), "<s>", "</s>", True, "neural-chat", 39),
    "alpaca": Family(given(ALPACA), "<s>", "</s>", True, "alpaca", 39),
}  # fmt: skip

S, U, A = "system", "user", "assistant"
ODD = (
    "Zażółć gęślą jaźń, 日本語, 👩‍👩‍👧 \u00a0 é",
    '{{ .Content }} {% if x %} {{"{{"}} {# no #} <|im_end|> <|eot_id|> </s> [INST] "q" \\n',
    "  blanks before, a line end after\n",
    "line\n\nline\n\n\n",
    "<start_of_turn>user\n<|user|> ### Instruction: %s %d {0}",
)
ROLES_AND_TEXTS: list[list[tuple[str, str]]] = [
    [(U, "Hello")],
    [(S, "Be brief."), (U, "Hello")],
    [(U, "One?"), (A, "1"), (U, "Two?")],
    [(S, "Count."), (U, "One?"), (A, "1"), (U, "Two?")],
    [(U, "1?"), (A, "1"), (U, "2?"), (A, "2"), (U, "3?"), (A, "3"), (U, "4?")],
    [(S, "s"), (U, "1?"), (A, "1"), (U, "2?"), (A, "2"), (U, "3?")],
    [(U, ""), (A, ""), (U, "x")],
    *([(U, odd)] for odd in ODD),
    *([(S, odd), (U, "Hello")] for odd in ODD),
    *([(S, odd), (U, odd), (A, odd), (U, odd)] for odd in ODD),
    *([(U, odd), (A, odd), (U, "Go on")] for odd in ODD),
    *([(U, "Hi"), (A, odd), (U, odd), (A, "Yes"), (U, "Go on")] for odd in ODD),
    [(U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e")],
    [(U, "Hi"), (A, "Hello"), (S, "Now in French."), (U, "Go on")],
]
CONVERSATIONS = [[Message(role, text) for role, text in turns] for turns in ROLES_AND_TEXTS]


# The others take the time of the whole suite together, and their templates seldom change.
EVERY_FAMILY = [
    pytest.param(
        name,
        marks=[]
        if name in ("smollm2", "llama3.2", "gemma3", "mistral-nemo")
        else [pytest.mark.slow],
    )
    for name in FAMILIES
]


@cache
def template_of(family_name: str) -> ChatTemplate:
    family = FAMILIES[family_name]
    return load_chat_template(
        jinja_text=family.text(), bos_text=family.bos, eos_text=family.eos, adds_bos=family.adds_bos
    )


def by_transformers(
    template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str | None:
    """Transformers' own rendering with its clock set to ours; None where the template refuses."""
    import datetime

    import jinja2
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.combine(template.today, datetime.time())

    original = chat_template_utils.datetime
    chat_template_utils.datetime = Clock
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            [[message_variables(message) for message in messages]],
            chat_template=template.text,
            add_generation_prompt=add_generation_prompt,
            bos_token=template.bos_text,
            eos_token=template.eos_text,
        )
    except jinja2.TemplateError:
        return None
    finally:
        chat_template_utils.datetime = original
    return str(rendered[0])


def without_bos(template: ChatTemplate, text: str) -> str:
    return text.removeprefix(template.bos_text) if template.adds_bos else text


def ours(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    try:
        return template.render_prompt(messages)
    except InputError:
        return None


@pytest.mark.parametrize("family_name", EVERY_FAMILY)
def test_prompts_are_those_of_transformers(family_name: str) -> None:
    template = template_of(family_name)
    num_equal = 0
    for messages in CONVERSATIONS:
        expected = by_transformers(template, messages, add_generation_prompt=True)
        if expected is not None:
            expected = without_bos(template, expected)
            num_equal += 1
        assert ours(template, messages) == expected
    assert num_equal >= 20


@pytest.mark.parametrize("family_name", EVERY_FAMILY)
def test_training_text_is_the_prompt_then_the_answer(family_name: str) -> None:
    """The last answer's example is the served prompt, then what Transformers writes for the answer."""
    template = template_of(family_name)
    num_checked = 0
    for messages in CONVERSATIONS:
        prompt = ours(template, messages)
        if prompt is None:
            continue
        for answer in ("Fine.", ODD[0], ODD[2]):
            conversation = [*messages, Message(A, answer)]
            segments = template.render_training(conversation, targets="last")
            assert segments[0] == Segment(prompt, False)
            assert [segment.is_target for segment in segments[:2]] == [False, True]
            assert not any(segment.is_target for segment in segments[2:])
            closed = by_transformers(template, conversation, add_generation_prompt=False)
            assert closed is not None
            # Mistral moves the system message once a turn is over, and Llama 3 always goes on with a prompt.
            if without_bos(template, closed).startswith(prompt) and family_name != "llama3":
                assert joined(segments) == without_bos(template, closed)
            else:
                assert segments[1].text in closed
            num_checked += 1
    assert num_checked >= 60


SYSTEM_CONVERSATION = [
    Message(S, "Be brief."), Message(U, "One?"), Message(A, "1"), Message(U, "Two?"), Message(A, "2 "),
]  # fmt: skip
# (text, is target) of each segment, examples separated.
EXPECTED: dict[str, list[list[tuple[str, bool]]]] = {
    "smollm2": [[
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("1<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("2 <|im_end|>", True),
        ("\n", False),
    ]],
    "qwen3": [[
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\n1<|im_end|>", True),
        ("\n", False),
    ], [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
         "1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\n2 <|im_end|>", True),
        ("\n", False),
    ]],
    "llama3.2": [[
        ("<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
         "Today Date: 26 Jul 2024\n\n"
         "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("1<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("2<|eot_id|>", True),
    ]],
    "gemma3": [[
        ("<start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\n", False),
        ("1<end_of_turn>", True),
        ("\n<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n", False),
        ("2<end_of_turn>", True),
        ("\n", False),
    ]],
    "mistral-nemo": [[
        ("[INST]Be brief.\n\nOne?[/INST]", False),
        ("1</s>", True),
    ], [
        ("[INST]One?[/INST]1</s>[INST]Be brief.\n\nTwo?[/INST]", False),
        ("2 </s>", True),
    ]],
    "phi3.5": [[
        ("<|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\n", False),
        ("1<|end|>", True),
        ("\n<|user|>\nTwo?<|end|>\n<|assistant|>\n", False),
        ("2 <|end|>", True),
        ("\n<|endoftext|>", False),
    ]],
    "zephyr": [[
        ("<|system|>\nBe brief.</s>\n<|user|>\nOne?</s>\n<|assistant|>\n", False),
        ("1</s>", True),
        ("\n<|user|>\nTwo?</s>\n<|assistant|>\n", False),
        ("2 </s>", True),
        ("\n", False),
    ]],
    "neural-chat": [[
        ("### System:\nBe brief.\n### User:\nOne?\n### Assistant:\n", False),
        ("1</s>", True),
        ("\n### User:\nTwo?\n### Assistant:\n", False),
        ("2 </s>", True),
        ("\n", False),
    ]],
    "alpaca": [[
        ("Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n", False),
        ("1</s>", True),
        ("\n\n### Instruction:\nTwo?\n\n### Response:\n", False),
        ("2 </s>", True),
        ("\n\n", False),
    ]],
}  # fmt: skip


@pytest.mark.parametrize("family_name", EXPECTED)
def test_targets_are_answers_and_their_end_of_turn(family_name: str) -> None:
    examples = template_of(family_name).render_training_examples(SYSTEM_CONVERSATION)
    got = [[(segment.text, segment.is_target) for segment in example] for example in examples]
    assert got == EXPECTED[family_name]


@pytest.mark.parametrize("family_name", EVERY_FAMILY)
def test_a_written_template_renders_what_was_trained(family_name: str) -> None:
    template = template_of(family_name)
    conversion = to_go_template(template)
    assert conversion.family == FAMILIES[family_name].name
    assert conversion.num_probes == FAMILIES[family_name].num_probes
    go = OllamaTemplate(conversion.text)
    served = load_chat_template(go_text=conversion.text, eos_text=template.eos_text)
    num_equal = 0
    for messages in CONVERSATIONS:
        expected = by_transformers(template, messages, add_generation_prompt=True)
        if expected is not None:
            expected = without_bos(template, expected)
            assert go.render(merge_consecutive(messages)) == expected
            assert served.render_prompt(messages) == expected
            num_equal += 1
    assert num_equal >= 20


def test_a_bos_within_the_text_stays_and_has_no_equal_template() -> None:
    template = load_chat_template(jinja_text=LLAMA2, bos_text="<s>", eos_text="</s>", adds_bos=True)
    prompt = template.render_prompt(CONVERSATIONS[2])
    assert prompt == "[INST] One? [/INST] 1 </s><s>[INST] Two? [/INST]"
    with pytest.raises(InputError, match="begins the first user's turn in a way of its own"):
        to_go_template(template)


@pytest.mark.weights
def test_the_real_smollm2_template(smollm2_path: Any) -> None:
    from ollatune.gguf.reader import GGUFFile

    with GGUFFile.open(smollm2_path) as file:
        assert file.metadata["tokenizer.chat_template"] == SMOLLM2
