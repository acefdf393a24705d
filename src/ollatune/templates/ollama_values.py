"""Messages and tools as the Go values Ollama hands to a template (its `api` and `template` packages, 0.14 to 0.32)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ollatune.base.errors import InputError
from ollatune.templates.go.values import OneOrMany, OrderedMap, PrintsAsJSON, Struct
from ollatune.templates.messages import Message

_PROPERTY_KEYS = {
    "AnyOf": "anyOf", "Type": "type", "Items": "items", "Description": "description", "Enum": "enum",
    "Properties": "properties",
}  # fmt: skip


def any_value(value: Any) -> Any:
    """JSON of no declared type as Go decodes it: every number a float64, every object a map."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): any_value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [any_value(item) for item in value]
    raise InputError(f"A tool's schema or arguments hold a {type(value).__name__}; expected JSON.")


def message_value(message: Message) -> Struct:
    """One element of `.Messages`."""
    return Struct(
        "template.templateMessage",
        {
            "Role": message.role,
            "Content": message.content,
            "Thinking": message.thinking,
            "Images": [],
            "ToolCalls": [_tool_call(call, index) for index, call in enumerate(message.tool_calls)],
            "ToolName": message.tool_name,
            "ToolCallID": "",
        },
    )


def _tool_call(call: Mapping[str, Any], index: int) -> Struct:
    function = call.get("function", call)
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f"Tool call {index + 1} is {dict(call)!r}; expected "
            '{"function": {"name": text, "arguments": object}}.',
            hint="Arguments given as a JSON string must be parsed first.",
        )
    fields = {
        "Index": int(function.get("index", 0)),
        "Name": function["name"],
        "Arguments": PrintsAsJSON(any_value(arguments)),
    }
    return Struct(
        "template.templateToolCall",
        {
            "ID": str(call.get("id", "")),
            "Function": Struct("template.templateToolCallFunction", fields),
        },
    )


def tools_value(tools: Sequence[Mapping[str, Any]]) -> PrintsAsJSON:
    """`.Tools`: prints as JSON, each tool too; a tool's function and parameters have fields only."""
    return PrintsAsJSON([PrintsAsJSON(_tool(tool)) for tool in tools])


def _tool(tool: Mapping[str, Any]) -> Struct:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InputError(
            f'A tool is {dict(tool)!r}; expected {{"type": "function", "function": {{…}}}}.'
        )
    return _marshalled(
        "template.templateTool",
        {"Type": "type", "Items": "items", "Function": "function"},
        {
            "Type": tool.get("type", ""),
            "Items": any_value(tool.get("items")),
            "Function": _function(function),
        },
        {"Items"},
    )


def _function(function: Mapping[str, Any]) -> Struct:
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties")
    return _marshalled(
        "template.templateToolFunction",
        {"Name": "name", "Description": "description", "Parameters": "parameters"},
        {
            "Name": function.get("name", ""),
            "Description": function.get("description", ""),
            "Parameters": _marshalled(
                "template.templateToolFunctionParameters",
                {
                    "Type": "type",
                    "Defs": "$defs",
                    "Items": "items",
                    "Required": "required",
                    "Properties": "properties",
                },
                {
                    "Type": parameters.get("type", ""),
                    "Defs": any_value(parameters.get("$defs")),
                    "Items": any_value(parameters.get("items")),
                    "Required": list(parameters.get("required", ())),
                    "Properties": PrintsAsJSON(
                        None
                        if properties is None
                        else {name: _property(schema) for name, schema in properties.items()}
                    ),
                },
                {"Defs", "Items", "Required"},
            ),
        },
        set(),
    )


def _property(schema: Mapping[str, Any]) -> Struct:
    if "required" in schema:
        raise InputError(
            "A tool's parameter is an object with `required` fields of its own, which Ollama's versions render "
            "differently.",
            hint="Leave `required` out below the top level.",
        )
    kinds = schema.get("type", [])
    inner = schema.get("properties")
    return _marshalled(
        "api.ToolProperty",
        _PROPERTY_KEYS,
        {
            "AnyOf": [_property(alternative) for alternative in schema.get("anyOf", ())],
            "Type": OneOrMany([kinds] if isinstance(kinds, str) else kinds),
            "Items": any_value(schema.get("items")),
            "Description": schema.get("description", ""),
            "Enum": any_value(list(schema.get("enum", ()))),
            "Properties": None
            if inner is None
            else OrderedMap({name: _property(field) for name, field in inner.items()}),
        },
        set(_PROPERTY_KEYS),
    )


def _marshalled(
    type_name: str, keys: Mapping[str, str], fields: Mapping[str, Any], omitted: set[str]
) -> Struct:
    return Struct(type_name, fields, keys, frozenset(omitted))
