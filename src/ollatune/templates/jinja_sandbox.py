"""The Jinja environment of chat templates, usable in this process and in a limited child process.

Renders exactly what Transformers' `apply_chat_template` renders: the same sandbox class, block trimming, extensions,
`tojson`, `raise_exception`, `strftime_now`, and its restricted `dict` and `namespace`. On top of that a template is
refused that works without end, grows values without bound, or reaches for Python's internals.

This file imports nothing of the project and little else, so that a child that loads it starts quickly.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

ADDRESS_SPACE_BYTES = 1 << 30
CPU_SECONDS = 5
OUTPUT_CHARACTERS = 1_000_000
OUTPUT_PER_INPUT_CHARACTER = 16
_STEPS = 100_000  # loop rounds and macro calls, and one more for each character of input
_STEPS_BETWEEN_CLOCKS = 1024
_REPEATED_ITEMS = 1_000_000
_NUMBER_BITS = 4096
_WIDTH = 10_000
_WIDE_FORMAT = re.compile(r"\d{5}")
_WIDTH_METHODS = frozenset(["center", "expandtabs", "ljust", "rjust", "zfill"])


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote; here it only groups its body, as a call block does."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Transformers' sandbox, with a count of the work a template does and an eye on the size of what it makes."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, now: datetime.datetime) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters.update(tojson=_tojson, format=_format, count_step=_count_step)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=now.strftime,
            dict=_TemplateDict(),
            namespace=_TemplateNamespace,
        )
        self.start(0)

    def start(self, input_characters: int) -> None:
        """Begin a rendering: the work done so far is forgotten."""
        self.steps_left = _STEPS + input_characters
        self.deadline = time.thread_time() + CPU_SECONDS

    def count_step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SecurityError(f"it loops more than {_STEPS} times")
        if self.steps_left % _STEPS_BETWEEN_CLOCKS == 0 and time.thread_time() > self.deadline:
            raise SecurityError(f"it runs longer than {CPU_SECONDS} seconds")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The syntax tree with a step counted at the start of every loop body and macro."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
            # A filter, because the sandbox checks every call, and of the context, because others may be folded.
            step = nodes.Filter(nodes.Const(""), "count_step", [], [], None, None)
            statement = nodes.ExprStmt(step, lineno=node.lineno)
            body.insert(0, statement.set_lineno(node.lineno).set_environment(self))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_size(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(target, "__name__", "") in _WIDTH_METHODS and any(map(_is_wide, args)):
            raise SecurityError(f"it pads text to more than {_WIDTH} characters")
        return super().call(context, target, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it reaches for `{attribute}` of a {type(obj).__name__}")


class _TemplateDict:
    """`dict` in templates: makes dictionaries, has none of the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` in templates: takes no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=`
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores `{name}` on a namespace")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@pass_context
def _count_step(context: Context, _: str) -> None:
    environment = context.environment
    assert isinstance(environment, ChatEnvironment)
    environment.count_step()


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_size("%", value, args)
    return do_format(value, *args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Transformers' `tojson`: plain JSON, without Jinja's escaping for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _is_wide(argument: Any) -> bool:
    return isinstance(argument, int) and argument > _WIDTH


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError where the result of a multiplication, power or formatting would be huge."""
    if operator == "%":
        if isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError(f"it formats text wider than {_WIDTH} characters")
        return
    for sized, factor in ((left, right), (right, left)):
        if isinstance(sized, str | list | tuple) and isinstance(factor, int):
            if len(sized) * factor > _REPEATED_ITEMS:
                raise SecurityError(f"it repeats a value to more than {_REPEATED_ITEMS} items")
            return
    if isinstance(left, int) and isinstance(right, int):
        sizes = left.bit_length(), right.bit_length()
        bits = sizes[0] * right if operator == "**" else sum(sizes)
        if bits > _NUMBER_BITS:
            raise SecurityError(f"it computes a number of more than {_NUMBER_BITS} bits")


def compiled(text: str, now: datetime.datetime) -> Template:
    """The template in an environment of its own. Raises jinja2.TemplateError."""
    template = ChatEnvironment(now).from_string(text)
    template.globals = dict(template.globals)  # a ChainMap, slow to copy for every rendering
    return template


def render(template: Template, variables: Mapping[str, Any], input_characters: int) -> str:
    """Render a compiled template. Raises jinja2.TemplateError, SecurityError too, and what the template provokes."""
    environment = template.environment
    assert isinstance(environment, ChatEnvironment)
    environment.start(input_characters)
    limit = OUTPUT_CHARACTERS + OUTPUT_PER_INPUT_CHARACTER * input_characters
    pieces: list[str] = []
    written = 0
    for piece in template.root_render_func(template.new_context(dict(variables))):
        pieces.append(piece)
        written += len(piece)
        if written > limit:
            raise SecurityError(f"it writes more than {limit} characters")
    return "".join(pieces)


def limit_this_process() -> None:
    """Cap this process's memory and processor time, and let it write no file. Does what the system offers."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is the only limit there
        return
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            _, hard = resource.getrlimit(limit)
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (bound, bound))
        except (OSError, ValueError):  # a system that knows the limit but not this value
            continue


def refusal(request: Mapping[str, Any]) -> str:
    """Why a template must not be used, after compiling and rendering it here; '' where it may."""
    try:
        template = compiled(request["template"], datetime.datetime.fromisoformat(request["now"]))
    except SecurityError as error:
        return str(error)
    except TemplateError as error:
        return f"it does not parse: {error}"
    for variables in request["conversations"]:
        try:
            render(template, variables, len(json.dumps(variables)))
        except (SecurityError, MemoryError, RecursionError, OverflowError) as error:
            return str(error) or type(error).__name__
        except Exception as error:
            # A template may refuse a conversation (roles that do not alternate, say) and be safe all the same: that is
            # reported when the conversation is rendered for use.
            if isinstance(error, TypeError) and "no loader" in str(error):
                return "it includes or imports another template"
    return ""


def main(request: Mapping[str, Any]) -> None:
    """Answer `request` on standard output, within the limits. For the child process."""
    limit_this_process()
    try:
        reason = refusal(request)
    except MemoryError:
        reason = "it needs too much memory"
    print(json.dumps({"refused": reason}))
