"""Version tags: v1, v1.2, v1.2.3, with -name after it for a pre-release."""

from __future__ import annotations

import re

from ollatune.base.errors import UsageError

_TAG = re.compile(
    r"v?([0-9]{1,9})(?:\.([0-9]{1,9}))?(?:\.([0-9]{1,9}))?(?:-([0-9A-Za-z][0-9A-Za-z.-]{0,39}))?"
)


def is_version(tag: str) -> bool:
    """Whether `tag` is one that `version_key` takes."""
    return _TAG.fullmatch(tag) is not None


def version_key(tag: str) -> tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]:
    """Orders tags as versions (semver.org 11): v2 < v2.1-rc1 < v2.1 < v10. Raises UsageError for what is none."""
    found = _TAG.fullmatch(tag)
    if found is None:
        raise UsageError(
            f"`{tag}` is no version tag.",
            hint="Write v1, v1.2 or v1.2.3, and -name after it for a pre-release.",
        )
    major, minor, patch = (int(part or 0) for part in found.groups()[:3])
    parts = (found[4] or "").split(".") if found[4] else []
    prerelease = tuple((not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts)
    return major, minor, patch, not parts, prerelease


def next_tag(tag: str) -> str:
    """The tag after `tag`, its last number raised: v1 → v2, v1.2 → v1.3."""
    core = tag.split("-")[0]
    head, dot, last = core.rpartition(".")
    if dot:
        return f"{head}.{int(last) + 1}"
    prefix = "v" if core.startswith("v") else ""
    return f"{prefix}{int(core.removeprefix('v')) + 1}"
