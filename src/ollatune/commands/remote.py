"""Finding a base model through a running Ollama server, for the commands that take one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ollatune.config.schema import Config
from ollatune.ollama.answers import Progress
from ollatune.ollama.names import ModelName
from ollatune.ollama.store import store_roots
from ollatune.ollama.stored import StoredModel


def remote_finder(config: Config) -> Callable[[ModelName], StoredModel]:
    """A function that asks the configured server for a model, and lets it pull what it does not have."""

    def find(name: ModelName) -> StoredModel:
        from ollatune.ollama.client import OllamaClient
        from ollatune.ollama.pull import ensure_local

        models = config.ollama.models
        roots = [models] if models is not None else store_roots()
        with PullBars() as bars, OllamaClient(config.ollama.host) as client:
            return ensure_local(name, client, roots=roots, progress=bars.update)

    return find


class PullBars:
    """One tqdm bar per blob that is pulled, uploaded or pushed, on stderr; it ends with its blob."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> PullBars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def update(self, event: Progress) -> None:
        """Show one progress event of the client."""
        if not event.digest or not event.total:
            return
        if event.digest not in self._bars:
            from tqdm import tqdm

            doing = event.status.partition(" ")[0]
            short = event.digest.removeprefix("sha256:")[:12]
            self._bars[event.digest] = tqdm(
                total=event.total, unit="B", unit_scale=True, desc=f"{doing} {short}"
            )
        bar = self._bars[event.digest]
        if bar.n < event.total:
            bar.update(max(0, event.completed - bar.n))
            if bar.n >= event.total:
                bar.close()  # so that what is said next begins on a line of its own
