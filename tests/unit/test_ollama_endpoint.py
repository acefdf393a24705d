"""OLLAMA_HOST in all its forms, and where a key may go."""

from __future__ import annotations

import pytest

from ollatune.base.errors import UsageError
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.endpoint import Endpoint, api_key_for, resolve_endpoint

# The cases of Ollama's own TestHost, with 0.0.0.0 and :: as ConnectableHost makes them.
FORMS = {
    "": "http://127.0.0.1:11434",
    "1.2.3.4": "http://1.2.3.4:11434",
    ":1234": "http://127.0.0.1:1234",
    "1.2.3.4:1234": "http://1.2.3.4:1234",
    "http://1.2.3.4": "http://1.2.3.4:80",
    "http://1.2.3.4:1234": "http://1.2.3.4:1234",
    "https://1.2.3.4": "https://1.2.3.4:443",
    "https://1.2.3.4:1234": "https://1.2.3.4:1234",
    "https://example.com/ollama": "https://example.com:443/ollama",
    "https://example.com:8080/ollama/": "https://example.com:8080/ollama",
    "example.com": "http://example.com:11434",
    "example.com:1234/path": "http://example.com:1234/path",
    "localhost": "http://localhost:11434",
    "[::1]": "http://[::1]:11434",
    "[::1]:1234": "http://[::1]:1234",
    "::1": "http://[::1]:11434",
    "http://[fe80::2]:9": "http://[fe80::2]:9",
    "0.0.0.0": "http://127.0.0.1:11434",
    "0.0.0.0:7": "http://127.0.0.1:7",
    "[::]": "http://[::1]:11434",
    "::": "http://[::1]:11434",
    "[::]:7": "http://[::1]:7",
    ' "example.com:1234" ': "http://example.com:1234",
    "'1.2.3.4'": "http://1.2.3.4:11434",
    "HTTPS://Example.com": "https://Example.com:443",
    "ollama.com": "https://ollama.com:443",
    "example.com:66000": "http://example.com:11434",
    "example.com:-1": "http://example.com:11434",
    "example.com:": "http://example.com:11434",
    "http://example.com:x": "http://example.com:80",
    "169.254.169.254": "http://169.254.169.254:11434",
}


@pytest.mark.parametrize("text", FORMS)
def test_forms_that_ollama_takes(text: str) -> None:
    assert resolve_endpoint(text, {}).url == FORMS[text]
    assert resolve_endpoint(None, {"OLLAMA_HOST": text}).url == FORMS[text]


def test_a_port_that_is_none_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="ollatune"):
        resolve_endpoint("example.com:66000", {})
    assert "`66000` is not a port, using 11434 as Ollama does" in caplog.text


REFUSED = {
    "file:///etc/passwd": "`file` is neither http nor https",
    "gopher://x": "`gopher` is neither http nor https",
    "ftp://x:1": "`ftp` is neither http nor https",
    "http://user:secret@host": "it holds a user name or password",
    "user@host:1": "it holds a user name or password",
    "host\r\nX-Evil: 1": "control",
    "host name": "blanks",
    "hőst": "non-ASCII",
    "host\x00": "control",
    "http://host/?a=b": "more than an address",
    "http://host/#x": "more than an address",
    "http:\\\\host": "more than an address",
}


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_forms_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_endpoint(text, {})
    assert REFUSED[text] in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\r" not in str(caught.value)


def test_there_are_thirty_verdicts() -> None:
    assert len(FORMS) + len(REFUSED) >= 30


def test_what_is_named_comes_before_the_environment() -> None:
    assert resolve_endpoint("a:1", {"OLLAMA_HOST": "b:2"}).url == "http://a:1"


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("[::1]", True), ("0.0.0.0", True),
     ("10.0.0.1", False), ("example.com", False), ("localhost.evil.com", False)],
)  # fmt: skip
def test_what_stays_on_this_machine(text: str, is_loopback: bool) -> None:
    assert resolve_endpoint(text, {}).is_loopback is is_loopback


@pytest.mark.parametrize(
    ("host", "environment_host", "is_sent"),
    [
        (None, "", True),
        (None, "https://mine.example", True),
        (None, "http://mine.example", False),
        (None, "ollama.com", True),
        ("https://mine.example", "https://mine.example", True),
        ("https://other.example", "https://mine.example", False),
        ("http://127.0.0.1:9", "https://mine.example", False),
        ("https://ollama.com", "", True),
        ("https://mine.example", "", False),
        ("https://mine.example", "ftp://broken", False),
    ],
)
def test_the_key_goes_only_where_it_belongs(
    host: str | None, environment_host: str, is_sent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {"OLLAMA_API_KEY": "secret-key", "OLLAMA_HOST": environment_host}
    endpoint = resolve_endpoint(host, environment)
    with caplog.at_level("WARNING", logger="ollatune"):
        assert (api_key_for(endpoint, environment) == "secret-key") is is_sent
    assert ("OLLAMA_API_KEY is not sent" in caplog.text) is not is_sent
    assert "secret-key" not in caplog.text


def test_no_key_no_header() -> None:
    assert api_key_for(Endpoint("http", "127.0.0.1", 1), {}) is None


def test_a_key_given_for_an_open_connection_is_refused() -> None:
    with pytest.raises(UsageError, match="the connection is not encrypted"):
        OllamaClient("http://example.com", api_key="secret-key", environment={})
