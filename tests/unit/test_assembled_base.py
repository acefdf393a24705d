"""A base of the store in several blobs: parts of a split model put together, adapters merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ollatune.base.errors import InputError
from ollatune.export.adapter_gguf import LoraFactors, write_adapter
from ollatune.gguf.decode import decode_tensor
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.split import SplitGGUF
from ollatune.gguf.types import GGMLType, ValueType
from ollatune.gguf.writer import TensorToWrite, encode_metadata, write_gguf
from ollatune.modeling.base import resolve_base
from ollatune.ollama.names import ModelName
from tests.export_cases import lora_factors, shapes, write_small_base
from tests.fake_ollama.store import FakeStore

QUERY, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    monkeypatch.setenv("OLLATUNE_CACHE", str(tmp_path / "cache"))
    return FakeStore(tmp_path / "models")


def put(store: FakeStore, name: str, kinds: Sequence[tuple[str, Path]]) -> str:
    layers = [
        {
            "mediaType": f"application/vnd.ollama.image.{kind}",
            "digest": store.add_file(path),
            "size": path.stat().st_size,
        }
        for kind, path in kinds
    ]
    store.write(ModelName.parse(name), layers, {"model_format": "gguf", "model_family": "llama"})
    return name


def split(path: Path, num_parts: int) -> list[Path]:
    """The file in parts, as gguf-split writes them: all metadata in the first."""
    parts = []
    with GGUFFile.open(path) as file:
        names = list(file.tensors)
        size = -(-len(names) // num_parts)
        for number in range(num_parts):
            records = [file.metadata_record(key) for key in file.metadata] if number == 0 else []
            for key, value in (("no", number), ("count", num_parts)):
                records.append(encode_metadata(f"split.{key}", value, ValueType.UINT16))
            records.append(encode_metadata("split.tensors.count", len(names), ValueType.INT32))
            tensors = [
                TensorToWrite(
                    name, file.tensors[name].shape, file.tensors[name].type,
                    lambda name=name: [file.tensor_data(name)],
                )
                for name in names[number * size : (number + 1) * size]
            ]  # fmt: skip
            part = path.with_name(f"part{number}.bin")
            write_gguf(part, records, tensors)
            parts.append(part)
    return parts


def test_parts_in_any_order_are_one_base(store: FakeStore, tmp_path: Path) -> None:
    whole = write_small_base(tmp_path / "whole.gguf")
    first, second, third = split(whole, 3)
    name = put(store, "hf.co/org/Repo-GGUF:Q4_1", [("model", p) for p in (third, first, second)])
    source = resolve_base("HF.co/org/repo-gguf:q4_1", models_folder=store.root)
    assert source.name == name
    with source.open() as file, GGUFFile.open(whole) as reference:
        assert isinstance(file, SplitGGUF)
        assert dict(file.metadata) == dict(reference.metadata)
        assert file.tensors.keys() == reference.tensors.keys()
        for tensor in reference.tensors:
            assert np.array_equal(file.tensor_data(tensor), reference.tensor_data(tensor))
    again = resolve_base(name, models_folder=store.root)
    assert (again.path, again.digest) == (source.path, source.digest)
    assert not [path for path in source.path.parent.iterdir() if path.name.startswith(".")]
    put(store, name, [("model", p) for p in (first, second, third)])
    assert resolve_base(name, models_folder=store.root).digest == source.digest


def test_a_split_file_is_told_apart_by_every_part(store: FakeStore, tmp_path: Path) -> None:
    whole = write_small_base(tmp_path / "whole.gguf")
    parts = split(whole, 2)
    named = [part.rename(tmp_path / f"m-0000{i}-of-00002.gguf") for i, part in enumerate(parts, 1)]
    digest = resolve_base(str(named[0])).digest
    content = bytearray(named[1].read_bytes())
    content[-1] ^= 1
    named[1].write_bytes(content)
    assert resolve_base(str(named[0])).digest != digest


def test_files_that_are_no_parts_of_one_model(store: FakeStore, tmp_path: Path) -> None:
    whole = write_small_base(tmp_path / "whole.gguf")
    first, second, _ = split(whole, 3)
    other = write_small_base(tmp_path / "other.gguf", seed=1)
    cases = {
        "two": ([whole, other], "holds 2 files of weights, of which .* says nothing of parts"),
        "lacking": ([first, second], "is part 0 of 3: they are not the parts of one split model"),
        "strange": ([first, second, other], "says nothing of parts"),
    }
    for name, (paths, expected) in cases.items():
        put(store, name, [("model", path) for path in paths])
        with pytest.raises(InputError, match=expected):
            resolve_base(name, models_folder=store.root)
    twice = split(write_small_base(tmp_path / "again.gguf", seed=2), 3)
    put(store, "twice", [("model", path) for path in (first, second, twice[1])])
    with pytest.raises(InputError, match="lacks part 2 of its 3 parts"):
        resolve_base("twice", models_folder=store.root)


def factors(name: str, *, seed: int = 0, scale: float = 0.05) -> LoraFactors:
    a, b = lora_factors(shapes()[name], seed=seed + len(name))
    return a, b, scale


def make_adapter(base: Path, lora: dict[str, LoraFactors], path: Path) -> Path:
    with GGUFFile.open(base) as file:
        write_adapter(file, lora, path)
    return path


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.F32, GGMLType.F16])
def test_adapters_are_merged_into_the_weights(
    store: FakeStore, tmp_path: Path, kind: GGMLType
) -> None:
    base = write_small_base(tmp_path / "base.gguf", kind)
    first, second = {QUERY: factors(QUERY), DOWN: factors(DOWN)}, {QUERY: factors(QUERY, seed=9)}
    adapters = [
        make_adapter(base, lora, tmp_path / f"{number}.gguf")
        for number, lora in enumerate((first, second))
    ]
    put(store, "tuned", [("model", base), *(("adapter", path) for path in adapters)])
    source = resolve_base("tuned", models_folder=store.root)
    assert source.num_merged == 2
    with source.open() as merged, GGUFFile.open(base) as file:
        assert dict(merged.metadata) == dict(file.metadata)
        for name in file.tensors:
            if name not in (QUERY, DOWN):
                assert merged.tensors[name].type is file.tensors[name].type
                assert np.array_equal(merged.tensor_data(name), file.tensor_data(name))
                continue
            before, after = decode_tensor(file, name), decode_tensor(merged, name)
            delta = sum(
                (lora[name][2] * lora[name][1] @ lora[name][0] for lora in (first, second) if name in lora),
                start=torch.zeros_like(before),
            )  # fmt: skip
            wanted = GGMLType.Q8_0 if kind is GGMLType.Q4_1 else kind
            assert merged.tensors[name].type is wanted
            error = (after - before - delta).norm() / delta.norm()
            assert error < {GGMLType.F32: 1e-6, GGMLType.F16: 2e-3}.get(kind, 0.02), name
    stamp = source.path.stat().st_mtime_ns
    again = resolve_base("tuned", models_folder=store.root)
    assert (again.path, again.digest) == (source.path, source.digest)
    assert again.path.stat().st_mtime_ns == stamp  # made once
    put(store, "other", [("model", base), ("adapter", adapters[1])])
    assert resolve_base("other", models_folder=store.root).digest != source.digest
    looked_at = resolve_base("tuned", models_folder=store.root, merges_adapters=False)
    assert looked_at.path.parent == store.root / "blobs"


def test_a_small_adapter_on_a_coarse_grid_is_kept_in_f16(store: FakeStore, tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base.gguf", GGMLType.Q8_0)
    small = make_adapter(base, {QUERY: factors(QUERY, scale=1e-6)}, tmp_path / "a.gguf")
    put(store, "tuned", [("model", base), ("adapter", small)])
    with resolve_base("tuned", models_folder=store.root).open() as merged:
        assert merged.tensors[QUERY].type is GGMLType.F16


def rewritten(path: Path, target: Path, changes: dict[str, Any], drop: str = "") -> Path:
    """An adapter with other metadata (value by key), or without one tensor."""
    with GGUFFile.open(path) as file:
        records = [
            encode_metadata(key, changes[key], ValueType.STRING) if key in changes else file.metadata_record(key)
            for key in file.metadata
        ]  # fmt: skip
        tensors = [
            TensorToWrite(info.name, info.shape, info.type, lambda n=info.name: [file.tensor_data(n)])
            for info in file.tensors.values()
            if info.name != drop
        ]  # fmt: skip
        write_gguf(target, records, tensors)
    return target


def test_what_cannot_be_merged_is_refused_with_its_reason(store: FakeStore, tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base.gguf")
    good = make_adapter(base, {QUERY: factors(QUERY), DOWN: factors(DOWN)}, tmp_path / "good.gguf")
    cases = {
        "other-architecture": ({"general.architecture": "qwen2"}, "", "made for `qwen2`, the weights are `llama`"),
        "control-vector": ({"adapter.type": "control"}, "", "kind adapter / control, no plain LoRA"),
        "half": ({}, f"{QUERY}.lora_b", f"its `{QUERY}` is no pair of factors"),
    }  # fmt: skip
    for name, (changes, drop, expected) in cases.items():
        path = rewritten(good, tmp_path / f"{name}.gguf", changes, drop)
        put(store, name, [("model", base), ("adapter", path)])
        with pytest.raises(InputError, match="cannot be merged into its weights") as caught:
            resolve_base(name, models_folder=store.root)
        assert expected in str(caught.value)
        assert "Train from the model it was made from" in str(caught.value)
    put(
        store,
        "no-such-tensor",
        [("model", rewritten(base, tmp_path / "without.gguf", {}, QUERY)), ("adapter", good)],
    )
    with pytest.raises(InputError, match=f"the weights, which have no `{QUERY}`"):
        resolve_base("no-such-tensor", models_folder=store.root)
    assert not list((tmp_path / "cache").rglob("*.gguf"))
