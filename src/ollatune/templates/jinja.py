"""Jinja chat templates: tried in a limited child process first, then rendered here, as Transformers renders them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.text import printable
from ollatune.templates import jinja_sandbox
from ollatune.templates.messages import Message

_WALL_SECONDS = 60.0  # processor time is what is limited; a busy or sleeping machine is not the template's fault
_COMPILED_KEPT = 32
# The child reads its request first, because that says where jinja2 is; it sees nothing else that is installed.
_CHILD = """
import importlib.util, json, sys
request = json.load(sys.stdin)
sys.path[:0] = request["paths"]
spec = importlib.util.spec_from_file_location("jinja_sandbox", request["sandbox"])
sandbox = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
sandbox.main(request)
"""
_HINT = "Use another chat template, or train with the TEMPLATE of an Ollama model."

_tried: set[str] = set()
_compiled: dict[tuple[str, datetime.date], Any] = {}

_PROBES = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ],
)


def message_variables(message: Message) -> dict[str, Any]:
    """A message as Jinja templates expect it; thinking under both of its usual names, tool calls in OpenAI's form."""
    variables: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        variables |= {"reasoning_content": message.thinking, "thinking": message.thinking}
    if message.tool_calls:
        variables["tool_calls"] = [
            {"type": "function", **call}
            if "function" in call
            else {"type": "function", "function": call}
            for call in message.tool_calls
        ]
    if message.tool_name:
        variables["name"] = message.tool_name
    if message.tool_call_id:
        variables["tool_call_id"] = message.tool_call_id
    return variables


class JinjaTemplate:
    """A chat template in Jinja with the values it sees beside the messages.

    Raises InputError where the template cannot be parsed, is unsafe, or refuses a conversation.
    """

    def __init__(
        self,
        text: str,
        *,
        today: datetime.date,
        bos_text: str = "",
        eos_text: str = "",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.text = text
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.today = today
        self.variables = {"bos_token": bos_text, "eos_token": eos_text, **(variables or {})}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as text; with `add_generation_prompt` it ends where the next answer begins."""
        variables = {
            **self.variables,
            "messages": [message_variables(message) for message in messages],
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        size = sum(len(message.content) + len(message.thinking) for message in messages)
        if tools or any(message.tool_calls for message in messages):
            size = len(json.dumps(variables))
        self._try_once(variables)
        try:
            return jinja_sandbox.render(self._template(), variables, size)
        except Exception as error:
            # Whatever a template provokes, from its own raise_exception to a TypeError, is the template's refusal.
            raise InputError(
                f"The chat template refuses this conversation: {printable(str(error) or type(error).__name__)}."
            ) from error

    def _template(self) -> Any:
        key = (self.digest, self.today)
        if key not in _compiled:
            if len(_compiled) >= _COMPILED_KEPT:
                _compiled.clear()
            _compiled[key] = jinja_sandbox.compiled(self.text, self._now())
        return _compiled[key]

    def _now(self) -> datetime.datetime:
        return datetime.datetime.combine(self.today, datetime.time())

    def _try_once(self, variables: Mapping[str, Any]) -> None:
        """Render in a limited child process, once per template and process. Raises InputError where that fails."""
        if self.digest in _tried:
            return
        probes = [
            {
                **self.variables,
                "messages": probe,
                "tools": None,
                "documents": None,
                "add_generation_prompt": end,
            }
            for probe in _PROBES
            for end in (True, False)
        ]
        request = {
            "paths": _library_paths(),
            "sandbox": jinja_sandbox.__file__,
            "template": self.text,
            "now": self._now().isoformat(),
            "conversations": [variables, *probes],
        }
        reason = _child_refusal(json.dumps(request))
        if reason:
            raise InputError(f"The chat template is refused: {printable(reason)}.", hint=_HINT)
        _tried.add(self.digest)


def _library_paths() -> list[str]:
    """The folders that hold the two libraries the child needs."""
    folders: list[str] = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is a dependency"
        assert spec.origin is not None, f"{name} is a package with a file"
        folder = str(Path(spec.origin).parent.parent)
        if folder not in folders:
            folders.append(folder)
    return folders


def _child_refusal(request: str) -> str:
    """Why the child process refuses or did not survive the template; '' where it is fine."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"trying it took longer than {_WALL_SECONDS} seconds"
    if done.returncode < 0:
        return f"trying it used more than {jinja_sandbox.CPU_SECONDS} seconds or too much memory"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"trying it failed ({last_line or f'exit status {done.returncode}'})"
    return str(answer.get("refused", ""))
