"""Record forms: what each becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ollatune.base.errors import UsageError
from ollatune.data.conversation import ChatMessage, Conversation, Document
from ollatune.data.position import Position, Record, RecordError
from ollatune.data.records import RecordReader
from ollatune.data.sources import TextPiece, iter_records

HERE = Position("a.jsonl", 7)


def read(value: Any, **settings: Any) -> Any:
    return RecordReader(**settings)(Record(value, HERE))


def turns(value: Any, **settings: Any) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in read(value, **settings).messages]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"instruction": "Add.", "context": "1 2", "response": "3"},
            [("user", "Add.\n\n1 2"), ("assistant", "3")],
        ),
        ({"instruction": "Hi", "response": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"instruction": "Hi", "context": None, "response": "Hello"},
            [("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {"instruction": "", "context": "only this", "response": "ok"},
            [("user", "only this"), ("assistant", "ok")],
        ),
        (
            {"instruction": "a", "input": "b", "output": "c", "system": "s"},
            [("system", "s"), ("user", "a\n\nb"), ("assistant", "c")],
        ),
        (
            {"instruction": "a", "input": "", "output": "c", "history": [["q", "r"]]},
            [("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "c")],
        ),
        (
            {"instruction": "a", "input": "b", "response": "c", "history": [["q", "r"]]},
            [("user", "q"), ("assistant", "r"), ("user", "a\n\nb"), ("assistant", "c")],
        ),
        (
            {"instruction": "a", "context": "b", "input": "", "output": "c"},
            [("user", "a\n\nb"), ("assistant", "c")],
        ),
        ({"prompt": "p", "completion": " c"}, [("user", "p"), ("assistant", " c")]),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "c"}],
            },
            [("user", "p"), ("assistant", "c")],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "u"}]},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "left over"},
                ]
            },
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
            },
            [("system", "s"), ("user", "u"), ("assistant", "a")],
        ),
    ],
)
def test_forms_become_turns(value: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(value) == expected


def test_text_becomes_a_document_with_its_metadata() -> None:
    sample = read({"text": "Once.", "source": "book.pdf", "page": 3, "score": 0.5})
    assert sample == Document("Once.", True, True, 0.5, {"source": "book.pdf", "page": 3})


def test_a_piece_of_a_file_does_not_end_its_document() -> None:
    assert read(TextPiece("a", True, False)) == Document("a", ends=False)


def test_tool_calls_keep_names_and_parsed_arguments() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    sample = read(
        {
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                {"role": "assistant", "content": "2", "reasoning_content": "easy"},
            ],
        }
    )
    expected = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
    assert sample.messages[1] == ChatMessage("assistant", "", "", (expected,))
    assert sample.messages[2] == ChatMessage("tool", "2", tool_name="add", tool_call_id="c1")
    assert sample.messages[3].thinking == "easy"
    assert sample.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def test_sharegpt_function_calls_and_tools_written_as_text() -> None:
    sample = read(
        {
            "tools": json.dumps([{"name": "add", "parameters": {}}]),
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ],
        }
    )
    assert sample.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert sample.tools[0] == {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_columns_are_mapped_and_the_rest_kept_as_metadata() -> None:
    mapping = {"instruction": "question", "response": "answer", "context": "background"}
    sample = read({"question": "q", "answer": "a", "id": 9}, columns=mapping)
    assert [m.content for m in sample.messages] == ["q", "a"]
    assert sample.metadata == {"id": 9}


def test_configured_system_message_is_given_only_where_there_is_none() -> None:
    record = {"prompt": "p", "completion": "c"}
    assert turns(record, system="S")[0] == ("system", "S")
    assert turns({**record, "system": "own"}, system="S")[0] == ("system", "own")
    chat = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    assert turns(chat, system="S")[0] == ("system", "S")


def test_weight_zero_marks_an_answer_as_context() -> None:
    sample = read(
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "bad", "weight": 0},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "good", "weight": 1},
            ]
        }
    )
    assert [m.is_trained for m in sample.messages if m.role == "assistant"] == [False, True]


U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("value", "cause", "cure"),
    [
        (
            {"instruction": "a", "respons": "b"},
            "no known record form",
            "Is `respons` meant to be `response`?",
        ),
        ({"foo": 1}, "(`foo`)", "`text`"),
        ({"instruction": "a", "response": 3}, "`response` must be text, found a number", "string"),
        ({"instruction": "a", "response": None}, "`response` must be text, found null", "string"),
        ({"instruction": "a", "response": " \n"}, "`response` is empty", "Fill it in"),
        ({"instruction": " ", "response": "x"}, "`instruction` is empty", "Write the task"),
        ({"text": ""}, "`text` is empty", "Fill it in"),
        ({"text": "a\x00b"}, "NUL", "Remove"),
        ({"text": "a\ud800b"}, "lone surrogate \\ud800", "Write the character"),
        ({"messages": []}, "`messages` is an empty list", "Add the messages"),
        ({"messages": "hi"}, "must be a list of messages, found text", "role"),
        ({"messages": [U, "x"]}, "`messages[1]` must be an object, found text", "role"),
        (
            {"messages": [U, {"role": "asistant", "content": "a"}]},
            "'asistant', not a known role",
            "`assistant`",
        ),
        ({"messages": [U, {"content": "a"}]}, "`messages[1].role` is missing", "assistant"),
        (
            {"messages": [U, {"role": "assistant", "contnt": "a"}]},
            "has no `content` (it has",
            "Did you mean `contnt`?",
        ),
        ({"messages": [U, A, A]}, "`messages[2]` is a second assistant message", "Join"),
        ({"messages": [U, {"role": "system", "content": "s"}, A]}, "not the first", "front"),
        (
            {"messages": [U, {"role": "assistant", "content": ""}]},
            "`messages[1]` is an empty answer",
            "Write",
        ),
        ({"messages": [U, U]}, "no assistant message", "Add the answer"),
        ({"messages": [U, {**A, "weight": 0}]}, "weight 0", "weight 1"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "`messages[1].weight` is 0.5", "0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]},
            "`messages[0].content[0]` is of type 'image_url'",
            "images",
        ),
        ({"conversations": [{"from": "humn", "value": "a"}]}, "'humn'", "`human`"),
        ({"messages": [U, A], "score": "x"}, "`score` must be a number, found 'x'", "rename"),
        ({"messages": [U, A], "score": None}, "`score` must be a number, found null", "rename"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, U, A]},
            "there are two system messages, `system` and the first of `messages`",
            "Keep one",
        ),
        (
            {"instruction": "a", "context": "b", "input": "c", "output": "d"},
            "`context` and `input` are both filled in",
            "Join them",
        ),
        ({"messages": [U, A], "tools": [{"x": 1}]}, "`tools[0]` has no function name", "function"),
    ],
)
def test_refusals_name_place_cause_and_cure(value: Any, cause: str, cure: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(value)
    assert str(caught.value).startswith("a.jsonl:7: ")
    assert cause in caught.value.cause
    assert cure in caught.value.cure


def test_the_form_of_the_first_record_is_required_of_all() -> None:
    reader = RecordReader()
    reader(Record({"instruction": "a", "response": "b"}, Position("a.jsonl", 1)))
    with pytest.raises(
        RecordError, match=r"`response` is missing as in the first record \(a.jsonl:1\)"
    ):
        reader(Record({"instruction": "a", "respnse": "b"}, HERE))
    with pytest.raises(RecordError, match="a record in the `messages` form"):
        reader(Record({"messages": [U, A]}, HERE))


def test_a_missing_mapped_column_names_the_nearest() -> None:
    with pytest.raises(RecordError, match="no column `anser`") as caught:
        read(
            {"question": "q", "answer": "a"},
            columns={"instruction": "question", "response": "anser"},
        )
    assert "Did you mean `answer`?" in caught.value.cure


def test_digests_differ_where_the_content_does() -> None:
    def digest(*contents: str) -> int:
        return Conversation(
            tuple(ChatMessage(r, c) for r, c in zip(("user", "assistant"), contents, strict=True))
        ).digest()

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("ab", ""), digest("", "ab"), digest("a", "c")}) == 4
    answers = (ChatMessage("assistant", "ab"), ChatMessage("assistant", "a", thinking="b"))
    assert len({Conversation((answer,)).digest() for answer in answers}) == 2
    first, second = (
        Conversation((ChatMessage("user", "q"), ChatMessage("assistant", a))) for a in "xy"
    )
    assert first.prompt_digest() == second.prompt_digest()
    assert first.digest() != second.digest()


def test_a_mapped_name_that_is_no_field_of_ours_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"maps `instrucion`, .* Did you mean `instruction`\?"):
        RecordReader(columns={"instrucion": "q"})


def test_one_column_cannot_be_two_fields() -> None:
    with pytest.raises(UsageError, match="maps `q` to both `instruction` and `response`"):
        RecordReader(columns={"instruction": "q", "response": "q"})


def test_fields_that_are_not_trained_on_are_noted() -> None:
    reader = RecordReader(columns={"prompt": "q", "completion": "a", "system": "role"})
    for number in range(3):
        reader(Record({"q": "1", "a": "2", f"id{number}": 3, "context": "c"}, HERE))
    seen = reader.seen
    assert seen.unused == {"id0", "id1", "id2", "context"}
    seen.forms.add("prompt-completion")
    assert seen.warnings("a.jsonl", {"prompt": "q", "completion": "a", "system": "id9"}) == [
        "a.jsonl: `context` is no field of the prompt-completion form and is not trained on. "
        "Name it in `data.columns`, or put it into the question.",
        "a.jsonl: no record has the column `id9` (mapped to `system` in `data.columns`). Did you mean `id2`?",
    ]


def test_parquet_gives_tools_and_arguments_no_fields_of_other_rows(tmp_path: Path) -> None:
    """Its columns have one type, so every object has all fields of all rows. JSON's own nulls are kept."""

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        properties = {key: {"type": "string"} for key in arguments}
        parameters = {"type": "object", "properties": properties}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {
            "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
            "messages": [U, {"role": "assistant", "content": "", "tool_calls": [call]}],
        }

    written = [row("f", {"a": "1"}), row("g", {"b": "2", "c": ["3"]})]
    pq.write_table(pa.Table.from_pylist(written), tmp_path / "a.parquet")
    reader = RecordReader()
    samples: list[Any] = [reader(record) for record in iter_records(tmp_path / "a.parquet")]
    assert [sample.tools for sample in samples] == [tuple(row["tools"]) for row in written]
    calls = [sample.messages[1].tool_calls for sample in samples]
    assert calls == [tuple(row["messages"][1]["tool_calls"]) for row in written]
    ((call,),) = [m.tool_calls for m in read(row("f", {"a": None})).messages[1:]]
    assert call["function"]["arguments"] == {"a": None}
