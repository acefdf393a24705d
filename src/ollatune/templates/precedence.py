"""Which of a model's two templates Ollama uses when it has both."""

from __future__ import annotations

from ollatune.templates.ollama_render import OllamaTemplate

_GO_ROUND_TRIP = ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
_JINJA_TOOL_CALLS = ("tool_calls", "assistant_tool_call")
_JINJA_TOOL_RESULTS = (
    "tool_response", "tool_results", "role'] == 'tool'", "role'] == \"tool\"", "role\"] == 'tool'",
    'role"] == "tool"', "message.role == 'tool'", 'message.role == "tool"', "ipython",
)  # fmt: skip


def prefers_jinja(go_text: str, jinja_text: str) -> bool:
    """Whether Ollama from 0.30 on, with OLLAMA_GO_TEMPLATE unset, lets the GGUF's Jinja win over this TEMPLATE.

    It does where the Jinja's text shows more capabilities (tools, thinking) than the Go template, or the same with a
    tool round trip that the Go template lacks (`shouldPreferChatTemplate` in its server). Raises InputError where the
    TEMPLATE does not parse.
    """
    if not jinja_text:
        return False
    if not go_text:
        return True
    template = OllamaTemplate(go_text)
    jinja = _jinja_capabilities(jinja_text)
    go = _go_capabilities(template)
    if len(jinja) > len(go):
        return not _go_has_round_trip(template) or _jinja_has_round_trip(jinja_text)
    if jinja != go or "tools" not in jinja:
        return False
    return _jinja_has_round_trip(jinja_text) and not _go_has_round_trip(template)


def _jinja_capabilities(text: str) -> set[str]:
    capabilities = set()
    if "tools" in text or "tool_call" in text:
        capabilities.add("tools")
    if "<think>" in text and "</think>" in text:
        capabilities.add("thinking")
    return capabilities


def _go_capabilities(template: OllamaTemplate) -> set[str]:
    capabilities = {"insert"} if "suffix" in template.variables else set()
    if template.supports_tools:
        capabilities.add("tools")
    if template.supports_thinking:
        capabilities.add("thinking")
    return capabilities


def _go_has_round_trip(template: OllamaTemplate) -> bool:
    if not {"tools", "toolcalls"} <= template.variables:
        return False
    return any(text in template.text for text in _GO_ROUND_TRIP)


def _jinja_has_round_trip(text: str) -> bool:
    return any(t in text for t in _JINJA_TOOL_CALLS) and any(t in text for t in _JINJA_TOOL_RESULTS)
