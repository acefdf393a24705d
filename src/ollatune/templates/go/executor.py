"""Running a parsed Go template over data, with Go's scoping, truth and missing-key rules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ollatune.templates.go import nodes
from ollatune.templates.go.functions import BUILTINS, LAZY, Function
from ollatune.templates.go.lexer import GoTemplateError
from ollatune.templates.go.values import (
    Struct,
    is_true,
    plain,
    printed,
    sorted_items,
    type_name,
)

# Deep enough for templates that call themselves once per character of white space, and for C stacks of 8 MiB.
_RECURSION_LIMIT = 6000
_MISSING = object()


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def execute(
    root: nodes.ListNode,
    data: Mapping[str, Any],
    *,
    defined: Mapping[str, nodes.ListNode],
    functions: Mapping[str, Function],
) -> str:
    """The text that `root` renders `data` to. Raises GoTemplateError where Go fails or this engine cannot follow."""
    output: list[str] = []
    run = _Run(output, dict(data), defined, functions)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION_LIMIT))
    try:
        run.walk_list(run.variables[0][1], root)
    except RecursionError:
        raise GoTemplateError("The Go template calls itself too deeply.") from None
    finally:
        sys.setrecursionlimit(limit)
    return "".join(output)


class _Run:
    def __init__(
        self,
        output: list[str],
        dot: Any,
        defined: Mapping[str, nodes.ListNode],
        functions: Mapping[str, Function],
    ) -> None:
        self.output = output
        self.variables: list[list[Any]] = [["$", dot]]
        self.defined = defined
        self.functions = functions

    # Nodes.

    def walk_list(self, dot: Any, tree: nodes.ListNode) -> None:
        for node in tree.nodes:
            self.walk(dot, node)

    def walk(self, dot: Any, node: nodes.Node) -> None:
        if isinstance(node, nodes.Text):
            self.output.append(node.text)
        elif isinstance(node, nodes.Action):
            value = self.pipeline(dot, node.pipe)
            if not node.pipe.declared:
                self.output.append(printed(value))
        elif isinstance(node, nodes.Branch):
            mark = len(self.variables)
            try:
                if node.kind == "range":
                    self.walk_range(dot, node)
                else:
                    self.walk_if(dot, node)
            finally:
                del self.variables[mark:]
        elif isinstance(node, nodes.TemplateCall):
            self.walk_template(dot, node)
        else:
            raise _Break if isinstance(node, nodes.Break) else _Continue

    def walk_if(self, dot: Any, node: nodes.Branch) -> None:
        value = self.pipeline(dot, node.pipe)
        if is_true(value):
            self.walk_list(value if node.kind == "with" else dot, node.body)
        elif node.otherwise is not None:
            self.walk_list(dot, node.otherwise)

    def walk_range(self, dot: Any, node: nodes.Branch) -> None:
        value = plain(self.pipeline(dot, node.pipe))
        if isinstance(value, list):
            items = list(enumerate(value))
        elif isinstance(value, dict):
            items = list(sorted_items(value))  # type: ignore[arg-type]
        elif value is None:
            items = []
        else:
            raise GoTemplateError(
                f"range can't iterate over {printed(value)} in every version of Ollama ({type_name(value)})"
            )
        if not items and node.otherwise is not None:
            self.walk_list(dot, node.otherwise)
        mark = len(self.variables)
        for index, element in items:
            self.set_range_variables(node.pipe, index, element)
            try:
                self.walk_list(element, node.body)
            except _Continue:
                pass
            except _Break:
                break
            finally:
                del self.variables[mark:]

    def set_range_variables(self, pipe: nodes.Pipe, index: Any, element: Any) -> None:
        names = pipe.declared
        values = [element] if len(names) == 1 else [index, element]
        for name, value in zip(names, values, strict=False):
            self.assign(name, value)

    def walk_template(self, dot: Any, node: nodes.TemplateCall) -> None:
        if node.name not in self.defined:
            raise GoTemplateError(f'template "{node.name}" not defined')
        inner = None if node.pipe is None else self.pipeline(dot, node.pipe)
        outer, self.variables = self.variables, [["$", inner]]
        try:
            self.walk_list(inner, self.defined[node.name])
        finally:
            self.variables = outer

    # Variables.

    def assign(self, name: str, value: Any) -> None:
        for variable in reversed(self.variables):
            if variable[0] == name:
                variable[1] = value
                return
        raise GoTemplateError(f"undefined variable: {name}")

    def variable(self, name: str) -> Any:
        for variable in reversed(self.variables):
            if variable[0] == name:
                return variable[1]
        raise GoTemplateError(f"undefined variable: {name}")

    # Pipelines.

    def pipeline(self, dot: Any, pipe: nodes.Pipe) -> Any:
        value: Any = _MISSING
        for command in pipe.commands:
            value = self.command(dot, command, value)
        for name in pipe.declared:
            if pipe.is_assignment:
                self.assign(name, value)
            else:
                self.variables.append([name, value])
        return value

    def command(self, dot: Any, command: nodes.Command, final: Any) -> Any:
        first = command.args[0]
        if isinstance(first, nodes.Identifier):
            return self.call(dot, first.name, command.args[1:], final)
        if len(command.args) > 1 or final is not _MISSING:
            # Ollama passes no functions and no methods with arguments as data.
            raise GoTemplateError("can't give argument to non-function in the Go template")
        if isinstance(first, nodes.Nil):
            raise GoTemplateError("nil is not a command")
        return self.operand(dot, first)

    def operand(self, dot: Any, operand: nodes.Operand) -> Any:
        if isinstance(operand, nodes.Field):
            return self.fields(dot, operand.names)
        if isinstance(operand, nodes.Variable):
            return self.variable_fields(operand.names)
        if isinstance(operand, nodes.Constant):
            return operand.value
        if isinstance(operand, nodes.Dot):
            return dot
        if isinstance(operand, nodes.Pipe):
            return self.pipeline(dot, operand)
        if isinstance(operand, nodes.Chain):
            return self.fields(self.operand(dot, operand.base), operand.names)
        if isinstance(operand, nodes.Identifier):
            return self.call(dot, operand.name, [], _MISSING)
        return None  # nil

    def variable_fields(self, names: tuple[str, ...]) -> Any:
        value = self.variable(names[0])
        if len(names) == 1 or value is None:
            # Fields of a variable that holds nothing are nothing; fields of a missing map entry are an error.
            return value
        return self.fields(value, names[1:])

    def fields(self, value: Any, names: tuple[str, ...]) -> Any:
        for name in names:
            value = self.field(plain(value), name)
        return value

    def field(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return value.get(name)  # missingkey=zero of map[string]any is nil
        if isinstance(value, Struct) and name in value.fields:
            return value.fields[name]
        if value is None:
            raise GoTemplateError(f"nil pointer evaluating interface {{}}.{name}")
        raise GoTemplateError(f"can't evaluate field {name} in type {type_name(value)}")

    # Functions.

    def call(self, dot: Any, name: str, args: list[nodes.Operand], final: Any) -> Any:
        if name in LAZY and name not in self.functions:
            return self.lazy(dot, name, args, final)
        function = self.functions.get(name) or BUILTINS.get(name)
        if function is None:
            raise GoTemplateError(f'"{name}" is not a defined function')
        values = [self.operand(dot, arg) for arg in args]
        if final is not _MISSING:
            values.append(final)
        try:
            return function(*values)
        except TypeError as error:
            if "positional argument" not in str(error):
                raise
            raise GoTemplateError(f"wrong number of args for {name}: got {len(values)}") from error

    def lazy(self, dot: Any, name: str, args: list[nodes.Operand], final: Any) -> Any:
        if not args and final is _MISSING:
            raise GoTemplateError(f"wrong number of args for {name}: want at least 1 got 0")
        value: Any = None
        for arg in args:
            value = self.operand(dot, arg)
            if is_true(value) == (name == "or"):
                return value
        return value if final is _MISSING else final
