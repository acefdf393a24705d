"""Every recorded rendering of two real Ollama servers (0.24.0 and 0.32.15), errors included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ollatune.base.errors import InputError
from ollatune.templates.messages import Message
from ollatune.templates.ollama_render import OllamaTemplate

_FILE = Path(__file__).parents[1] / "data" / "go-template-goldens.jsonl"
GOLDENS = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def golden_message(message: dict[str, Any]) -> Message:
    return Message(
        message["role"],
        message["content"],
        message.get("thinking", ""),
        tuple(message.get("tool_calls", ())),
        message.get("tool_name", ""),
    )


def ours(row: dict[str, Any]) -> dict[str, Any]:
    try:
        template = OllamaTemplate(row["template"])
    except InputError as error:
        return {"create_status": 400, "create_error": str(error)}
    request = row["request"]
    try:
        rendered = template.render(
            [golden_message(message) for message in request["messages"]],
            request.get("tools"),
            think=request.get("think"),
            model="rec-t",
            full_model_name="registry.ollama.ai/library/rec-t:latest",
        )
    except InputError as error:
        return {"status": 400, "error": str(error)}
    return {"status": 200, "rendered": rendered}


def test_the_recordings_are_all_here() -> None:
    assert len(GOLDENS) == 466
    assert len({row["template"] for row in GOLDENS}) == 31


@pytest.mark.parametrize("name", sorted({row["template_name"] for row in GOLDENS}))
def test_renders_what_real_servers_rendered(name: str) -> None:
    rows = [row for row in GOLDENS if row["template_name"] == name]
    got = {row.get("conversation", "create"): ours(row) for row in rows}
    assert got == {row.get("conversation", "create"): row["both"] for row in rows}
