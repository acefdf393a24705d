"""Tokens → syntax tree, refusing what Go's parser refuses, in its words where those reach a user often."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ollatune.templates.go import nodes
from ollatune.templates.go.lexer import GoTemplateError, Token, syntax_error, tokenize, unquote

_OPERANDS = frozenset(["field", "variable", "name", "number", "string", "char", ".", "nil", "("])


@dataclass
class ParsedTemplate:
    """The main tree and the templates that `define` and `block` add."""

    root: nodes.ListNode
    defined: dict[str, nodes.ListNode]


def parse(source: str, functions: Collection[str]) -> ParsedTemplate:
    """Parse `source`, which may call `functions`. Raises GoTemplateError."""
    return _Parser(tokenize(source), functions).run()


def is_blank(tree: nodes.ListNode) -> bool:
    """Whether a tree holds nothing but white space, so that another definition may replace it."""
    return all(isinstance(node, nodes.Text) and not node.text.strip() for node in tree.nodes)


class _Parser:
    def __init__(self, tokens: list[Token], functions: Collection[str]) -> None:
        self.tokens = tokens
        self.index = 0
        self.functions = functions
        self.variables = ["$"]
        self.defined: dict[str, nodes.ListNode] = {}
        self.range_depth = 0

    # Reading tokens.

    def peek(self) -> Token:
        return self.tokens[self.index]

    def peek_solid(self) -> Token:
        """The next token that is not a space; the spaces before it are consumed."""
        while self.tokens[self.index].kind == "space":
            self.index += 1
        return self.tokens[self.index]

    def take(self) -> Token:
        token = self.tokens[self.index]
        if token.kind != "eof":
            self.index += 1
        return token

    def take_solid(self) -> Token:
        self.peek_solid()
        return self.take()

    def fail(self, reason: str, token: Token | None = None) -> GoTemplateError:
        return syntax_error((token or self.peek()).line, reason)

    def unexpected(self, token: Token, context: str) -> GoTemplateError:
        shown = "EOF" if token.kind == "eof" else f'"{token.value[:10]}"'
        if token.kind == token.value and token.kind.isalpha():
            shown = f"<{token.value}>"
        return self.fail(f"unexpected {shown} in {context}", token)

    def expect(self, kind: str, context: str) -> Token:
        token = self.take_solid()
        if token.kind != kind:
            raise self.unexpected(token, context)
        return token

    # Lists of text and actions.

    def run(self) -> ParsedTemplate:
        root = nodes.ListNode()
        while self.peek().kind != "eof":
            if self.is_keyword_action("define"):
                self.definition()
                continue
            node = self.text_or_action()
            if isinstance(node, str):
                raise self.fail(f"unexpected {{{{{node}}}}}")
            root.nodes.append(node)
        return ParsedTemplate(root, self.defined)

    def is_keyword_action(self, keyword: str) -> bool:
        if self.peek().kind != "{{":
            return False
        at = self.index + 1
        while self.tokens[at].kind == "space":
            at += 1
        return self.tokens[at].kind == keyword

    def item_list(self) -> tuple[nodes.ListNode, str]:
        """Nodes up to `end` or `else`, and which of the two it was."""
        found = nodes.ListNode()
        while self.peek_solid().kind != "eof":
            node = self.text_or_action()
            if isinstance(node, str):
                return found, node
            found.nodes.append(node)
        raise self.fail("unexpected EOF")

    def text_or_action(self) -> nodes.Node | str:
        token = self.take_solid()
        if token.kind == "text":
            return nodes.Text(token.value)
        if token.kind == "{{":
            return self.action()
        raise self.unexpected(token, "input")

    def action(self) -> nodes.Node | str:
        token = self.peek_solid()
        if token.kind in ("if", "with", "range"):
            self.take()
            return self.control(token.kind, token.line)
        if token.kind in ("break", "continue"):
            return self.loop_exit()
        if token.kind == "end":
            self.take()
            self.expect("}}", "end")
            return "end"
        if token.kind == "else":
            self.take()
            if self.peek_solid().kind not in ("if", "with"):
                self.expect("}}", "else")
            return "else"
        if token.kind == "template":
            self.take()
            return self.template_call(token.line)
        if token.kind == "block":
            self.take()
            return self.block(token.line)
        if token.kind == "define":
            raise self.unexpected(token, "command")
        return nodes.Action(self.pipeline("command"), token.line)

    def loop_exit(self) -> nodes.Node:
        token = self.take()
        self.expect("}}", "{{" + token.kind + "}}")
        if not self.range_depth:
            raise self.fail(f"{{{{{token.kind}}}}} outside {{{{range}}}}", token)
        return nodes.Break() if token.kind == "break" else nodes.Continue()

    def control(self, kind: str, line: int) -> nodes.Branch:
        mark = len(self.variables)
        pipe = self.pipeline(kind)
        self.range_depth += kind == "range"
        body, terminator = self.item_list()
        self.range_depth -= kind == "range"
        otherwise = None
        if terminator == "else":
            following = self.peek_solid()
            if kind in ("if", "with") and following.kind == kind:
                # `{{else if x}}` is `{{else}}{{if x}}`, and one `{{end}}` closes both.
                self.take()
                otherwise = nodes.ListNode([self.control(kind, following.line)])
            elif following.kind in ("if", "with"):
                raise self.unexpected(following, "input")
            else:
                otherwise, terminator = self.item_list()
                if terminator != "end":
                    raise self.fail("expected end; found {{else}}")
        del self.variables[mark:]
        return nodes.Branch(kind, pipe, body, otherwise, line)

    # Named templates.

    def definition(self) -> None:
        self.take()
        self.take_solid()
        name = unquote_name(self, "define clause")
        self.expect("}}", "define clause")
        self.subtree(name, "define clause")

    def subtree(self, name: str, context: str) -> None:
        """Parse up to `end` as the template `name`, which sees none of the variables outside."""
        outside, depth = self.variables, self.range_depth
        self.variables, self.range_depth = ["$"], 0
        tree, terminator = self.item_list()
        if terminator != "end":
            raise self.fail(f"unexpected {{{{else}}}} in {context}")
        self.variables, self.range_depth = outside, depth
        if name in self.defined and not is_blank(self.defined[name]):
            if not is_blank(tree):
                raise self.fail(f'template: multiple definition of template "{name}"')
            return
        self.defined[name] = tree

    def template_call(self, line: int) -> nodes.Node:
        name = unquote_name(self, "template clause")
        pipe = None
        if self.peek_solid().kind == "}}":
            self.take()
        else:
            pipe = self.pipeline("template clause")
        return nodes.TemplateCall(name, pipe, line)

    def block(self, line: int) -> nodes.Node:
        name = unquote_name(self, "block clause")
        pipe = self.pipeline("block clause")
        self.subtree(name, "block clause")
        return nodes.TemplateCall(name, pipe, line)

    # Pipelines.

    def pipeline(self, context: str, closing: str = "}}") -> nodes.Pipe:
        pipe = nodes.Pipe()
        self.declarations(pipe, context)
        while True:
            token = self.peek_solid()
            if token.kind == closing:
                self.take()
                self.check(pipe, context)
                return pipe
            if token.kind not in _OPERANDS:
                raise self.unexpected(self.take(), context)
            pipe.commands.append(self.command())

    def declarations(self, pipe: nodes.Pipe, context: str) -> None:
        while self.peek_solid().kind == "variable":
            start = self.index
            name = self.take().value
            following = self.peek_solid()
            if following.kind in (":=", "="):
                pipe.is_assignment = following.kind == "="
                self.take()
                pipe.declared.append(name)
                self.variables.append(name)
                return
            if following.kind != ",":
                self.index = start
                return
            self.take()
            pipe.declared.append(name)
            self.variables.append(name)
            if context != "range" or len(pipe.declared) > 1:
                raise self.fail(f"too many declarations in {context}")
            if self.peek_solid().kind not in ("variable", "}}", ")"):
                raise self.fail("range can only initialize variables")

    def check(self, pipe: nodes.Pipe, context: str) -> None:
        if not pipe.commands:
            raise self.fail(f"missing value for {context}")
        for stage, command in enumerate(pipe.commands[1:], start=2):
            if isinstance(command.args[0], nodes.Constant | nodes.Dot | nodes.Nil):
                raise self.fail(f"non executable command in pipeline stage {stage}")

    def command(self) -> nodes.Command:
        command = nodes.Command([])
        while True:
            token = self.peek_solid()
            if token.kind in _OPERANDS:
                command.args.append(self.operand())
            following = self.peek()
            if following.kind == "space":
                self.take()
                continue
            if following.kind == "|":
                self.take()
            elif following.kind not in ("}}", ")"):
                raise self.unexpected(following, "operand")
            break
        if not command.args:
            raise self.fail("empty command")
        return command

    def operand(self) -> nodes.Operand:
        base = self.term()
        names: list[str] = []
        while self.peek().kind == "field":
            names.append(self.take().value[1:])
        if not names:
            return base
        if isinstance(base, nodes.Field | nodes.Variable):
            return type(base)((*base.names, *names))
        if isinstance(base, nodes.Constant | nodes.Nil | nodes.Dot):
            raise self.fail("unexpected . after term")
        return nodes.Chain(base, tuple(names))

    def term(self) -> nodes.Operand:
        token = self.take_solid()
        if token.kind == "field":
            return nodes.Field((token.value[1:],))
        if token.kind == "variable":
            if token.value not in self.variables:
                raise self.fail(f'undefined variable "{token.value}"', token)
            return nodes.Variable((token.value,))
        if token.kind == "name":
            if token.value in ("true", "false"):
                return nodes.Constant(token.value == "true")
            if token.value not in self.functions:
                raise self.fail(f'function "{token.value}" not defined', token)
            return nodes.Identifier(token.value)
        if token.kind == "string":
            return nodes.Constant(unquote(token.value, token.line))
        if token.kind == ".":
            return nodes.Dot()
        if token.kind == "nil":
            return nodes.Nil()
        if token.kind == "(":
            return self.pipeline("parenthesized pipeline", ")")
        return nodes.Constant(number(token))


def unquote_name(parser: _Parser, context: str) -> str:
    """The name after `define`, `block` or `template`."""
    token = parser.take_solid()
    if token.kind != "string":
        raise parser.unexpected(token, context)
    return unquote(token.value, token.line)


def number(token: Token) -> int | float:
    """A Go number or character constant, which is an integer."""
    if token.kind == "char":
        value = unquote(f'"{token.value[1:-1]}"'.replace('"""', r'"\""'), token.line)
        if len(value) != 1:
            raise syntax_error(token.line, f"malformed character constant: {token.value}")
        return ord(value)
    text = token.value.replace("_", "")
    digits = text.lstrip("+-")
    try:
        if digits[:2].lower() in ("0x", "0b", "0o"):
            return int(text, 0)
        if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
            return int(text, 8)
        return float(text) if any(c in text for c in ".eE") else int(text)
    except ValueError:
        raise syntax_error(token.line, f'illegal number syntax: "{token.value}"') from None
