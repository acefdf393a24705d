"""`ollatune release`: an export becomes a version in the local registry; list, notes, aliases, going back, pushing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.log import get_logger
from ollatune.export.identity import IDENTITY_KEY
from ollatune.export.registry import LATEST, ModelRegistry, Release
from ollatune.export.release_sources import read_object
from ollatune.export.release_tags import next_tag, version_key

FIRST_TAG = "v1"
PARENT = "parent"
"""`--rollback parent` goes to the version that the current one follows."""
_LISTED_METRICS = 4
_EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class ReleaseOptions:
    """The flags of `ollatune release`. At most one of list, notes, alias, rollback and restore is done instead."""

    name: str | None = None
    tag: str | None = None
    export: Path = Path("models/ollama")
    run: Path | None = None
    summary: str = ""
    registry: Path | None = None
    list: bool = False
    notes: str | None = None
    alias: str | None = None
    rollback: str | None = None
    restore: str | None = None
    push: str | None = None
    source: str | None = None
    host: str | None = None


def run_release(options: ReleaseOptions) -> dict[str, Any]:
    """Do what the flags say. Returns the result that `--json` prints."""
    registry = ModelRegistry(options.registry)
    actions = [
        flag for flag in ("list", "notes", "alias", "rollback", "restore") if getattr(options, flag)
    ]
    if len(actions) > 1:
        raise UsageError(
            f"{' and '.join(f'--{flag}' for flag in actions)} are different things to do.",
            hint="Give one of them at a time.",
        )
    if actions == ["list"]:
        return _list(registry, options.name)
    if options.name is None:
        raise UsageError(
            "The model's name is missing.", hint="Write it first: ollatune release my-model …"
        )
    if actions:
        return _change(registry, options.name, options, actions[0])
    return _release(registry, options.name, options)


def _release(registry: ModelRegistry, name: str, options: ReleaseOptions) -> dict[str, Any]:
    tag = options.tag or _following_tag(registry, name)
    if options.push is not None:
        _require_pushable(options)
    if options.source is not None:
        _require_served(options)
    release = registry.release(
        name, tag, options.export, options.run or _run_of(options.export),
        metrics=_measured(options.export), summary=options.summary,
    )  # fmt: skip
    result = _facts(release) | {
        "action": "release",
        "folder": str(registry.folder / name / tag),
        "notes": registry.notes(name, tag),
    }
    if options.source is not None:
        result["served_as"] = _give_name(options, f"{name}:{tag}")
    if options.push is not None:
        result["pushed"] = _push(options)
    return result


def _change(
    registry: ModelRegistry, name: str, options: ReleaseOptions, action: str
) -> dict[str, Any]:
    if action == "notes":
        reference = options.notes or LATEST
        release = registry.get(name, reference)
        return _facts(release) | {"action": action, "notes": registry.notes(name, reference)}
    if action == "alias":
        release = registry.set_alias(name, options.alias or "", options.tag or LATEST)
        return _facts(release) | {"action": action, "alias": options.alias}
    if action == "rollback":
        wanted = None if options.rollback == PARENT else options.rollback
        return _facts(registry.rollback(name, wanted)) | {"action": action}
    reference = options.restore or LATEST
    files = registry.restore(name, reference, options.export)
    release = registry.get(name, reference)
    return _facts(release) | {"action": action, "files": [str(path) for path in files]}


def _list(registry: ModelRegistry, name: str | None) -> dict[str, Any]:
    names = registry.names() if name is None else [registry.get(name).name]
    return {
        "action": "list",
        "registry": str(registry.folder),
        "models": [
            {
                "name": model,
                "aliases": registry.aliases(model),
                "versions": [_facts(release) for release in registry.releases(model)],
            }
            for model in names
        ],
    }


def _facts(release: Release) -> dict[str, Any]:
    return {
        "name": release.name,
        "tag": release.tag,
        "created": release.created,
        "parent": release.parent,
        "base": dict(release.base),
        "metrics": dict(release.metrics),
        "summary": release.summary,
    }


def _following_tag(registry: ModelRegistry, name: str) -> str:
    tags = [release.tag for release in registry.releases(name)]
    return next_tag(max(tags, key=version_key)) if tags else FIRST_TAG


def _run_of(export: Path) -> Path | None:
    """The default run folder, if the export was made from it."""
    default = Path("models/trained")
    try:
        made_from = json.loads((export / "export.json").read_bytes())["checkpoint"]["run_id"]
        run_id = json.loads((default / "run.json").read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return default if run_id == made_from else None


def _measured(export: Path) -> dict[str, float]:
    """What `ollatune evaluate` measured of this export, where it did."""
    path = export / _EVALUATION_NAME
    if not path.is_file():
        return {}
    values = read_object(path).get("values")
    if not isinstance(values, dict):
        raise InputError(f"{path} has no values.", hint="Run `ollatune evaluate` again.")
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _require_pushable(options: ReleaseOptions) -> None:
    from ollatune.ollama.names import ModelName

    ModelName.parse(options.push or "")
    if "/" not in (options.push or ""):
        raise UsageError(
            f"--push {options.push} names no namespace to push to.",
            hint="Write it in full: --push USER/MODEL:TAG.",
        )
    if options.source is None:
        raise UsageError(
            "--push needs the model on the server that is to be pushed.",
            hint="Name it with --from, as in --from ramsey-model.",
        )


def _require_served(options: ReleaseOptions) -> None:
    """Raise InputError unless the server's model is the very export that is released; ServiceError."""
    from ollatune.ollama.client import OllamaClient

    assert options.source is not None
    identity = read_object(options.export / "export.json").get("identity")
    with OllamaClient(options.host) as client:
        served = client.show(options.source).metadata.get(IDENTITY_KEY)
    if identity is None or served != identity:
        raise InputError(
            f"`{options.source}` on the server is not the export in {options.export} "
            f"({IDENTITY_KEY} is {served}, {identity} was expected); nothing was released.",
            hint="Create it first: ollatune create-modelfile --create NAME.",
        )


def _give_name(options: ReleaseOptions, wanted: str) -> str:
    """The server's model under the name of the version, too. Raises UsageError where another model has that name."""
    from ollatune.ollama.client import OllamaClient
    from ollatune.ollama.failures import ModelMissing

    assert options.source is not None
    with OllamaClient(options.host) as client:
        identity = client.show(options.source).metadata.get(IDENTITY_KEY)
        try:
            there = client.show(wanted).metadata.get(IDENTITY_KEY)
        except ModelMissing:
            client.copy(options.source, wanted)
        else:
            if there != identity:
                raise UsageError(
                    f"The version is released, but the server has another model {wanted} already.",
                    hint=f"Remove that one (`ollatune models delete {wanted}`), then run this command again.",
                )
    return wanted


def _push(options: ReleaseOptions) -> dict[str, Any]:
    """Copy the server's model, which is this export, to the name to push, and push it. Raises ServiceError."""
    from ollatune.commands.remote import PullBars
    from ollatune.ollama.client import OllamaClient

    assert options.push is not None
    assert options.source is not None
    with PullBars() as bars, OllamaClient(options.host) as client:
        if options.source != options.push:
            client.copy(options.source, options.push)
        client.push(options.push, progress=bars.update)
    get_logger("release").info("Pushed %s.", options.push)
    return {"name": options.push, "from": options.source}


def release_text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    action = result["action"]
    if action == "list":
        return _list_text(result)
    if action == "notes":
        return str(result["notes"])
    if action == "alias":
        return f"{result['name']}:{result['alias']} is {result['tag']} now."
    if action == "rollback":
        return (
            f"{result['name']} is at {result['tag']} again; nothing was deleted. To serve it:\n"
            f"  ollatune release {result['name']} --restore {result['tag']} --export FOLDER\n"
            f"  ollama create {result['name']} -f FOLDER/Modelfile"
        )
    if action == "restore":
        return "\n".join(["Restored:", *(f"  {path}" for path in result["files"])])
    served = f" `ollama run {result['served_as']}` runs it." if "served_as" in result else ""
    return f"Released {result['name']} {result['tag']} in {result['folder']}.{served}\n\n{result['notes']}"


def _list_text(result: dict[str, Any]) -> str:
    if not result["models"]:
        return f"No releases in {result['registry']}."
    lines: list[str] = []
    for model in result["models"]:
        names_of: dict[str, list[str]] = {}
        for alias, tag in model["aliases"].items():
            names_of.setdefault(tag, []).append(alias)
        lines.append(model["name"])
        for version in model["versions"]:
            also = ", ".join(names_of.get(version["tag"], []))
            own = {k: v for k, v in sorted(version["metrics"].items()) if "." not in k}
            measured = ", ".join(f"{k} {v:.4g}" for k, v in list(own.items())[:_LISTED_METRICS])
            row = f"  {version['tag']:<10} {version['created'][:10]}  {also:<16} {measured}"
            lines.append(row.rstrip())
    return "\n".join(lines)
