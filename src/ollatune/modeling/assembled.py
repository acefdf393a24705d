"""A base of Ollama's store that is more than one GGUF: split weights are put together, adapters merged into them.

What is made here lies in the user's cache, is named by the blobs it was made from, and is made once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.base.files import STAGING_PREFIX, make_folder, storage_error
from ollatune.base.folders import user_cache_folder
from ollatune.base.log import get_logger
from ollatune.gguf.codecs import quantize
from ollatune.gguf.decode import decode_tensor
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.recovery import is_accepted, measure_recovery
from ollatune.gguf.split import open_gguf
from ollatune.gguf.types import GGMLType
from ollatune.gguf.writer import Chunk, TensorToWrite, write_gguf

_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_NAME_CHARACTERS = 32
_MERGE_VERSION = "1"
"""Part of a merged base's digest: raise it when the merged weights would become others."""


def digest_of_parts(digests: Sequence[str]) -> str:
    """One hex digest for weights in several files: that of the only one, or one over all of them in their order."""
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    )


def in_order(paths: Sequence[Path], name: str) -> list[Path]:
    """The blobs of a split model in the order that their metadata give. Raises InputError where they are not the parts
    of one model."""
    if len(paths) == 1:
        return list(paths)
    numbered: dict[int, Path] = {}
    for path in paths:
        with GGUFFile.open(path) as part:
            number, count = part.metadata.get("split.no"), part.metadata.get("split.count")
        if not isinstance(number, int) or count != len(paths):
            stated = "says nothing of parts" if number is None else f"is part {number} of {count}"
            raise InputError(
                f"{name} holds {len(paths)} files of weights, of which {path.name[:19]} {stated}: they are not the "
                "parts of one split model.",
                hint="Pull the model again, or pass a .gguf file with --model.",
            )
        numbered[number] = path
    if sorted(numbered) != list(range(len(paths))):
        missing = next(i for i in range(len(paths)) if i not in numbered)
        raise InputError(
            f"{name} lacks part {missing} of its {len(paths)} parts, and has another twice.",
            hint="Pull the model again.",
        )
    return [numbered[number] for number in sorted(numbered)]


