"""Read a GGUF file: memory-mapped, header parsed in well under a second, damage reported as GGUFError only."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import GGUFError
from ollatune.base.text import did_you_mean, printable
from ollatune.gguf.foreign import recognise
from ollatune.gguf.header import TRUNCATED_HINT, HeaderCursor, TensorInfo
from ollatune.gguf.metadata import Metadata, MetadataValue
from ollatune.gguf.types import GGUF_MAGIC, ValueType

__all__ = ["GGUFFile", "MetadataValue", "TensorInfo"]


class GGUFFile:
    """An open GGUF file; a context manager. Metadata and views handed out stay valid after `close`."""

    path: Path
    paths: tuple[Path, ...]
    version: int
    alignment: int
    data_offset: int
    size_bytes: int
    metadata: Mapping[str, MetadataValue]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.paths = (path,)
        self._content = content
        self.size_bytes = len(content)
        cursor = HeaderCursor(path, content)
        self.version, num_tensors, num_records = cursor.header()
        records = cursor.records(num_records)
        self._metadata = Metadata(path, content[: cursor.position], records)
        self.metadata = self._metadata
        self.alignment = self._metadata.alignment()
        descriptions = cursor.tensor_descriptions(num_tensors)
        self.data_offset = -(-cursor.position // self.alignment) * self.alignment
        self.tensors = _place_tensors(
            path, descriptions, self.data_offset, self.alignment, self.size_bytes
        )

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read the header of `path`. Raises GGUFError where it is missing, no GGUF, damaged or unsupported."""
        path = Path(path)
        return cls(path, _map_file(path))

    @property
    def architecture(self) -> str:
        """`general.architecture`, or '' where the file names none."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def tensor(self, name: str) -> TensorInfo:
        """The description of tensor `name`. Raises GGUFError with the nearest name where there is none."""
        found = self.tensors.get(name)
        if found is None:
            near = did_you_mean(name, self.tensors).strip()
            raise GGUFError(self.path, None, printable(name), "no such tensor", hint=near)
        return found

    def tensor_data(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of tensor `name`: a read-only one-dimensional view of the mapped file."""
        info = self.tensor(name)
        if self._content.closed:
            raise GGUFError(self.path, None, printable(name), "the file has been closed")
        return np.frombuffer(self._content, np.uint8, info.size_bytes, info.offset)

    def release_pages(self, name: str) -> None:
        """Let the system take back the memory that holds tensor `name`; reading it again is still possible."""
        if not hasattr(mmap, "MADV_DONTNEED") or self._content.closed:
            return
        info = self.tensor(name)
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = info.offset + info.size_bytes - first
        if length > 0:
            self._content.madvise(mmap.MADV_DONTNEED, first, length)

    def metadata_record(self, key: str) -> bytes:
        """The exact bytes of one record: key, type and value. Raises GGUFError where there is none."""
        return self._metadata.record_bytes(key)

    def metadata_type(self, key: str) -> ValueType:
        """The stored type of `key`; ARRAY for arrays. Raises GGUFError where there is none."""
        return self._metadata.record(key).value_type

    def metadata_element_type(self, key: str) -> ValueType | None:
        """The element type of an array, None for other values. Raises GGUFError where there is no such key."""
        return self._metadata.record(key).element_type

    def close(self) -> None:
        """Let go of the file. Where views of it are still in use, the last of them does so instead."""
        with contextlib.suppress(BufferError):
            self._content.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _map_file(path: Path) -> mmap.mmap:
    """`path` mapped for reading, once its first bytes are known to be those of a GGUF file."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise GGUFError(path, None, "file", "this is a folder", hint="Name a .gguf file in it.")
        if not stat.S_ISREG(mode):  # a pipe would block, a device never end
            raise GGUFError(path, None, "file", "this is no regular file")
        with path.open("rb") as stream:
            beginning = stream.read(512)
            if beginning[:4] != GGUF_MAGIC:
                reason, hint = recognise(beginning)
                raise GGUFError(path, 0, "magic", reason, hint=hint)
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except GGUFError:
        raise
    except FileNotFoundError:
        raise GGUFError(
            path, None, "file", "no such file", hint="Check the path's spelling."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GGUFError(path, None, "file", f"cannot be read: {reason}") from error


def _place_tensors(
    path: Path, descriptions: list[TensorInfo], data_offset: int, alignment: int, file_size: int
) -> dict[str, TensorInfo]:
    """The tensors by name with absolute offsets, once they are known to lie apart and inside the file."""
    placed: dict[str, TensorInfo] = {}
    for tensor in descriptions:
        name = printable(tensor.name)
        if tensor.name in placed:
            raise GGUFError(path, None, name, "this tensor name occurs twice")
        if tensor.offset % alignment:
            reason = f"data offset {tensor.offset} is not a multiple of the alignment {alignment}"
            raise GGUFError(path, None, name, reason)
        offset = data_offset + tensor.offset
        if offset + tensor.size_bytes > file_size:
            reason = f"its data end at byte {offset + tensor.size_bytes}, the file at {file_size}"
            raise GGUFError(path, None, name, reason, hint=TRUNCATED_HINT)
        placed[tensor.name] = TensorInfo(
            tensor.name, tensor.shape, tensor.type, offset, tensor.size_bytes
        )
    in_order = sorted(placed.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.size_bytes > after.offset:
            reason = f"its data overlap those of {printable(before.name)}"
            raise GGUFError(path, after.offset, printable(after.name), reason)
    return placed
