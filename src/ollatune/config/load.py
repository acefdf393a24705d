"""YAML → Config, with the line of every mistake.

Precedence: default < file < `--set section.key=value` < named flag. Values get their type from the schema, not from
YAML's guess: `1e-5` is a number although YAML 1.1 reads it as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ollatune.base.errors import StorageError, UsageError
from ollatune.base.text import did_you_mean, format_bytes
from ollatune.config.schema import Config

MAX_CONFIG_BYTES = 1 << 20
MAX_NODES = 20_000
_NUMBER = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")

Path_ = tuple[str | int, ...]


@dataclass
class ParsedYaml:
    """A YAML document as plain values, with the 1-based line of every key."""

    source: str
    value: dict[str, Any]
    lines: dict[Path_, int] = field(default_factory=dict)
    assigned: set[Path_] = field(default_factory=set)
    flagged: set[Path_] = field(default_factory=set)

    def where(self, path: Path_) -> str:
        """`file:line` of `path` or of its nearest parent that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.source}:{self.lines[path[:length]]}"
        return self.source


def read_yaml(path: Path) -> ParsedYaml:
    """Read a YAML mapping. Raises UsageError with `file:line` for anything that is not one."""
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise UsageError(
                f"{path} is {format_bytes(size)}; a configuration is at most "
                f"{format_bytes(MAX_CONFIG_BYTES)}.",
                hint="Is it the right file?",
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(
            f"There is no configuration file {path}.", hint="Check the path given to --config."
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; --config expects a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from error
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror}.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> ParsedYaml:
    """Parse YAML text (see `read_yaml`). Tags, aliases and duplicate keys are refused."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(
            f"{where}: not valid YAML: {reason}.", hint="Check indentation and quotes there."
        ) from error
    except RecursionError:
        raise UsageError(f"{source}: nested too deeply.") from None
    parsed = ParsedYaml(source, {})
    if node is None:
        return parsed
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(
            f"{source}:{node.start_mark.line + 1}: expected a mapping with sections such as `model:`."
        )
    _refuse_aliases(node, source)
    parsed.value = _mapping(node, (), parsed)
    _write_out_sources(parsed)
    return parsed


def _write_out_sources(parsed: ParsedYaml) -> None:
    """`data: PATH`, `data: [{path, weight, …}]` and paths alone in the list are short for `data.sources`."""
    data = parsed.value.get("data")
    if isinstance(data, str):
        data = [data]
    if isinstance(data, list):
        parsed.value["data"] = {"sources": data}
        for path in [path for path in parsed.lines if path[0] == "data"]:
            full = ("data", "sources", *path[1:])
            parsed.lines[full] = parsed.lines[path]
    sources = data.get("sources") if isinstance(data, dict) else data
    if isinstance(sources, list):
        sources[:] = [{"path": item} if isinstance(item, str) else item for item in sources]


def _refuse_aliases(root: yaml.Node, source: str) -> None:
    seen: set[int] = set()
    stack: list[yaml.Node] = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen or len(seen) > MAX_NODES:
            raise UsageError(
                f"{source}:{node.start_mark.line + 1}: anchors and aliases are not supported.",
                hint="Write the value out where it is used.",
            )
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                stack += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value


def _mapping(node: yaml.MappingNode, path: Path_, parsed: ParsedYaml) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key, str):
            raise UsageError(f"{parsed.source}:{line}: a key must be a word.")
        here = (*path, key)
        if key in result:
            first = parsed.lines[here]
            raise UsageError(
                f"{parsed.source}:{line}: `{key}` was already set in line {first}.",
                hint="Keep one of them.",
            )
        parsed.lines[here] = line
        result[key] = _value(value_node, here, parsed)
    return result


def _value(node: yaml.Node, path: Path_, parsed: ParsedYaml) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, parsed)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            here = (*path, index)
            parsed.lines[here] = item.start_mark.line + 1
            items.append(_value(item, here, parsed))
        return items
    return _scalar(node, parsed.source)


def _scalar(node: yaml.Node, source: str) -> Any:
    text: str = node.value
    if getattr(node, "style", None) in ("'", '"', "|", ">"):
        return text
    if node.tag not in _PLAIN_TAGS:
        raise UsageError(
            f"{source}:{node.start_mark.line + 1}: the YAML tag {node.tag} is not supported.",
            hint="Write a plain value.",
        )
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag == "tag:yaml.org,2002:bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _number(text)


_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp")
}


def _number(text: str) -> Any:
    match = _NUMBER.fullmatch(text)
    if not match or text.startswith(("_", "00")):
        return text
    plain = text.replace("_", "")
    if re.fullmatch(r"[-+]?\d+", plain):
        return int(plain) if len(plain) < 20 else float(plain)
    return float(plain)


def load_config(
    source: Path | ParsedYaml | None = None,
    *,
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The resolved configuration.

    Args:
        source: a YAML file, hand-written or the resolved one of an earlier run, or one already read; None starts
            from the defaults.
        assignments: `section.key=value` strings of `--set`, in order.
        overrides: values of named flags by dotted key, already typed.

    Raises:
        UsageError: unreadable file, unknown key (with the nearest name), wrong type or range; all mistakes at once.
    """
    if source is None:
        parsed = ParsedYaml("defaults", {})
    else:
        parsed = read_yaml(source) if isinstance(source, Path) else source
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise UsageError(
                f"--set {assignment}: expected section.key=value.",
                hint="For example --set training.epochs=2.",
            )
        _assign(parsed, key.strip(), _parse_value(text, f"--set {key.strip()}"))
    _write_out_sources(parsed)
    for key, value in (overrides or {}).items():
        _assign(parsed, key, value)
        parsed.flagged.add(tuple(key.split(".")))
    return build_config(parsed)


def _parse_value(text: str, source: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    return None if node is None else _value(node, (), ParsedYaml(source, {}))


def _assign(parsed: ParsedYaml, dotted: str, value: Any) -> None:
    keys = dotted.split(".")
    target = parsed.value
    for key in keys[:-1]:
        inner = target.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {dotted}: `{key}` is a value, not a section.")
        target = inner
    target[keys[-1]] = value
    parsed.lines = {
        path: line for path, line in parsed.lines.items() if path[: len(keys)] != tuple(keys)
    }
    parsed.assigned.add(tuple(keys))


def build_config(parsed: ParsedYaml) -> Config:
    """Validate a parsed document against the schema (see `load_config` for what is raised)."""
    try:
        return Config.model_validate(parsed.value)
    except ValidationError as error:
        by_path: dict[str, str] = {}  # a union reports each of its members: the first says enough
        for problem in error.errors():
            described = _describe(dict(problem), parsed)
            by_path.setdefault(
                described.partition("`")[2].partition("`")[0] or described, described
            )
        unique = list(by_path.values())
        more = f" (and {len(unique) - 8} more)" if len(unique) > 8 else ""
        raise UsageError("\n".join(unique[:8]) + more) from error


def _describe(problem: dict[str, Any], parsed: ParsedYaml) -> str:
    path = _schema_path(problem["loc"])
    common = [(keys, min(len(keys), len(path))) for keys in parsed.assigned] if path else []
    by_flag = next((keys for keys, n in common if path[:n] == keys[:n]), None)
    where = _flag(by_flag, parsed) if by_flag else parsed.where(path)
    dotted = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        names = _names_beside(path)
        return f"{where}: unknown key `{dotted}`." + (
            did_you_mean(str(path[-1]), names) or f" Known here: {', '.join(names)}."
        )
    found = f" Found {problem['input']!r}." if not isinstance(problem["input"], dict) else ""
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:  # of several settings together
        return f"{where}: {message}."
    return f"{where}: `{dotted}` {message[0].lower() + message[1:]}.{found}"


_FLAGS = {"model.base_model": "--model", "output.folder": "--output", "data.sources": "--data"}
"""Flags whose names are not their settings'."""


def _flag(keys: Path_, parsed: ParsedYaml) -> str:
    """What the user wrote to set `keys`."""
    dotted = ".".join(map(str, keys))
    if keys not in parsed.flagged:
        return f"--set {dotted}"
    return _FLAGS.get(dotted, f"--{keys[-1]}".replace("_", "-"))


def _schema_path(location: tuple[str | int, ...]) -> Path_:
    """Pydantic's location without the names it gives to the members of a union."""
    return tuple(part for part in location if not re.search(r"[\[\]()]|^constrained-", str(part)))


def _names_beside(path: Path_) -> list[str]:
    model: type[BaseModel] = Config
    for part in path[:-1]:
        info = model.model_fields.get(str(part))
        if info is None:
            continue
        candidates = [info.annotation, *get_args(info.annotation)]
        inner = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
        if inner is None:
            break
        model = inner
    return list(model.model_fields)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` accepts."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )
