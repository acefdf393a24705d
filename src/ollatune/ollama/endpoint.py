"""Where the server is: every form of OLLAMA_HOST that Ollama takes (its `envconfig.Host`), and what may go there."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger, redact
from ollatune.base.text import printable

DEFAULT_PORT = 11434
_SCHEME_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535


@dataclass(frozen=True)
class Endpoint:
    """A server's address. `path` is a prefix without slashes at its ends."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def url(self) -> str:
        """The base URL, IPv6 addresses in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}" + (f"/{self.path}" if self.path else "")

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        if self.host.lower() == "localhost":
            return True
        address = _address(self.host)
        return address is not None and address.is_loopback

    @property
    def may_carry_key(self) -> bool:
        """Whether a secret may be sent there: encrypted, or not leaving this machine."""
        return self.scheme == "https" or self.is_loopback


def resolve_endpoint(
    host: str | None = None, environment: Mapping[str, str] | None = None
) -> Endpoint:
    """The server that `host`, else OLLAMA_HOST, else the default names: `host`, `:port`, `host:port`, `[::1]:port`,
    `http(s)://host[:port][/path]`. Addresses to listen on (0.0.0.0, ::) become the loopback address.

    Raises UsageError for other schemes, user names and passwords, blanks and control characters.
    """
    environment = os.environ if environment is None else environment
    text = host if host is not None else environment.get("OLLAMA_HOST", "")
    text = text.strip().strip("\"'").strip()
    if not text.isprintable() or " " in text or not text.isascii():
        raise _bad(text, "it holds blanks, control or non-ASCII characters")
    scheme, has_scheme, rest = text.partition("://")
    if not has_scheme:
        scheme, rest = "http", text
        default_port = DEFAULT_PORT
        if text == "ollama.com":
            scheme, rest = "https", "ollama.com:443"
    else:
        scheme = scheme.lower()
        if scheme not in _SCHEME_PORTS:
            raise _bad(text, f"`{printable(scheme, limit=20)}` is neither http nor https")
        default_port = _SCHEME_PORTS[scheme]
    authority, _, path = rest.partition("/")
    if "@" in authority:
        raise _bad(text, "it holds a user name or password")
    if any(character in text for character in "?#\\"):
        raise _bad(text, "it is more than an address")
    name, port = _split_port(authority, default_port)
    return Endpoint(scheme, _connectable(name), port, path.strip("/"))


def api_key_for(endpoint: Endpoint, environment: Mapping[str, str] | None = None) -> str | None:
    """OLLAMA_API_KEY, if `endpoint` is the server it was given for (OLLAMA_HOST, or the default one) and the way
    there is encrypted or stays on this machine; else None."""
    environment = os.environ if environment is None else environment
    key = environment.get("OLLAMA_API_KEY", "").strip()
    if not key:
        return None
    try:
        is_meant = resolve_endpoint(None, environment) == endpoint
    except UsageError:
        is_meant = False
    if not (is_meant or endpoint.host == "ollama.com") or not endpoint.may_carry_key:
        reason = "an unencrypted connection" if is_meant else "a host it was not given for"
        get_logger("ollama").warning("OLLAMA_API_KEY is not sent to %s: %s.", endpoint.url, reason)
        return None
    return key


def _split_port(authority: str, default_port: int) -> tuple[str, int]:
    """Host and port as Go's net.SplitHostPort sees them; a port that is none is replaced by the default, as there."""
    if authority.startswith("["):
        name, _, after = authority[1:].partition("]")
        has_port = after.startswith(":")
        port = after[1:]
    else:
        name, colon, port = authority.rpartition(":")
        has_port = bool(colon) and ":" not in name
    if not has_port:
        return authority.strip("[]"), default_port
    if not (port.isascii() and port.isdecimal()) or int(port) > _MAX_PORT:
        get_logger("ollama").warning(
            "OLLAMA_HOST: `%s` is not a port, using %d as Ollama does.",
            printable(port, limit=20),
            default_port,
        )
        return name, default_port
    return name, int(port)


def _connectable(name: str) -> str:
    address = _address(name)
    if not name or (address is not None and address.is_unspecified):
        return "::1" if address is not None and address.version == 6 else "127.0.0.1"
    return str(address) if address is not None else name


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _bad(text: str, reason: str) -> UsageError:
    return UsageError(
        f"`{printable(redact(text), limit=80)}` is not the address of an Ollama server: {reason}.",
        hint="Write host, host:port or http(s)://host:port in --host or OLLAMA_HOST; the default is"
        f" http://127.0.0.1:{DEFAULT_PORT}.",
    )
