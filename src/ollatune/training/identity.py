"""What a run is: its configuration, base, data and teacher; is a checkpoint, or another process, of the same run?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ollatune.base.errors import UsageError
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.data.load import DatasetSplits
from ollatune.modeling.load import Mode
from ollatune.modeling.opened import OpenBase
from ollatune.training.agreement import digest_of
from ollatune.training.changes import check_changes
from ollatune.training.environment import package_versions


@dataclass(frozen=True)
class Identity:
    """What a checkpoint says about its run."""

    run_id: str
    config: dict[str, Any]
    base: dict[str, Any]
    data_digest: str
    overrides: dict[str, Any]

    def facts(self) -> dict[str, str]:
        """What would make processes go apart where it differs."""
        kept = ("training", "advanced", "validation", "distributed")
        return {
            "base weights": self.base["digest"],
            "training data": self.data_digest,
            "settings": digest_of({key: self.config[key] for key in kept}),
            "package versions": digest_of(package_versions()),
        }


def identity_of(
    run_id: str,
    config: Config,
    base: OpenBase,
    splits: DatasetSplits,
    overrides: dict[str, Any],
    *,
    dtype: str,
    mode: Mode,
    teacher: OpenBase | None,
) -> Identity:
    """The identity of the run that these make up; `overrides` are the command line's."""
    source = base.source
    described = {
        "name": source.name,
        "digest": source.digest,
        "origin": source.origin,
        "path": str(source.path),
        "architecture": base.architecture,
        "template_digest": base.template.digest,
        "tokenizer_digest": base.tokenizer.digest,
        "dtype": dtype,
        "mode": mode,
    }
    if teacher is not None:
        described["teacher"] = teacher.source.name
        described["teacher_digest"] = teacher.source.digest
    settings = config.model_dump(mode="json")
    return Identity(run_id, settings, described, data_digest(splits), overrides)


def require_same_run(checkpoint: Checkpoint, identity: Identity, *, force: bool) -> None:
    """Raise UsageError where `checkpoint` is of another run; with `force` only settings are compared, and said."""
    check_changes(checkpoint.config, identity.config, force=force)
    pairs = (
        ("the base model", checkpoint.base["digest"], identity.base["digest"]),
        (
            "the teacher",
            checkpoint.base.get("teacher_digest", ""),
            identity.base.get("teacher_digest", ""),
        ),
        ("the training data", checkpoint.resume.get("data_digest", ""), identity.data_digest),
    )
    problems = [
        f"{what} differs ({old[:12]} → {new[:12]})"
        for what, old, new in pairs
        if checkpoint.resume and old != new
    ]
    if problems and not force:
        raise UsageError(
            f"This is not the run that the checkpoint is of: {'; '.join(problems)}.",
            hint="Put it back, start a new run in another --output, or insist with --force.",
        )


def data_digest(splits: DatasetSplits) -> str:
    """Hex sha256 of the training examples as they are trained on: tokens, targets, order of the file."""
    digest = hashlib.sha256()
    for index in range(len(splits.train)):
        example = splits.train[index]
        digest.update(example.token_ids.tobytes())
        digest.update(example.is_target.tobytes())
    return digest.hexdigest()
