"""Models split over several files (`NAME-00001-of-00004.gguf`), read as if they were one.

llama.cpp's gguf-split writes all metadata into the first part, with `split.no`, `split.count` and
`split.tensors.count`; the other parts hold tensors. Source: tools/gguf-split of llama.cpp.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import GGUFError
from ollatune.base.text import printable
from ollatune.gguf.reader import GGUFFile, TensorInfo

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPLIT_KEYS = "split."
_MAX_PARTS = 1024


def open_gguf(path: str | Path) -> GGUFFile:
    """Open `path`; where it is one part of a split model, all parts together. Raises GGUFError."""
    file = GGUFFile.open(path)
    count = file.metadata.get("split.count", 1)
    if count == 1:
        return file
    file.close()
    if not isinstance(count, int) or not 1 < count <= _MAX_PARTS:
        raise GGUFError(path, None, "split.count", f"{printable(str(count))} is no number of parts")
    return SplitGGUF(_open_parts(part_paths(Path(path), count)))


def part_paths(path: Path, count: int) -> list[Path]:
    """The paths of all parts of the split model that `path` belongs to. Raises GGUFError where the name is another."""
    found = _PART_NAME.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        raise GGUFError(
            path,
            None,
            "split.count",
            f"this is one of {count} parts, but it is not called NAME-00001-of-{count:05d}.gguf",
            hint="Give the parts the names they were published with, or merge them with llama-gguf-split.",
        )
    return [
        path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    ]


def _open_parts(paths: Sequence[Path]) -> list[GGUFFile]:
    if missing := [path.name for path in paths if not path.is_file()]:
        raise GGUFError(
            paths[0],
            None,
            "split.count",
            f"{len(missing)} of {len(paths)} parts are missing, first {printable(missing[0])}",
            hint="Put all parts into one folder.",
        )
    with contextlib.ExitStack() as opened:
        parts = [opened.enter_context(GGUFFile.open(path)) for path in paths]
        for number, part in enumerate(parts):
            stated = part.metadata.get("split.no"), part.metadata.get("split.count")
            if stated != (number, len(parts)):
                reason = (
                    f"part {stated[0]} of {stated[1]}, part {number} of {len(parts)} was expected"
                )
                raise GGUFError(part.path, None, "split.no", reason)
        opened.pop_all()
    return parts


class SplitGGUF(GGUFFile):
    """Several parts with the interface of one file.

    Metadata are those of the first part without the `split.` keys, so that an export of it is one whole file.
    A tensor's `offset` counts from the start of its own part.
    """

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        first = parts[0]
        self.parts = list(parts)
        self.path, self.version = first.path, first.version
        self.alignment, self.data_offset = first.alignment, first.data_offset
        self.paths = tuple(part.path for part in parts)
        self.size_bytes = sum(part.size_bytes for part in parts)
        self._metadata = first._metadata.without(_SPLIT_KEYS)
        self.metadata = self._metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._part_of: dict[str, GGUFFile] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise GGUFError(part.path, None, printable(name), "is in another part, too")
                self.tensors[name], self._part_of[name] = info, part
        expected = first.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            reason = f"{printable(str(expected))} stated, the parts hold {len(self.tensors)}"
            raise GGUFError(first.path, None, "split.tensors.count", reason)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        return open_gguf(path)

    def tensor_data(self, name: str) -> npt.NDArray[np.uint8]:
        return self._part_of[self.tensor(name).name].tensor_data(name)

    def release_pages(self, name: str) -> None:
        self._part_of[self.tensor(name).name].release_pages(name)

    def close(self) -> None:
        for part in self.parts:
            part.close()
