"""The syntax tree of a Go text/template. Field names follow the grammar in Go's documentation of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass
class Text:
    text: str


@dataclass
class Field:
    """`.A.B`: fields of dot."""

    names: tuple[str, ...]


@dataclass
class Variable:
    """`$x.A.B`; `names[0]` is the variable with its dollar sign."""

    names: tuple[str, ...]


@dataclass
class Chain:
    """`(pipeline).A.B`."""

    base: Operand
    names: tuple[str, ...]


@dataclass
class Identifier:
    """A function's name."""

    name: str


@dataclass
class Constant:
    """A string, number, character or boolean as written."""

    value: str | int | float | bool


@dataclass
class Dot:
    pass


@dataclass
class Nil:
    pass


@dataclass
class Command:
    args: list[Operand]


@dataclass
class Pipe:
    commands: list[Command] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    is_assignment: bool = False


@dataclass
class Action:
    pipe: Pipe
    line: int


@dataclass
class ListNode:
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Branch:
    """`if`, `with` and `range`: `kind` says which."""

    kind: str
    pipe: Pipe
    body: ListNode
    otherwise: ListNode | None
    line: int


@dataclass
class TemplateCall:
    name: str
    pipe: Pipe | None
    line: int


@dataclass
class Break:
    pass


@dataclass
class Continue:
    pass


Operand: TypeAlias = Field | Variable | Chain | Identifier | Constant | Dot | Nil | Pipe
Node: TypeAlias = Text | Action | Branch | TemplateCall | Break | Continue
