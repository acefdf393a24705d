"""Chat records: OpenAI's `messages` and ShareGPT's `conversations`, checked turn by turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ollatune.base.text import did_you_mean, printable
from ollatune.data.conversation import ChatMessage
from ollatune.data.fields import optional_text, text_of
from ollatune.data.position import Position, RecordError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
_THINKING_KEYS = ("thinking", "reasoning_content", "reasoning")


def parse_messages(value: Any, where: str, position: Position) -> list[ChatMessage]:
    """The turns of a chat record, in either form. `where` is the field's name. Raises RecordError."""
    turns = _list_of_objects(value, where, position)
    messages: list[ChatMessage] = []
    call_names: dict[str, str] = {}
    for index, turn in enumerate(turns):
        name = f"{where}[{index}]"
        if "from" in turn and "role" not in turn:
            messages.append(_sharegpt_message(turn, name, position))
        else:
            messages.append(_openai_message(turn, name, position, call_names))
    check_turns(messages, where, position)
    return messages


def _list_of_objects(value: Any, where: str, position: Position) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RecordError(
            position,
            f"`{where}` must be a list of messages, found {_kind(value)}",
            'Write [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].',
        )
    if not value:
        raise RecordError(
            position, f"`{where}` is an empty list", "Add the messages or remove the record."
        )
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RecordError(
                position,
                f"`{where}[{index}]` must be an object, found {_kind(turn)}",
                'Write {"role": "…", "content": "…"}.',
            )
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a truth value",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _role(
    turn: Mapping[str, Any], key: str, roles: Mapping[str, str], name: str, position: Position
) -> str:
    role = turn.get(key)
    if not isinstance(role, str):
        found = "missing" if key not in turn else _kind(role)
        raise RecordError(
            position, f"`{name}.{key}` is {found}", f"Give one of: {', '.join(sorted(roles))}."
        )
    if role not in roles:
        raise RecordError(
            position,
            f"`{name}.{key}` is {printable(role, limit=40)!r}, not a known role",
            f"Use one of: {', '.join(sorted(roles))}.{did_you_mean(role, roles)}",
        )
    return roles[role]


def _openai_message(
    turn: Mapping[str, Any], name: str, position: Position, call_names: dict[str, str]
) -> ChatMessage:
    role = _role(turn, "role", _ROLES, name, position)
    calls: tuple[Mapping[str, Any], ...] = ()
    if turn.get("tool_calls"):
        calls = parse_tool_calls(turn["tool_calls"], f"{name}.tool_calls", position)
        for call in calls:
            if isinstance(call.get("id"), str):
                call_names[call["id"]] = call["function"]["name"]
    elif turn.get("function_call"):
        calls = parse_tool_calls([turn["function_call"]], f"{name}.function_call", position)
    content = _content(turn, name, position, may_be_missing=bool(calls))
    thinking = ""
    for key in _THINKING_KEYS:
        thinking = thinking or optional_text(turn.get(key), f"{name}.{key}", position)
    tool_name = call_id = ""
    if role == "tool":
        call_id = optional_text(turn.get("tool_call_id"), f"{name}.tool_call_id", position)
        tool_name = optional_text(
            turn.get("tool_name") or turn.get("name"), f"{name}.name", position
        )
        tool_name = tool_name or call_names.get(call_id, "")
    is_trained = _is_trained(turn, name, position)
    return ChatMessage(role, content, thinking, calls, tool_name, is_trained, call_id)


def _is_trained(turn: Mapping[str, Any], name: str, position: Position) -> bool:
    """OpenAI's `weight` of an assistant message: 0 leaves it out of the loss."""
    weight = turn.get("weight")
    if weight is None or weight == 1:
        return True
    if weight != 0:
        raise RecordError(
            position, f"`{name}.weight` is {weight!r}", "Write 0 (context only) or 1."
        )
    return False


def _content(
    turn: Mapping[str, Any], name: str, position: Position, *, may_be_missing: bool
) -> str:
    content = turn.get("content")
    if content is None and may_be_missing:
        return ""
    if "content" not in turn:
        raise RecordError(
            position,
            f"`{name}` has no `content` (it has {', '.join(f'`{printable(k, limit=30)}`' for k in turn)})",
            f"Add it.{did_you_mean('content', [k for k in turn if k != 'role'])}",
        )
    if isinstance(content, list):  # OpenAI's content parts
        texts = []
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise RecordError(
                    position,
                    f"`{name}.content[{index}]` is of type {printable(str(kind), limit=30)!r}, not text",
                    "Remove images and audio from the record.",
                )
            texts.append(text_of(part.get("text"), f"{name}.content[{index}].text", position))
        return "".join(texts)
    return text_of(content, f"{name}.content", position)


