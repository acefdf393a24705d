"""A checkpoint that several processes write together: a folder with a part of every tensor from each of them.

The tensors go through torch's distributed checkpoint, so that another number of processes can read them. Its own
`.metadata` is a pickle, which can carry code and is loaded without any restriction; here the same facts lie in
`layout.json`, and only tensors are stored, which are read with `weights_only=True`.

    epoch_2.shards/
        checkpoint.pt        everything that is not sharded, as in any other checkpoint
        layout.json          which part of which tensor lies where
        __0_0.distcp …       the parts, a file a process
        manifest.json        sha256 and size of every file above; the index has the manifest's own
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ollatune.base.errors import InputError, StorageError
from ollatune.base.faults import fault_point
from ollatune.base.files import sha256_file, storage_error, write_json
from ollatune.checkpoint.format import Checkpoint, read_checkpoint

CONTENT_NAME = "checkpoint.pt"
LAYOUT_NAME = "layout.json"
MANIFEST_NAME = "manifest.json"
_PART_NAME = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
}  # fmt: skip


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's part of `tensors` into `folder`, which all processes see. Every process calls it.

    Raises StorageError on all processes where one cannot write.
    """
    try:
        with _quiet():
            save(dict(tensors), storage_writer=_Writer(folder))
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        if any(word in str(first) for word in ("onnection", "gloo", "NCCL", "imed out")):
            raise RuntimeError(
                str(first)
            ) from error  # another process is gone: no fault of the disk
        what = storage_error(first, folder) if isinstance(first, OSError) else first
        raise StorageError(
            f"Process {rank} cannot write its part of {folder.name}: {str(what).splitlines()[0]}",
            hint="Every process needs the same checkpoint folder, with space in it.",
        ) from error


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, sharded as they are now, from the parts. Every process calls it. Raises InputError."""
    try:
        with _quiet():
            load(cast("dict[str, Any]", tensors), storage_reader=_Reader(folder))
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise _damaged(folder, str(first)) from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder, whole, by this process alone. Raises InputError."""
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in stored_tensors(folder).items()
    }
    try:
        with _quiet():
            load(cast("dict[str, Any]", tensors), storage_reader=_Reader(folder), no_dist=True)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise _damaged(folder, str(first)) from error
    return tensors


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape, type and parts of the tensors in `folder`, by name. Raises InputError."""
    return cast("dict[str, TensorStorageMetadata]", _read_layout(folder).state_dict_metadata)


def joined_names(
    model: Mapping[str, Tensor], optimizer: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of a model and of its optimiser's state (by parameter number) under one kind of name."""
    joined = {f"model.{name}": tensor for name, tensor in model.items()}
    for number, state in optimizer.items():
        joined |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    return joined


def split_names(
    joined: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """The reverse of `joined_names`."""
    model: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in joined.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            model[rest] = tensor
        else:
            number, _, key = rest.partition(".")
            optimizer.setdefault(int(number), {})[key] = tensor
    return model, optimizer


def read_folder(folder: Path) -> tuple[Checkpoint, str]:
    """The checkpoint in `folder` without its tensors, and the manifest's sha256; every file is compared with that.

    Raises InputError for a damaged one.
    """
    digest = check_manifest(folder)
    checkpoint = read_checkpoint(folder / CONTENT_NAME)
    checkpoint.shards = folder
    return checkpoint, digest


def with_all_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every tensor in memory, whole. Raises InputError."""
    if checkpoint.shards is None:
        return checkpoint
    model, optimizer = split_names(read_whole(checkpoint.shards))
    checkpoint.model_state_dict = model
    checkpoint.optimizer_state_dict = checkpoint.optimizer_state_dict | {"state": optimizer}
    checkpoint.shards = None
    return checkpoint


def write_manifest(folder: Path) -> tuple[str, int]:
    """Note the digest of every file in `folder`; returns the manifest's own sha256 and the size of all files."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    sizes = {path.name: path.stat().st_size for path in paths}
    files = {
        path.name: {"sha256": sha256_file(path), "size_bytes": sizes[path.name]} for path in paths
    }
    write_json(folder / MANIFEST_NAME, {"files": files})
    return sha256_file(folder / MANIFEST_NAME), sum(sizes.values())


def check_manifest(folder: Path) -> str:
    """The manifest's sha256, after every file was compared with it. Raises InputError for a damaged folder."""
    try:
        content = (folder / MANIFEST_NAME).read_bytes()
        files = json.loads(content)["files"]
        known = {name: (entry["sha256"], entry["size_bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, f"its {MANIFEST_NAME} cannot be read") from error
    if missing := {CONTENT_NAME, LAYOUT_NAME} - known.keys():
        raise _damaged(folder, f"{', '.join(sorted(missing))} is missing")
    for name, (digest, size) in known.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        if path.stat().st_size != size or sha256_file(path) != digest:
            raise _damaged(folder, f"{name} is not what was written")
    return hashlib.sha256(content).hexdigest()


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder} is damaged: {reason}.", hint="Use an earlier checkpoint, or --resume auto."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # A single process reads and writes without a process group on purpose.
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable)")
        warnings.filterwarnings("ignore", message=".*`_get_pg_default_device`.*")
        yield


class _Writer(FileSystemWriter):
    """Torch's writer with a JSON layout in place of the pickle."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        fault_point("save.part")
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for part in results for result in part}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), f"{name} is not a tensor"
            parts = []
            for number, chunk in enumerate(stored.chunks):
                place = places[MetadataIndex(name, chunk.offsets, number)]
                parts.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": place.relative_path,
                        "start": place.offset,
                        "length": place.length,
                    }
                )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "size": list(stored.size), "parts": parts}
        write_json(Path(self.path) / LAYOUT_NAME, {"format": 1, "tensors": tensors})


class _Reader(FileSystemReader):
    """Torch's reader of folders that `_Writer` wrote; there is no pickle to load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_layout(Path(self.path))


def _read_layout(folder: Path) -> Metadata:
    """`layout.json` as torch's metadata. Every value is checked: a file name cannot lead out of the folder."""
    try:
        content = json.loads((folder / LAYOUT_NAME).read_bytes())
        if content["format"] != 1:
            raise _damaged(folder, f"layout format {content['format']} is not known")
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, StorageInfo] = {}
        for name, entry in content["tensors"].items():
            chunks = []
            for number, part in enumerate(entry["parts"]):
                if not _PART_NAME.fullmatch(part["file"]):
                    raise _damaged(folder, f"`{part['file']}` is not the name of a part")
                chunk = ChunkStorageMetadata(_size(part["offsets"]), _size(part["sizes"]))
                chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets, number)] = StorageInfo(
                    part["file"], int(part["start"]), int(part["length"])
                )
            if sum(math.prod(c.sizes) for c in chunks) != math.prod(_size(entry["size"])):
                raise _damaged(folder, f"the parts of {name} do not make it up")
            properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, _size(entry["size"]), chunks)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(folder, f"its {LAYOUT_NAME} cannot be read") from error
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def _size(values: list[int]) -> torch.Size:
    return torch.Size([int(value) for value in values])
