"""The local model registry: every released version with its files, where it came from, and how to go back.

    REGISTRY/NAME/TAG/release.json   what was released; written once, never changed
    REGISTRY/NAME/TAG/NOTES.md       release notes, from what changed against the parent
    REGISTRY/NAME/TAG/model.gguf …   the export's files: the GGUF as a hard link where possible, the rest as copies
    REGISTRY/NAME/state.json         aliases (`latest` among them) and the history of `latest`

A version appears when its folder gets its name, complete; a killed release leaves a staging folder and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import (
    STAGING_PREFIX,
    clean_staging,
    fsync_folder,
    make_folder,
    sha256_file,
    storage_error,
    write_json,
    write_text,
)
from ollatune.base.folders import home_folder
from ollatune.base.text import did_you_mean
from ollatune.export.release_notes import release_notes
from ollatune.export.release_sources import (
    base_of,
    data_of,
    place_file,
    read_config,
    read_object,
    run_metrics,
    source_files,
)
from ollatune.export.release_tags import is_version, next_tag, version_key

LATEST = "latest"
_RELEASE_NAME, _NOTES_NAME, _STATE_NAME = "release.json", "NOTES.md", "state.json"
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,79}(/[A-Za-z0-9_][\w.-]{0,79})?", re.ASCII)
_ALIAS = re.compile(r"[A-Za-z_][\w.-]{0,79}", re.ASCII)


@dataclass(frozen=True)
class Release:
    """One version. `files`: name → sha256 and size_bytes. `parent`: the tag that was `latest` before, or None."""

    name: str
    tag: str
    created: str
    parent: str | None
    base: Mapping[str, Any]
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Mapping[str, Mapping[str, Any]]
    run_id: str = ""
    summary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


class ModelRegistry:
    """The registry in `folder`, by default the user's own (`default_registry_folder`)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_registry_folder() if folder is None else folder

    def names(self) -> list[str]:
        """Every model that has a version, in order."""
        found = {path.parents[1] for path in self.folder.glob(f"*/*/{_RELEASE_NAME}")}
        found |= {path.parents[1] for path in self.folder.glob(f"*/*/*/{_RELEASE_NAME}")}
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def releases(self, name: str) -> list[Release]:
        """Every version of a model, the oldest version number first; [] for an unknown name."""
        folder = self._model_folder(name)
        tags = [
            path.parent.name
            for path in folder.glob(f"*/{_RELEASE_NAME}")
            if is_version(path.parent.name)
        ]
        return [self._read(name, tag) for tag in sorted(tags, key=version_key)]

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → tag, `latest` first."""
        return dict(
            sorted(
                self._state(name)["aliases"].items(), key=lambda item: (item[0] != LATEST, item[0])
            )
        )

    def get(self, name: str, reference: str = LATEST) -> Release:
        """A version by tag or alias. Raises UsageError naming what exists."""
        tag = self.aliases(name).get(reference, reference)
        tags = [release.tag for release in self.releases(name)]
        if tag in tags:
            return self._read(name, tag)
        if not tags:
            raise UsageError(
                f"The registry {self.folder} has no model `{name}`.{did_you_mean(name, self.names())}",
                hint="List what there is with `ollatune release --list`.",
            )
        known = [*self.aliases(name), *tags]
        raise UsageError(
            f"`{name}` has no version `{reference}`.{did_you_mean(reference, known)}",
            hint=f"Versions: {', '.join(tags)}.",
        )

    def release(
        self,
        name: str,
        tag: str,
        export_folder: Path,
        run_folder: Path | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        summary: str = "",
        created: str | None = None,
    ) -> Release:
        """Take an export folder in as a new version and let `latest` name it.

        `metrics` are added to those of the run. Releasing the same files under the same tag again changes nothing.
        Raises UsageError for a bad name or a tag that is taken, InputError for an incomplete export, StorageError.
        """
        folder = make_folder(self._model_folder(name))
        clean_staging(folder)
        version_key(tag)  # raises for what is no version
        sources = source_files(export_folder, run_folder)
        files = {
            file: {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
            for file, path in sources.items()
        }
        existing = self._same_version(name, tag)
        if existing is not None:
            return self._repeated(existing, tag, files)
        parent = self.aliases(name).get(LATEST)
        run = read_object(run_folder / "run.json") if run_folder else {}
        export = read_object(export_folder / "export.json")
        release = Release(
            name=name,
            tag=tag,
            created=created or _now(),
            parent=parent,
            base=base_of(export, run),
            data=data_of(run),
            config=read_config(run_folder),
            metrics={**run_metrics(run), **(metrics or {})},
            files=files,
            run_id=str(run.get("run_id") or (export.get("checkpoint") or {}).get("run_id") or ""),
            summary=summary,
            versions={key: str(value) for key, value in (run.get("versions") or {}).items()},
        )
        previous = None if parent is None else asdict(self._read(name, parent))
        self._store(folder, release, sources, release_notes(asdict(release), previous))
        self._point(name, LATEST, tag, "release")
        return release

    def notes(self, name: str, reference: str = LATEST) -> str:
        """The release notes of a version, in Markdown."""
        release = self.get(name, reference)
        return (self._model_folder(name) / release.tag / _NOTES_NAME).read_text(encoding="utf-8")

    def set_alias(self, name: str, alias: str, reference: str) -> Release:
        """Let `alias` name a version. Raises UsageError for an alias that looks like a version, or is `latest`."""
        if not _ALIAS.fullmatch(alias) or is_version(alias):
            raise UsageError(
                f"`{alias}` cannot be an alias: it must begin with a letter and be no version."
            )
        if alias == LATEST:
            raise UsageError(
                f"`{LATEST}` is moved by releases and rollbacks.", hint="Use `--rollback TAG`."
            )
        release = self.get(name, reference)
        self._point(name, alias, release.tag, "alias")
        return release

    def rollback(self, name: str, reference: str | None = None) -> Release:
        """Let `latest` name an earlier version again: the given one, or the parent of the current.

        Nothing is deleted. Raises UsageError where there is nothing to go back to.
        """
        current = self.get(name)
        if reference is None and current.parent is None:
            raise UsageError(
                f"`{name}` {current.tag} is its first version: there is nothing to go back to."
            )
        target = self.get(name, reference if reference is not None else str(current.parent))
        if target.tag == current.tag:
            raise UsageError(f"`{name}` is at {current.tag} already.")
        self._point(name, LATEST, target.tag, "rollback")
        return target

    def restore(self, name: str, reference: str, folder: Path) -> list[Path]:
        """Put a version's files into `folder`, each checked by its digest first; returns their paths.

        Raises InputError where a file of the registry was changed or is missing, StorageError.
        """
        release = self.get(name, reference)
        stored = self._model_folder(name) / release.tag
        for file, facts in release.files.items():
            if not (stored / file).is_file() or sha256_file(stored / file) != facts["sha256"]:
                raise InputError(
                    f"{stored / file} is missing or not what was released; nothing was restored.",
                    hint="Release that version again from its training run, under a new tag.",
                )
        make_folder(folder)
        for file in release.files:
            place_file(stored / file, folder / file)
        return [folder / file for file in release.files]

    def history(self, name: str) -> list[dict[str, str]]:
        """What `latest` and the aliases were set to, the oldest first."""
        return list(self._state(name)["history"])

    def _model_folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or any(set(part) == {"."} for part in name.split("/")):
            raise UsageError(
                f"`{name}` cannot be the name of a model: letters, digits, `_`, `-` and `.`, at most one `/`."
            )
        return self.folder / name

    def _read(self, name: str, tag: str) -> Release:
        path = self._model_folder(name) / tag / _RELEASE_NAME
        try:
            return Release(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: {error}.", hint="Remove that version's folder."
            ) from error

    def _same_version(self, name: str, tag: str) -> Release | None:
        key = version_key(tag)
        return next((r for r in self.releases(name) if version_key(r.tag) == key), None)

    def _repeated(self, existing: Release, tag: str, files: Mapping[str, Any]) -> Release:
        if existing.tag != tag or existing.files != files:
            raise UsageError(
                f"`{existing.name}` {existing.tag} was released on {existing.created[:10]} with other files.",
                hint=f"Versions are never replaced: choose a new tag, such as {next_tag(existing.tag)}.",
            )
        if (
            self.aliases(existing.name).get(LATEST) == existing.parent
        ):  # killed between the two steps
            self._point(existing.name, LATEST, tag, "release")
        return existing

    def _store(
        self, folder: Path, release: Release, sources: Mapping[str, Path], notes: str
    ) -> None:
        staging = folder / f"{STAGING_PREFIX}{release.tag}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            staging.mkdir()
            for file, source in sources.items():
                place_file(source, staging / file)
            write_text(staging / _NOTES_NAME, notes)
            write_json(staging / _RELEASE_NAME, asdict(release))
            os.rename(staging, folder / release.tag)  # fails where another process was faster
        except OSError as error:
            raise storage_error(error, folder / release.tag) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        fsync_folder(folder)

    def _state(self, name: str) -> dict[str, Any]:
        path = self._model_folder(name) / _STATE_NAME
        if not path.exists():
            return {"aliases": {}, "history": []}
        return read_object(path)

    def _point(self, name: str, alias: str, tag: str, reason: str) -> None:
        state = self._state(name)
        event = {
            "at": _now(),
            "alias": alias,
            "tag": tag,
            "was": state["aliases"].get(alias, ""),
            "reason": reason,
        }
        state["aliases"][alias] = tag
        state["history"].append(event)
        write_json(self._model_folder(name) / _STATE_NAME, state)


def default_registry_folder() -> Path:
    """OLLATUNE_REGISTRY, or `ollatune/registry` in the system's folder for a user's data."""
    if configured := os.environ.get("OLLATUNE_REGISTRY"):
        return Path(configured)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", home_folder())) / "ollatune" / "registry"
    if base := os.environ.get("XDG_DATA_HOME"):
        return Path(base) / "ollatune" / "registry"
    library = home_folder() / "Library" / "Application Support"
    shared = library if library.is_dir() else home_folder() / ".local" / "share"
    return shared / "ollatune" / "registry"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
