"""Damaged GGUF files by the thousand: the reader ends with GGUFError or a consistent file, soon, in little memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ollatune.base.errors import GGUFError
from ollatune.gguf.reader import GGUFFile
from tests.gguf_files import STRING, UINT32, Draft, Tensor, record, small_model

MEMORY_SAMPLES_EVERY = 20
SECONDS_PER_MUTANT = 1.0
EXTREMES = [
    0, 1, 2, 3, 8, 9, 31, 0x7F, 0xFF, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
    2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1,
]  # fmt: skip


def seeds() -> list[bytes]:
    """Small good files of different make."""
    aligned = small_model()
    aligned.records = [*aligned.records[:4], record("general.alignment", 64, UINT32)]
    aligned.alignment = 64
    vocabulary_only = Draft(
        [record("general.architecture", "x", STRING), *small_model().records[-3:]]
    )
    many = Draft([], [Tensor(f"blk.{i}.w", (32, 1), 8) for i in range(12)])
    drafts = [small_model(), small_model(2), aligned, vocabulary_only, many]
    return [draft.build() for draft in drafts]


def flip_bits(rng: random.Random, content: bytearray, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, content: bytearray, other: bytes) -> None:
    del content[rng.randrange(len(content)) :]


def extreme_number(rng: random.Random, content: bytearray, other: bytes) -> None:
    width = rng.choice((4, 8))
    at = rng.randrange(4, max(5, len(content) - width))
    number = rng.choice(EXTREMES) % (1 << 8 * width)
    content[at : at + width] = number.to_bytes(width, "little")


def extreme_count(rng: random.Random, content: bytearray, other: bytes) -> None:
    struct.pack_into("<Q", content, rng.choice((8, 16)), rng.choice((*EXTREMES, 60_000, 65_536)))


def splice(rng: random.Random, content: bytearray, other: bytes) -> None:
    cut, start = rng.randrange(len(content)), rng.randrange(len(other))
    content[cut:] = other[start:]


def repeat(rng: random.Random, content: bytearray, other: bytes) -> None:
    start = rng.randrange(len(content))
    piece = content[start : start + rng.randrange(1, 80)]
    at = rng.randrange(24, len(content))
    content[at:at] = piece * rng.choice((1, 1, 3))


def remove(rng: random.Random, content: bytearray, other: bytes) -> None:
    start = rng.randrange(4, len(content))
    del content[start : start + rng.randrange(1, 60)]


MUTATIONS: list[Callable[[random.Random, bytearray, bytes], None]] = [
    flip_bits, truncate, extreme_number, extreme_number, extreme_count, splice, repeat, remove,
]  # fmt: skip


def mutants(seed: int, number: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    good = seeds()
    for _ in range(number):
        content = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if len(content) > 32:
                rng.choice(MUTATIONS)(rng, content, rng.choice(good))
        yield bytes(content)


def read_everything(path: Path) -> None:
    with GGUFFile.open(path) as file:
        size = path.stat().st_size
        for key in file.metadata:
            file.metadata[key]
            assert file.metadata_record(key)
        for name, info in file.tensors.items():
            assert info.offset + info.size_bytes <= size
            assert file.tensor_data(name).size == info.size_bytes


def test_the_seeds_are_good(tmp_path: Path) -> None:
    for content in seeds():
        (tmp_path / "seed.gguf").write_bytes(content)
        read_everything(tmp_path / "seed.gguf")


@pytest.mark.parametrize(
    ("seed", "num_mutants"), [(1, 4_000), pytest.param(2, 20_000, marks=pytest.mark.slow)]
)
def test_mutants_end_in_success_or_gguf_error(tmp_path: Path, seed: int, num_mutants: int) -> None:
    outcomes = {"read": 0, "refused": 0}
    for number, content in enumerate(mutants(seed, num_mutants)):
        # A new name each time: to truncate a file that was just written makes ext4 flush it.
        path = tmp_path / f"mutant-{number}.gguf"
        path.write_bytes(content)
        is_sampled = number % MEMORY_SAMPLES_EVERY == 0
        if is_sampled:
            tracemalloc.start()
        started = time.thread_time()
        try:
            read_everything(path)
            outcomes["read"] += 1
        except GGUFError:
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"mutant {number} raised {error!r}: {content[:80].hex()}…")
        assert time.thread_time() - started < SECONDS_PER_MUTANT, f"mutant {number} is slow"
        if is_sampled:
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak_bytes < 4 * len(content) + (1 << 20), f"mutant {number}: {peak_bytes} bytes"
        path.unlink()
    # Both outcomes must occur often, or the mutations test nothing.
    assert min(outcomes.values()) > num_mutants // 20, outcomes


def test_a_large_file_of_zeros_after_a_huge_count_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    key = record("tokens", [], 9, STRING)[:-8]
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<Q", 2**30))
        stream.truncate(2**34)  # sparse: takes no room on disk, yet every element would fit
    started = time.thread_time()
    with pytest.raises(GGUFError, match="elements, at most"):
        read_everything(path)
    assert time.thread_time() - started < SECONDS_PER_MUTANT
