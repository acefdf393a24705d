"""What `ollama create NAME -f MODELFILE` does, in the steps of its source (cmd/cmd.go, parser/parser.go).

FROM and ADAPTER that name a file are taken relative to the Modelfile's folder, hashed and uploaded, and sent as
`files` and `adapters` under their names; any other FROM is a model's name. All else becomes fields of `/api/create`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ollatune.ollama.client import OllamaClient
from ollatune.ollama.modelfile import Modelfile


def ollama_create(client: OllamaClient, name: str, modelfile: Path) -> None:
    """Create `name` on the server. Raises what the client raises."""
    parsed = Modelfile.parse(modelfile.read_bytes())
    folder = modelfile.absolute().parent
    request: dict[str, Any] = {"model": name}
    source = _file(folder, parsed.source)
    if source is None:
        request["from"] = parsed.source
    else:
        request["files"] = {source.name: client.upload_blob(source)}
    if parsed.adapter is not None:
        adapter = _file(folder, parsed.adapter)
        assert adapter is not None, f"no such file: {parsed.adapter}"
        request["adapters"] = {adapter.name: client.upload_blob(adapter)}
    fields = {
        "template": parsed.template, "system": parsed.system, "license": list(parsed.licenses),
        "parameters": parsed.parameters, "messages": list(parsed.messages),
        "renderer": parsed.renderer, "parser": parsed.parser, "requires": parsed.requires,
    }  # fmt: skip
    client.create({**request, **{key: value for key, value in fields.items() if value}})


def _file(folder: Path, value: str) -> Path | None:
    path = Path(value).expanduser()
    path = path if path.is_absolute() else folder / path
    return path if path.exists() else None
