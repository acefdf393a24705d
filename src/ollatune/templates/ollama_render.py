"""What Ollama's server does with a Go template and a chat request, up to the prompt it feeds the model.

Follows Ollama's `template` package and chat route as two real servers (0.24.0 and 0.32.15) showed them; all 466
recordings in `tests/data/go-template-goldens.jsonl` are reproduced.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

from ollatune.templates.go import nodes
from ollatune.templates.go.executor import execute
from ollatune.templates.go.functions import BUILTINS, LAZY, Function, ollama_functions
from ollatune.templates.go.lexer import GoTemplateError
from ollatune.templates.go.parser import parse
from ollatune.templates.messages import Message, merge_consecutive
from ollatune.templates.ollama_values import message_value, tools_value

DEFAULT_DATE = datetime.date(2024, 7, 26)
"""The date templates see unless told otherwise, so that a rendering does not change from day to day. It is the one that
Llama 3's own template falls back to."""

_RESPONSE = nodes.Action(nodes.Pipe([nodes.Command([nodes.Field(("Response",))])]), 0)


class OllamaTemplate:
    """A parsed TEMPLATE. Raises GoTemplateError, in the server's words, where Ollama would refuse to create it."""

    def __init__(self, text: str) -> None:
        self.text = text
        names = {*BUILTINS, *LAZY, *ollama_functions(DEFAULT_DATE)}
        parsed = parse(text, names)
        self.root = parsed.root
        self.defined = parsed.defined
        self.variables = frozenset(
            name.lower()
            for tree in (self.root, *self.defined.values())
            for node in tree.nodes
            for name in identifiers(node)
        )
        if not self.variables & {"messages", "response"}:
            self.root.nodes.append(_RESPONSE)
        self.supports_tools = "tools" in self.variables
        self.supports_thinking = all(thinking_tags(self.root))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        think: bool | None = None,
        today: datetime.date = DEFAULT_DATE,
        model: str = "this template",
        full_model_name: str = "",
    ) -> str:
        """The prompt of `/api/chat` for this template. Raises InputError where the server answers with an error.

        `think` is the request's field: where it is absent and the template can show thinking, the server turns it on.
        `model` and `full_model_name` only name the model in errors.
        """
        if tools and not self.supports_tools:
            raise GoTemplateError(f"{full_model_name or model} does not support tools")
        if think and not self.supports_thinking:
            raise GoTemplateError(f'"{model}" does not support thinking')
        if think is None and self.supports_thinking:
            think = True
        shared = {"Think": bool(think), "ThinkLevel": "", "IsThinkSet": think is not None}
        collated = merge_consecutive(messages)
        functions = ollama_functions(today)
        if "messages" in self.variables:
            data = {
                "System": "\n\n".join(m.content for m in messages if m.role == "system"),
                "Messages": [message_value(message) for message in collated],
                "Tools": tools_value(tools) if tools else [],
                "Response": "",
                **shared,
            }
            text = execute(self.root, data, defined=self.defined, functions=functions)
        else:
            text = self._legacy(collated, shared, functions)
        if not text.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise GoTemplateError(
                "The Go template cuts a character in two: its output is not UTF-8."
            )
        return text

    @cached_property
    def _prompt_root(self) -> nodes.ListNode:
        return cut_after_response(self.root)

    def _legacy(
        self,
        messages: Sequence[Message],
        shared: Mapping[str, Any],
        functions: Mapping[str, Function],
    ) -> str:
        """Templates of one turn (.System, .Prompt, .Response): rendered once per turn, the last cut after .Response."""
        turns = list(_turns(messages))
        rendered = [
            execute(self.root, {**turn, **shared}, defined=self.defined, functions=functions)
            for turn in turns[:-1]
        ]
        # The server runs the cut tree in a template of its own, without Ollama's functions and named templates.
        last = execute(self._prompt_root, {**turns[-1], **shared}, defined={}, functions={})
        return "".join(rendered) + last


def _turns(messages: Sequence[Message]) -> Iterator[dict[str, str]]:
    """.System, .Prompt and .Response of each turn; the last one, possibly empty, is the turn to be answered."""
    empty = {"System": "", "Prompt": "", "Response": ""}
    turn = dict(empty)
    for message in messages:
        if message.role == "system":
            if turn["Prompt"] or turn["Response"]:
                yield turn
                turn = dict(empty)
            turn["System"] = message.content
        elif message.role == "user":
            if turn["Response"]:
                yield turn
                turn = dict(empty)
            turn["Prompt"] = message.content
        elif message.role == "assistant":
            turn["Response"] = message.content
    yield turn


