"""The parameters of Ollama's models (its `api.Options`): which there are, their types, and their text form."""

from __future__ import annotations

import re
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.text import did_you_mean, printable

_INTEGERS = (
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
    "num_thread", "draft_num_predict",
)  # fmt: skip
_FLOATS = (
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
PARAMETER_KINDS: dict[str, type] = {
    **dict.fromkeys(_INTEGERS, int), **dict.fromkeys(_FLOATS, float), "use_mmap": bool, "stop": str,
}  # fmt: skip
"""Parameters Ollama knows and the type of each; `stop` is a list of its type."""
DEPRECATED_PARAMETERS = frozenset(
    (
        "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock",
        "mirostat", "mirostat_tau", "mirostat_eta",
    )
)  # fmt: skip
"""Ignored by Ollama, with a warning."""

NOT_IN_MODELS = frozenset(("typical_p",))
"""Options of a request that newer servers refuse as a model's parameter."""

_TRUTH = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}


def parameter_text(value: Any) -> str:
    """A parameter's value as a Modelfile has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameter_value(key: str, text: str, *, place: str) -> Any:
    """The value that `text` stands for. Raises InputError, naming `place`, for unknown parameters and wrong types."""
    kind = PARAMETER_KINDS.get(key)
    if kind is None:
        raise InputError(
            f"{place}: unknown parameter `{printable(key, limit=40)}`.{did_you_mean(key, PARAMETER_KINDS)}"
        )
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(
            f"{place}: PARAMETER {key} is `{printable(text, limit=40)}`, expected {names[kind]}."
        ) from None


def checked_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters for `/api/create`, whose server takes any and fails only when the model is used.

    A single `stop` becomes a list. Raises InputError for unknown parameters and wrong types.
    """
    checked: dict[str, Any] = {}
    for key, value in parameters.items():
        place = "model parameters"
        if key == "stop":
            stops = value if isinstance(value, list | tuple) else [value]
            checked[key] = [parameter_value(key, str(stop), place=place) for stop in stops]
        else:
            checked[key] = parameter_value(key, parameter_text(value), place=place)
    return checked


_GO_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_GO_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def shown_parameters(text: str) -> dict[str, Any]:
    """The `parameters` of `/api/show`: a name and a value a line, texts quoted as Go quotes them, numbers as Go prints
    them (`1.048576e+06`). `stop` is a list. What is not known or not of its kind is given as it stands.
    """
    parameters: dict[str, Any] = {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        value = _go_value(rest.strip(), PARAMETER_KINDS.get(key, str))
        if key == "stop":
            parameters.setdefault(key, []).append(value)
        elif key:
            parameters[key] = value
    return parameters


def _go_value(text: str, kind: type) -> Any:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return _GO_ESCAPE.sub(_unescaped, text[1:-1])
    try:
        if kind is bool:
            return _TRUTH[text.lower()]
        if kind is int:
            number = float(text)
            return int(number) if number.is_integer() else number
        return kind(text)
    except (ValueError, KeyError):
        return text


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    return (
        chr(int(code[1:], 16))
        if code[0] in "xuU" and len(code) > 1
        else _GO_LETTERS.get(code, code)
    )
