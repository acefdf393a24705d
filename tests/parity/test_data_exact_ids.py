"""Records rendered with published vocabularies and templates: ids, mask, BOS and end by exact ids.

What is expected comes from Transformers' renderings and from `tokenizers` alone. Families share vocabularies as the
models do: Zephyr and Neural Chat have Mistral 7B 0.1's, Alpaca and TinyLlama the first Llama's, Llama 3.1 and 3.3
have 3.2's. Generic ChatML is rendered with Qwen 2.5's, which has its tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pytest

from ollatune.data.conversation import Conversation
from ollatune.data.position import Position, Record, RecordError
from ollatune.data.records import RecordReader
from ollatune.data.render import Renderer
from ollatune.data.store import Example
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.templates import (
    ChatTemplate,
    Message,
    Segment,
    joined,
    load_chat_template,
    to_go_template,
)
from tests.parity.test_template_parity import CONVERSATIONS, ODD, by_transformers, template_of
from tests.reference_tokenizers import ReferenceTokenizer, reference_tokenizer, smollm2_tokenizer
from tests.vocab_metadata import vocab_metadata

Targets = Literal["all", "last"]
Pieces = list[tuple[str, bool]]
"""Text, and whether its tokens are targets."""

WHERE = Position("a.jsonl", 1)


@dataclass(frozen=True)
class Family:
    """`lead` is what the model says before the answer's text, `shown` what the template makes of that text, `end` what
    the model says after it, `trailing` what the template writes after a last answer, which nobody says. The ids are
    those of the published models. In `num_joined` of the conversations a token of the whole text would hold the end of
    a prompt and the beginning of an answer."""

    vocabulary: str
    bos_id: int | None
    end: str
    end_id: int
    trailing: str = ""
    lead: str = ""
    shown: Callable[[str], str] = str
    num_joined: int = 0
    name: str = "model"


FAMILIES = {
    "chatml": Family("qwen2_5", None, "<|im_end|>", 151645, "\n", num_joined=1),
    "qwen2.5": Family("qwen2_5", None, "<|im_end|>", 151645, "\n", num_joined=1),
    "qwen3": Family(
        "qwen3",
        None,
        "<|im_end|>",
        151645,
        "\n",
        "<think>\n\n</think>\n\n",
        lambda text: text.lstrip("\n"),
    ),
    "llama3": Family("llama3", 128000, "<|eot_id|>", 128009, shown=str.strip),
    "llama3.1": Family("llama3_2", 128000, "<|eot_id|>", 128009, shown=str.strip),
    "llama3.2": Family("llama3_2", 128000, "<|eot_id|>", 128009, shown=str.strip),
    "llama3.3": Family("llama3_2", 128000, "<|eot_id|>", 128009, shown=str.strip),
    "gemma2": Family("gemma2", 2, "<end_of_turn>", 107, "\n", shown=str.strip),
    "gemma3": Family("gemma3", 2, "<end_of_turn>", 106, "\n", shown=str.strip),
    "mistral": Family("mistral:v3", 1, "</s>", 2, lead=" ", shown=str.strip),
    "mistral-nemo": Family("mistral_nemo", 1, "</s>", 2),
    "phi3": Family("ggml:phi-3", 1, "<|end|>", 32007, "\n", name="Phi3"),
    "phi3.5": Family("ggml:phi-3", 1, "<|end|>", 32007, "\n<|endoftext|>", name="Phi3"),
    "zephyr": Family("mistral:v1", 1, "</s>", 2, "\n"),
    "tinyllama": Family("ggml:llama-spm", 1, "</s>", 2, "\n"),
    "mistral-small": Family("mistral_small", 1, "</s>", 2),
    "phi4": Family("phi4", None, "<|im_end|>", 100265),
    "phi4-mini": Family("phi4_mini", None, "<|end|>", 200020, "<|endoftext|>"),
    "neural-chat": Family("mistral:v1", 1, "</s>", 2, "\n"),
    "alpaca": Family("ggml:llama-spm", 1, "</s>", 2, "\n\n"),
    "smollm2": Family("embedded", None, "<|im_end|>", 2, "\n", num_joined=9),
}
# Vocabularies of 130,000 tokens and more take long to read; two of them are enough every day.
SLOW = (
    "chatml", "qwen3", "llama3", "llama3.1", "llama3.3", "gemma2", "gemma3", "mistral-nemo", "mistral-small", "phi4",
    "phi4-mini",
)  # fmt: skip
MARKS = {"smollm2": [pytest.mark.weights]} | {name: [pytest.mark.slow] for name in SLOW}
EVERY_FAMILY = [pytest.param(name, marks=MARKS.get(name, [])) for name in FAMILIES]

S, U, A = "system", "user", "assistant"
ANSWERS = ("Fine.", *ODD)
MORE: list[list[tuple[str, str]]] = [
    [(U, "{'a': [1, 2]}"), (A, "if (a < b) { return &c; }\t// end")],
    [(U, "日本語で 🚀 please"), (A, "はい、どうぞ。 12345 apples"), (U, "3,5 %?"), (A, "Größe “x” – 3,5 %")],
    [(U, "Far down?"), (A, "\n\nTwo lines down.")],
    [(U, "1"), (A, " 2 "), (U, " 3 "), (A, "\t4")],
    [(S, "Be brief.\n"), (U, "Code?"), (A, "{{ braces }} and {% tags %}\n\n  indented"), (U, "?"), (A, "!")],
]  # fmt: skip


def _finished() -> list[list[Message]]:
    """Conversations that end with an answer; records without answers, or with a late system message, are refused."""
    found = [[Message(role, text) for role, text in turns] for turns in MORE]
    for messages in CONVERSATIONS:
        roles = [message.role for message in messages]
        if all(message.content for message in messages if message.role == A) and S not in roles[1:]:
            found.append([*messages, Message(A, ANSWERS[len(found) % len(ANSWERS)])])
    return found


FINISHED = _finished()


@lru_cache(maxsize=2)
def tokenizer_of(vocabulary: str, name: str) -> GGUFTokenizer:
    metadata = {key: value for key, (value, _) in vocab_metadata(vocabulary).items()}
    if vocabulary == "llama3":
        # Its tokenizer.json leaves BOS to the template; GGUF files have no such key, and BOS is put in front.
        del metadata["tokenizer.ggml.add_bos_token"]
    return GGUFTokenizer.from_metadata({**metadata, "general.name": name})


def tokenizers_of(
    family: Family, request: pytest.FixtureRequest
) -> tuple[GGUFTokenizer, ReferenceTokenizer]:
    if family.vocabulary == "embedded":
        path = request.getfixturevalue("smollm2_path")
        with GGUFFile.open(path) as file:
            return GGUFTokenizer.from_metadata(file.metadata), smollm2_tokenizer(path)
    tokenizer = tokenizer_of(family.vocabulary, family.name)
    return tokenizer, reference_tokenizer(family.vocabulary)


def expected_examples(
    family: Family, template: ChatTemplate, messages: Sequence[Message], targets: Targets
) -> list[Pieces] | None:
    """The examples that Transformers' renderings make of `messages`; None where they are refused.

    All answers are targets of one example if the last prompt shows the others as they were said; else each has its own.
    """
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        if message.role != A:
            continue
        prompt = by_transformers(template, messages[:i], add_generation_prompt=True)
        closed = by_transformers(template, messages[: i + 1], add_generation_prompt=False)
        if prompt is None or closed is None:
            return None
        answer = family.lead + family.shown(message.content) + family.end
        assert answer + family.trailing in closed
        if template.adds_bos and not prompt.startswith(template.bos_text):
            prompt = template.bos_text + prompt  # the server puts it there
        turns.append((prompt, answer))
    if targets == "last":
        turns = turns[-1:]
    last_prompt = turns[-1][0]
    if not all(last_prompt.startswith(prompt + answer) for prompt, answer in turns[:-1]):
        return [[(p, False), (a, True), (family.trailing, False)] for p, a in turns]
    pieces: Pieces = []
    position = 0
    for prompt, answer in turns:
        pieces += [(last_prompt[position : len(prompt)], False), (answer, True)]
        position = len(prompt + answer)
    return [[*pieces, (family.trailing, False)]]


def assert_is(
    example: Example, family: Family, pieces: Pieces, piece_ids: Sequence[Sequence[int]]
) -> None:
    """`example` has exactly these tokens; targets are those of answers, each with its end; BOS is once or never."""
    ids = example.token_ids.tolist()
    assert ids == list(itertools.chain.from_iterable(piece_ids))
    expected = [
        is_target for (_, is_target), found in zip(pieces, piece_ids, strict=True) for _ in found
    ]
    assert example.is_target.tolist() == expected
    ends = [found[-1] for (_, is_target), found in zip(pieces, piece_ids, strict=True) if is_target]
    assert set(ends) == {family.end_id}
    if family.bos_id is not None:
        assert ids.count(family.bos_id) == 1
        assert ids[0] == family.bos_id
        assert not example.is_target[0]


def hold_all(
    family: Family,
    template: ChatTemplate,
    renderer: Renderer,
    targets: Targets,
    reference: ReferenceTokenizer,
) -> tuple[int, int]:
    """Hold every conversation to `template` as Transformers renders it, which may be another than the renderer's.

    Returns how many there were, and how many examples have a token that prompt and answer would share.
    """
    num_conversations = num_joined = 0
    is_go = renderer.template is not template
    for messages in FINISHED:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        sample = RecordReader(system=None)(Record({"messages": turns}, WHERE))
        examples = expected_examples(family, template, messages, targets)
        if examples is None:
            if not is_go:  # Ollama's templates refuse nothing
                with pytest.raises(RecordError, match="cannot render this record"):
                    renderer(sample, WHERE)
            continue
        for rendered, pieces in zip(renderer(sample, WHERE), examples, strict=True):
            if is_go:
                pieces = pieces[
                    :-1
                ]  # Go templates write prompts only: nothing follows a last answer
            ids, is_whole = reference.encode_pieces([text for text, _ in pieces])
            assert_is(rendered.example, family, pieces, ids)
            num_joined += not is_whole
        num_conversations += 1
    return num_conversations, num_joined


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_ids_mask_bos_and_end_are_those_of_the_reference(
    name: str, request: pytest.FixtureRequest
) -> None:
    """With the published Jinja template, and with the Ollama TEMPLATE that is written from it.

    Qwen 3's differ: the Jinja template alone writes an empty thought into an answer without one.
    """
    family, template = FAMILIES[name], template_of(name)
    tokenizer, reference = tokenizers_of(family, request)
    assert reference.id_of(family.end) == family.end_id
    assert tokenizer.add_bos == (family.bos_id is not None)
    go = load_chat_template(
        go_text=to_go_template(template).text,
        bos_text=template.bos_text,
        eos_text=template.eos_text,
        adds_bos=template.adds_bos,
    )
    targets: Targets
    for served in (template,) if name == "qwen3" else (template, go):
        for targets in ("all", "last"):
            renderer = Renderer(tokenizer, served, max_length=8192, targets=targets)
            found = hold_all(family, template, renderer, targets, reference)
            assert found[0] >= 20
            if targets == "all":
                assert found[1] == family.num_joined


@pytest.mark.parametrize("name", ["mistral-nemo", "mistral-small"])
def test_calls_and_their_results_keep_their_ids(name: str) -> None:
    """Mistral's templates write them, and refuse conversations without."""
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"name": "weather", "arguments": {"city": "Köln"}}
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    ]
    turns: list[dict[str, Any]] = [
        {"role": U, "content": "Weather?"},
        {"role": A, "tool_calls": [{"type": "function", "id": "abcdefghi", "function": call}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "Sunny"},
        {"role": A, "content": "It is sunny."},
    ]
    if name == "mistral-nemo":
        turns[1]["content"] = ""
    template = template_of(name)
    written = Record({"messages": turns, "tools": tools}, WHERE)
    sample = RecordReader(system=None)(written)
    assert isinstance(sample, Conversation)
    segments = template.render_training(sample.messages, sample.tools, targets="last")
    expected, _ = render_jinja_template(
        [turns], tools=tools, chat_template=template.text, bos_token="<s>", eos_token="</s>",
        add_generation_prompt=False,
    )  # fmt: skip
    text = str(expected[0]).removeprefix("<s>")
    if name == "mistral-nemo":
        assert joined(segments) == text
    else:  # its default system message has today's date
        tail = "[AVAILABLE_TOOLS]"
        assert joined(segments).partition(tail)[2] == text.partition(tail)[2] != ""
    assert segments[-1] == Segment("It is sunny.</s>", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "text", "ids"),
    [
        (
            "phi4",
            "<|im_start|>user<|im_sep|>Who are you?<|im_end|><|im_start|>assistant<|im_sep|>",
            [100264, 882, 100266, 15546, 527, 499, 30, 100265, 100264, 78191, 100266],
        ),
        ("phi4_mini", "<|user|>hello world<|end|>", [200021, 24912, 2375, 200020]),
    ],
)
def test_vocabularies_built_from_byte_pairs_give_known_ids(
    vocabulary: str, text: str, ids: list[int]
) -> None:
    assert reference_tokenizer(vocabulary).encode(text) == ids
    assert tokenizer_of(vocabulary, "model").encode(text) == ids


def _shifted(example: Example) -> Example:
    return Example(example.token_ids, np.roll(example.is_target, 1))


def _without_end(example: Example) -> Example:
    mask = example.is_target.copy()
    mask[np.flatnonzero(mask)[-1]] = False
    return Example(example.token_ids, mask)


def _with_a_question(example: Example) -> Example:
    mask = example.is_target.copy()
    mask[np.flatnonzero(~mask)[1]] = True
    return Example(example.token_ids, mask)


def _last_answer_alone(example: Example) -> Example:
    mask = example.is_target.copy()
    mask[: np.flatnonzero(~mask[: np.flatnonzero(mask)[-1]])[-1]] = False
    return Example(example.token_ids, mask)


def _with_bos_twice(example: Example) -> Example:
    return Example(
        np.insert(example.token_ids, 0, example.token_ids[0]),
        np.insert(example.is_target, 0, False),
    )


def _without_bos(example: Example) -> Example:
    return Example(example.token_ids[1:], example.is_target[1:])


@pytest.mark.parametrize(
    "spoil",
    [_shifted, _without_end, _with_a_question, _last_answer_alone, _with_bos_twice, _without_bos],
)
def test_whatever_is_spoiled_is_noticed(
    spoil: Callable[[Example], Example], request: pytest.FixtureRequest
) -> None:
    family, template = FAMILIES["zephyr"], template_of("zephyr")
    tokenizer, reference = tokenizers_of(family, request)
    messages = FINISHED[1]
    examples = expected_examples(family, template, messages, "all")
    assert examples is not None
    (pieces,) = examples
    ids, _ = reference.encode_pieces([text for text, _ in pieces])
    turns = [{"role": message.role, "content": message.content} for message in messages]
    sample = RecordReader(system=None)(Record({"messages": turns}, WHERE))
    (rendered,) = Renderer(tokenizer, template, max_length=8192)(sample, WHERE)
    assert_is(rendered.example, family, pieces, ids)
    with pytest.raises(AssertionError):
        assert_is(spoil(rendered.example), family, pieces, ids)
