"""The server that the round-trip tests run against: the test server of a version or, where OLLATUNE_TEST_OLLAMA names
one, a real server. The same tests run against both.

On a real server every tag that a test makes begins with a prefix of its own, and is deleted at the end; nothing else on
it is touched. Its files have to be readable here, for bases are read from its store.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ollatune.base.errors import ServiceError
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.names import ModelName
from ollatune.ollama.versions import ServerVersion
from tests.fake_ollama import FakeOllama
from tests.fake_ollama.engine import LlamaCppRunner

REAL_SERVER = os.environ.get("OLLATUNE_TEST_OLLAMA", "")
FAKE_VERSIONS = ("0.24.0", "0.34.1")
VERSIONS = ("real",) if REAL_SERVER else FAKE_VERSIONS
"""What tests are parametrised with."""


@dataclass
class ServerUnderTest:
    """A running server. `fake` is None for a real one; `tags` are the names that this test gave, prefix included."""

    url: str
    client: OllamaClient
    fake: FakeOllama | None = None
    prefix: str = ""
    tags: set[str] = field(default_factory=set)
    store: Path | None = None

    @property
    def version(self) -> ServerVersion:
        return self.client.version()

    def tag(self, name: str) -> str:
        """The name on this server of what the test calls `name`."""
        self.tags.add(self.prefix + name)
        return self.prefix + name

    def names(self) -> list[str]:
        """Tags of this test, without the prefix, as `ollama list` shows them."""
        listed = [row.name for row in self.client.list()]
        return sorted(name[len(self.prefix) :] for name in listed if name.startswith(self.prefix))

    def blobs(self) -> list[str] | None:
        """Blobs on the test server's disk; None for a real one, whose others come and go."""
        if self.fake is None:
            return None
        return sorted(path.name for path in (self.fake.store.root / "blobs").iterdir())

    def add_base(
        self,
        name: str,
        gguf: Path,
        *,
        template: str = "",
        system: str = "",
        parameters: Mapping[str, Any] | None = None,
        license: str = "",
        messages: Sequence[Mapping[str, str]] = (),
        adapter: Path | None = None,
        **config: str,
    ) -> None:
        """A model under `tag(name)`, as a user's own `ollama create` would make it."""
        fields = {
            "template": template, "system": system, "license": license, "messages": list(messages),
            "parameters": dict(parameters or {}), **config,
        }  # fmt: skip
        files = {"model.gguf": self.client.upload_blob(gguf)}
        request = {"model": self.tag(name), "files": files}
        if adapter is not None:
            request["adapters"] = {"adapter.gguf": self.client.upload_blob(adapter)}
        self.client.create({**request, **{key: value for key, value in fields.items() if value}})
        blob = Path(self.client.show(self.tag(name)).blob_path)
        if not os.access(blob, os.R_OK):
            pytest.skip(f"the files of {self.url} cannot be read here ({blob})")
        self.store = blob.parent.parent

    def clean_up(self) -> None:
        """Delete what the test made, half-made tags included."""
        if self.fake is None:
            for row in self.client.list():
                if row.name.startswith(self.prefix):
                    with suppress(ServiceError):
                        self.client.delete(row.name)


@contextmanager
def server_under_test(folder: Path, version: str) -> Iterator[ServerUnderTest]:
    """The real server for `real`, else the test server of that version with llama.cpp behind it."""
    if version == "real":
        prefix = f"ollatune-test-{secrets.token_hex(4)}-"
        with OllamaClient(REAL_SERVER) as client:
            server = ServerUnderTest(client.endpoint.url, client, prefix=prefix)
            try:
                yield server
            finally:
                server.clean_up()
        return
    runner = LlamaCppRunner()
    try:
        with (
            FakeOllama(folder, version, generate=runner) as fake,
            OllamaClient(fake.url) as client,
        ):
            yield ServerUnderTest(fake.url, client, fake, store=folder)
    finally:
        runner.close()


def stored_config(server: ServerUnderTest, name: str) -> dict[str, Any]:
    """The config blob of a tag of this test, from the server's disk."""
    from ollatune.ollama.store import LocalStore

    assert server.store is not None
    stored = LocalStore(server.store).find(ModelName.parse(server.tag(name)))
    assert stored is not None
    return {**stored.config, "messages": stored.messages}