def linked_parts(parts: Sequence[Path], digest: str) -> Path:
    """The first of links to the parts under the names that every reader of split models looks for.

    Raises StorageError where no link can be made.
    """
    folder = make_folder(user_cache_folder() / "split-bases" / digest[:_NAME_CHARACTERS])
    links = [
        folder / f"model-{number:05d}-of-{len(parts):05d}.gguf"
        for number in range(1, len(parts) + 1)
    ]
    for link, part in zip(links, parts, strict=True):
        if link.exists() and link.samefile(part):
            continue
        staged = link.with_name(f"{STAGING_PREFIX}{link.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            try:
                staged.symlink_to(part.resolve())
            except OSError:  # not everybody may make symbolic links on Windows
                os.link(part, staged)
            os.replace(staged, link)
        except OSError as error:
            raise storage_error(error, link) from error
    return links[0]


@dataclass(frozen=True)
class _Pair:
    """Factors of one tensor: A [..., rank, in], B [..., out, rank], and what B·A is multiplied with."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weights: Tensor) -> Tensor:
        return weights + self.scale * (self.b @ self.a)


def merged_base(
    weights: Path, adapters: Sequence[Path], digests: Sequence[str], name: str
) -> tuple[Path, str]:
    """A GGUF of `weights` with the LoRA `adapters` merged in, and the hex digest that stands for it.

    `digests`: of the weights and of each adapter. A tensor that is merged into is stored as Q8_0, or F16 where less
    of the adapter would survive; floating-point ones keep their type. Raises InputError, with the reason, where an
    adapter cannot be merged; StorageError.
    """
    digest = hashlib.sha256("\0".join(("merged", _MERGE_VERSION, *digests)).encode()).hexdigest()
    target = user_cache_folder() / "merged-bases" / f"{digest[:_NAME_CHARACTERS]}.gguf"
    if target.is_file():
        return target, digest
    with open_gguf(weights) as base:
        pairs: dict[str, list[_Pair]] = {}
        for path in adapters:
            for tensor, pair in _read_adapter(path, base, name).items():
                pairs.setdefault(tensor, []).append(pair)
        make_folder(target.parent)
        get_logger("modeling").info(
            "%s carries %d LoRA adapter(s) on top of its weights; merging them into %d tensors, once (%s).",
            name, len(adapters), len(pairs), target,
        )  # fmt: skip
        tensors = [_to_write(base, tensor, pairs.get(tensor, ())) for tensor in base.tensors]
        records = [base.metadata_record(key) for key in base.metadata]
        write_gguf(target, records, tensors, alignment=base.alignment)
    return target, digest


def _to_write(base: GGUFFile, name: str, pairs: Sequence[_Pair]) -> TensorToWrite:
    info = base.tensors[name]
    if not pairs:

        def copied() -> Iterator[Chunk]:
            yield base.tensor_data(name)
            base.release_pages(name)

        return TensorToWrite(name, info.shape, info.type, copied)
    kind = _merged_type(base, name, pairs)

    def merged() -> Iterator[Chunk]:
        yield quantize(_merged(decode_tensor(base, name), pairs), kind).reshape(-1).numpy()
        base.release_pages(name)

    return TensorToWrite(name, info.shape, kind, merged)


def _merged(weights: Tensor, pairs: Sequence[_Pair]) -> Tensor:
    for pair in pairs:
        weights = pair.added_to(weights)
    return weights


def _merged_type(base: GGUFFile, name: str, pairs: Sequence[_Pair]) -> GGMLType:
    info = base.tensors[name]
    if info.type in _FLOATS:
        return info.type
    if info.shape[-1] % GGMLType.Q8_0.block_size:
        return GGMLType.F16
    before = decode_tensor(base, name)
    after = _merged(before, pairs)
    kept = measure_recovery(before, after, quantize(after, GGMLType.Q8_0), GGMLType.Q8_0)
    return GGMLType.Q8_0 if kept is None or is_accepted(kept) else GGMLType.F16


def _read_adapter(path: Path, base: GGUFFile, name: str) -> dict[str, _Pair]:
    """The pairs of a GGUF adapter by the tensor they belong to, as llama.cpp reads them (src/llama-adapter.cpp)."""
    with GGUFFile.open(path) as file:
        kind = (file.metadata.get("general.type"), file.metadata.get("adapter.type"))
        if kind != ("adapter", "lora") or "adapter.alora.invocation_tokens" in file.metadata:
            raise _not_mergeable(
                name, path, f"it is of the kind {' / '.join(map(str, kind))}, no plain LoRA"
            )
        if file.architecture != base.architecture:
            raise _not_mergeable(
                name,
                path,
                f"it was made for `{file.architecture}`, the weights are `{base.architecture}`",
            )
        stated = file.metadata.get("adapter.lora.alpha", 0.0)
        alpha = float(stated) if isinstance(stated, int | float) else 0.0
        pairs: dict[str, _Pair] = {}
        for stem in sorted(
            {tensor.removesuffix(".lora_a").removesuffix(".lora_b") for tensor in file.tensors}
        ):
            if not {f"{stem}.lora_a", f"{stem}.lora_b"} <= file.tensors.keys():
                raise _not_mergeable(name, path, f"its `{stem}` is no pair of factors")
            a, b = decode_tensor(file, f"{stem}.lora_a"), decode_tensor(file, f"{stem}.lora_b")
            if (
                stem == "token_embd.weight"
            ):  # stored the other way round, for rows are looked up there
                a, b = b.T, a
            rank = b.shape[-1]
            shape = base.tensors[stem].shape if stem in base.tensors else None
            if shape != (*b.shape[:-1], a.shape[-1]) or a.shape[-2] != rank:
                where = f"`{stem}` {shape}" if shape else f"the weights, which have no `{stem}`"
                factors = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise _not_mergeable(name, path, f"its factors {factors} do not fit {where}")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise _not_mergeable(name, path, f"its `{stem}` holds NaN or infinity")
            pairs[stem] = _Pair(a, b, alpha / rank if alpha else 1.0)
    if not pairs:
        raise _not_mergeable(name, path, "it holds no factors")
    return pairs


def _not_mergeable(name: str, path: Path, reason: str) -> InputError:
    return InputError(
        f"{name} carries a LoRA adapter that cannot be merged into its weights: {reason} ({path.name[:19]}). Training "
        "on the weights alone would silently drop what the adapter has learned.",
        hint="Train from the model it was made from, or from one whose adapter is merged.",
    )