def identifiers(node: object) -> Iterator[str]:
    """Every field and variable name that Ollama sees in a node when it asks what a template can do."""
    if isinstance(node, nodes.ListNode):
        for item in node.nodes:
            yield from identifiers(item)
    elif isinstance(node, nodes.TemplateCall):
        if node.pipe is None:
            raise GoTemplateError("template error: undefined template specified")
        yield from identifiers(node.pipe)
    elif isinstance(node, nodes.Action):
        yield from identifiers(node.pipe)
    elif isinstance(node, nodes.Branch):
        for part in (node.pipe, node.body, node.otherwise):
            yield from identifiers(part)
    elif isinstance(node, nodes.Pipe):
        for command in node.commands:
            for arg in command.args:
                yield from identifiers(arg)
    elif isinstance(node, nodes.Field | nodes.Variable):
        yield from node.names


def cut_after_response(root: nodes.ListNode) -> nodes.ListNode:
    """The tree without everything that comes after the first `.Response`: the prompt of a legacy template."""
    return _Cut().in_list(deepcopy(root))


class _Cut:
    def __init__(self) -> None:
        self.is_cut = False

    def in_list(self, tree: nodes.ListNode) -> nodes.ListNode:
        kept = [node for node in tree.nodes if self.keep(node)]
        return nodes.ListNode(kept)

    def keep(self, node: nodes.Node) -> bool:
        if self.is_cut:
            return False
        if isinstance(node, nodes.Action):
            return self.in_pipe(node.pipe)
        if isinstance(node, nodes.Branch):
            node.body = self.in_list(node.body)
            if node.otherwise is not None:
                if self.is_cut:
                    # The server's own code fails here, and answers with status 500.
                    raise GoTemplateError(
                        "The Go template has .Response in the first part of an {{ if }} with an {{ else }}; "
                        "Ollama itself fails on that."
                    )
                node.otherwise = self.in_list(node.otherwise)
        return True

    def in_pipe(self, pipe: nodes.Pipe) -> bool:
        commands = []
        for command in pipe.commands:
            if self.is_cut:
                break
            command.args = [arg for arg in command.args if self.in_operand(arg)]
            if not command.args:
                return False
            commands.append(command)
        pipe.commands = commands
        return bool(commands)

    def in_operand(self, operand: nodes.Operand) -> bool:
        if self.is_cut:
            return False
        if isinstance(operand, nodes.Field) and "Response" in operand.names:
            self.is_cut = True
            return True
        return self.in_pipe(operand) if isinstance(operand, nodes.Pipe) else True


def thinking_tags(root: nodes.ListNode) -> tuple[str, str]:
    """The texts around `.Thinking` inside a range over `.Messages`, by which Ollama knows a thinking template."""
    opening = closing = ""
    for ancestors in _paths_to_thinking(root, ()):
        ranges = [n for n in ancestors if isinstance(n, nodes.Branch) and n.kind == "range"]
        if not ranges or "Messages" not in set(identifiers(ranges[-1].pipe)):
            continue
        around = [n for n in ancestors if isinstance(n, nodes.ListNode)][-1]
        first, last = around.nodes[0], around.nodes[-1]
        if isinstance(first, nodes.Text):
            opening = first.text.strip()
        if isinstance(last, nodes.Text):
            closing = last.text.strip()
    return opening, closing


def _paths_to_thinking(node: object, above: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    path = (*above, node)
    children: Sequence[object] = ()
    if isinstance(node, nodes.ListNode):
        children = node.nodes
    elif isinstance(node, nodes.Branch):
        children = (node.pipe, node.body, node.otherwise)
    elif isinstance(node, nodes.Action | nodes.TemplateCall):
        children = (node.pipe,)
    elif isinstance(node, nodes.Pipe):
        children = node.commands
    elif isinstance(node, nodes.Command):
        children = node.args
    elif isinstance(node, nodes.Field) and node.names[0] == "Thinking":
        yield path
    for child in children:
        yield from _paths_to_thinking(child, path)