def _sharegpt_message(turn: Mapping[str, Any], name: str, position: Position) -> ChatMessage:
    role = _role(turn, "from", _SHAREGPT_ROLES, name, position)
    if "value" not in turn:
        raise RecordError(position, f"`{name}` has no `value`", "Add it.")
    text = text_of(turn["value"], f"{name}.value", position)
    if role == "function_call":
        call = _json_text(text, f"{name}.value", position)
        calls = call if isinstance(call, list) else [call]
        return ChatMessage("assistant", "", "", parse_tool_calls(calls, f"{name}.value", position))
    return ChatMessage(role, text, is_trained=_is_trained(turn, name, position))


def _json_text(text: str, name: str, position: Position) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecordError(position, f"`{name}` must be JSON", "Correct it.") from None


def _as_written(value: Any, position: Position) -> Any:
    """`value` without nulls in its objects where it comes from Parquet.

    A Parquet column gives every object all the fields that any row's has; those a row does not have are null.
    """
    if position.row < 0:
        return value
    if isinstance(value, dict):
        return {k: _as_written(v, position) for k, v in value.items() if v is not None}
    return [_as_written(item, position) for item in value] if isinstance(value, list) else value


def parse_tool_calls(value: Any, name: str, position: Position) -> tuple[Mapping[str, Any], ...]:
    """Tool calls in one form: {"type": "function", "function": {"name": str, "arguments": mapping}, "id"?: str}."""
    calls = []
    for index, call in enumerate(_list_of_objects(value, name, position)):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(
                position,
                f"`{name}[{index}]` has no function name",
                'Write {"function": {"name": "…", "arguments": {…}}}.',
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json_text(arguments, f"{name}[{index}].arguments", position)
        if not isinstance(arguments, dict):
            raise RecordError(
                position,
                f"`{name}[{index}].arguments` must be an object",
                "Write {…} or a JSON text of it.",
            )
        arguments = _as_written(arguments, position)
        parsed: dict[str, Any] = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        if isinstance(call.get("id"), str):
            parsed["id"] = call["id"]
        calls.append(parsed)
    return tuple(calls)


def parse_tools(value: Any, position: Position) -> tuple[Mapping[str, Any], ...]:
    """Tool definitions in OpenAI's form: {"type": "function", "function": {"name": …, …}}."""
    if isinstance(value, str):
        value = _json_text(value, "tools", position) if value.strip() else []
    if not value:
        return ()
    tools = []
    for index, tool in enumerate(_list_of_objects(value, "tools", position)):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(
                position,
                f"`tools[{index}]` has no function name",
                'Write {"type": "function", "function": {"name": "…", "parameters": {…}}}.',
            )
        tools.append({"type": "function", "function": _as_written(function, position)})
    return tuple(tools)


def check_turns(messages: list[ChatMessage], where: str, position: Position) -> None:
    """The order of turns a model is served with; turns after the last answer are dropped, there is nothing to learn.

    Raises RecordError for a system message that is not first, two answers in a row, an empty answer, or none at all.
    """
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise RecordError(
            position, f"`{where}` has no assistant message: nothing to learn", "Add the answer."
        )
    previous = ""
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            raise RecordError(
                position,
                f"`{where}[{index}]` is a system message but not the first",
                "Move it to the front.",
            )
        if message.role == "assistant":
            if previous == "assistant":
                raise RecordError(
                    position,
                    f"`{where}[{index}]` is a second assistant message in a row",
                    "Join the two, or add the user's message between them.",
                )
            if not message.content.strip() and not message.tool_calls and not message.thinking:
                raise RecordError(
                    position,
                    f"`{where}[{index}]` is an empty answer",
                    "Write the answer or remove the record.",
                )
        previous = message.role
    if not any(m.is_trained for m in messages if m.role == "assistant"):
        raise RecordError(
            position,
            "every assistant message has weight 0: nothing to learn",
            "Give one the weight 1.",
        )
