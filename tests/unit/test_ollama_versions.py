"""What each version does, at both sides of every change."""

from __future__ import annotations

import pytest

from ollatune.base.errors import ServiceError
from ollatune.ollama.versions import ServerVersion


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.24.0", (0, 24, 0)),
        ("v0.5", (0, 5, 0)),
        ("0.32.15-rc1", (0, 32, 15)),
        ("0.17.1+build.3", (0, 17, 1)),
        (" 1.2.3\n", (1, 2, 3)),
    ],
)
def test_versions_are_read(text: str, numbers: tuple[int, int, int]) -> None:
    assert ServerVersion.parse(text).numbers == numbers


@pytest.mark.parametrize("text", ["", "garbage", "0", "a.b.c", "1.2.3.4", "<html>", "0.1x"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(ServiceError, match="a number such as"):
        ServerVersion.parse(text)


@pytest.mark.parametrize(
    ("ability", "before", "since"),
    [
        ("has_json_create", "0.5.4", "0.5.5"),
        ("has_context_in_ps", "0.9.9", "0.10.0"),
        ("has_render_only", "0.11.4", "0.11.5"),
        ("has_renderers", "0.11.11", "0.12.0"),
        ("has_logprobs", "0.12.10", "0.12.11"),
        ("runs_jinja", "0.29.9", "0.30.0"),
        ("rewrites_ggufs", "0.24.0", "0.30.0"),
    ],
)
def test_abilities_come_with_a_version(ability: str, before: str, since: str) -> None:
    assert not getattr(ServerVersion.parse(before), ability)
    assert getattr(ServerVersion.parse(since), ability)
    assert getattr(
        ServerVersion.parse("0.0.0"), ability
    )  # a build from source is taken for the newest


@pytest.mark.parametrize("ability", ["accepts_adapters", "quantizes_ggufs"])
def test_abilities_that_went_away(ability: str) -> None:
    assert getattr(ServerVersion.parse("0.34.0"), ability)
    assert not getattr(ServerVersion.parse("0.34.1"), ability)
    assert not getattr(ServerVersion.parse("0.0.0"), ability)


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("0.17.4", 1.1),
        ("0.17.5", 1.0),
        ("0.17.9", 1.0),
        ("0.18.0", 1.1),
        ("0.32.9", 1.1),
        ("0.32.10", 1.0),
    ],
)
def test_default_repeat_penalty(text: str, penalty: float) -> None:
    assert ServerVersion.parse(text).default_repeat_penalty == penalty


@pytest.mark.parametrize(
    ("text", "architecture", "reason"),
    [
        ("0.24.0", "llama", None),
        ("0.24.0", "qwen2", None),
        ("0.24.0", "gemma2", None),
        ("0.24.0", "qwen3", "runs qwen3 on an engine without LoRA (from 0.12.0 up to 0.30.0)"),
        ("0.11.9", "qwen3", None),
        ("0.24.0", "gemma3", "runs gemma3 on an engine without LoRA (from 0.6.0 up to 0.30.0)"),
        ("0.5.13", "gemma3", None),
        ("0.32.15", "qwen3", None),
        ("0.34.0", "gemma3", None),
        ("0.34.1", "llama", "no longer takes LoRA adapters (since 0.34.1)"),
        ("0.3.6", "llama", "older than 0.3.7"),
    ],
)
def test_where_an_adapter_is_served(text: str, architecture: str, reason: str | None) -> None:
    found = ServerVersion.parse(text).adapter_refusal(architecture)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(f"Ollama {text}")
        assert reason in found


def test_security_warning_up_to_the_first_safe_version() -> None:
    warning = ServerVersion.parse("0.17.0").security_warning
    assert warning is not None
    assert "CVE-2026-7482" in warning
    assert "update it to 0.17.1" in warning
    assert ServerVersion.parse("0.17.1").security_warning is None
