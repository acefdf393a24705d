"""Tokenising one data set piece by piece, in this process or several; finished pieces are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ollatune.base.errors import OutOfMemoryError, StorageError
from ollatune.base.faults import fault_point
from ollatune.base.files import free_bytes, staged_file, write_json
from ollatune.base.signals import StopSignal
from ollatune.base.text import format_bytes
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.builder import StoreBuilder, stored_arrays
from ollatune.data.chunks import Chunk, iter_chunk
from ollatune.data.conversation import Sample
from ollatune.data.forms import Seen
from ollatune.data.load import Method, check_method
from ollatune.data.position import Position, RecordError
from ollatune.data.progress import Progress
from ollatune.data.protocols import MakeRendererParts, PromptTemplate, Tokenizer
from ollatune.data.records import RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.render import Renderer
from ollatune.data.store import StoredArrays

# Four bytes a token, and a token about three characters of typical text.
_CACHE_BYTES_PER_INPUT_BYTE = 1.5


@dataclass(frozen=True)
class CacheJob:
    """What a worker needs beside the piece itself. Crosses process borders."""

    folder: Path
    config: DataConfig
    sources: tuple[DataSource, ...]
    method: Method
    max_length: int
    make_parts: MakeRendererParts | None
    forms: Mapping[str, tuple[str, Position] | None]
    """Per file: the record form, and the record that it was recognised from; None for text files."""


def build_chunks(
    job: CacheJob,
    renderer: Renderer,
    chunks: Sequence[Chunk],
    num_workers: int | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Manifests of all pieces, making those that are not there yet."""
    total = sum(chunk.num_bytes for chunk in chunks)
    manifests = [_read_manifest(job.folder, number) for number in range(len(chunks))]
    missing = [number for number, manifest in enumerate(manifests) if manifest is None]
    done = total - sum(chunks[number].num_bytes for number in missing)
    needed = int(sum(chunks[n].num_bytes for n in missing) * _CACHE_BYTES_PER_INPUT_BYTE)
    if needed > (free := free_bytes(job.folder)):
        raise StorageError(
            f"The tokenised data needs about {format_bytes(needed)} in {job.folder}, {format_bytes(free)} are free.",
            hint="Free some space, or name another cache folder in OLLATUNE_CACHE.",
        )
    if progress:
        progress(done, total)
    for number in _run(job, renderer, chunks, missing, num_workers):
        manifests[number] = _read_manifest(job.folder, number)
        done += chunks[number].num_bytes
        if progress:
            progress(done, total)
    return [manifest for manifest in manifests if manifest is not None]


def _run(
    job: CacheJob,
    renderer: Renderer,
    chunks: Sequence[Chunk],
    missing: Sequence[int],
    num_workers: int | None,
) -> Iterator[int]:
    """Make the missing pieces; yields the number of each in order. The first bad record in file order is raised."""
    workers = min(len(missing), num_workers or os.cpu_count() or 1)
    if workers <= 1 or job.make_parts is None:
        for number in missing:
            _make_chunk(job, renderer, number, chunks[number])
            yield number
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
    ) as pool:
        futures: list[Future[None]] = [
            pool.submit(_work, number, chunks[number]) for number in missing
        ]
        try:
            for number, future in zip(missing, futures, strict=True):
                future.result()
                yield number
        except BaseException as error:
            workers_left = list(pool._processes.values()) if pool._processes else []
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, StopSignal):  # nobody waits for the pieces in progress
                for worker in workers_left:
                    worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise OutOfMemoryError(
                    "A worker that prepared data was killed, most likely because memory ran out.",
                    hint="Start again, with fewer workers: what was finished is kept.",
                ) from error
            raise


_worker: tuple[CacheJob, Renderer] | None = None


def _start_worker(job: CacheJob) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert job.make_parts is not None
    _worker = (job, make_renderer(job, *job.make_parts()))


def _end_with_parent() -> None:
    """A pool's workers wait for ever when the parent was killed: they hold both ends of their own queue."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _work(number: int, chunk: Chunk) -> None:
    assert _worker is not None, "the pool's initializer ran"
    job, renderer = _worker
    _make_chunk(job, renderer, number, chunk)


def make_renderer(job: CacheJob, tokenizer: Tokenizer, template: PromptTemplate) -> Renderer:
    """A renderer with the settings of the job."""
    return Renderer(
        tokenizer,
        template,
        max_length=job.max_length,
        targets=job.config.targets,
        truncation=job.config.truncation,
    )


def iter_chunk_samples(
    job: CacheJob, chunk: Chunk, rejections: Rejections, seen: Seen | None = None
) -> Iterator[tuple[Sample, Position]]:
    """Good samples of one piece, in normal form; what they had is added to `seen`. Raises what `Rejections` raises."""
    columns = job.sources[chunk.source_id].columns or job.config.columns
    reader = RecordReader(columns=columns, system=job.config.system)
    if form := job.forms[chunk.path]:
        reader.fix_form(*form)
    for record in iter_chunk(chunk, rejections):
        try:
            sample = reader(record)
            check_method(sample, record.position, job.method)
        except RecordError as error:
            rejections(error)
            continue
        fault_point("data.record")
        yield sample, record.position
    if seen is not None:
        seen.add(reader.seen)


def _make_chunk(job: CacheJob, renderer: Renderer, number: int, chunk: Chunk) -> None:
    """Write one piece: tokens and columns first, the manifest that makes them count last."""
    tokens_path, columns_path, manifest_path = _chunk_paths(job.folder, number)
    rejections, seen = Rejections(skip_bad=job.config.skip_bad), Seen()
    with staged_file(tokens_path) as stream:
        builder = StoreBuilder(lambda tokens: stream.write(tokens.tobytes()))
        samples = iter_chunk_samples(job, chunk, rejections, seen)
        for ordinal, (sample, position) in enumerate(samples):
            try:
                rendered = renderer(sample, position)
            except RecordError as error:
                rejections(error)
                continue
            rejections.num_good += 1
            builder.add(
                sample, rendered, source_id=chunk.source_id, split=chunk.split, ordinal=ordinal
            )
        num_bytes = stream.tell()
    with staged_file(columns_path) as stream:
        np.savez(stream, **builder.columns())  # type: ignore[arg-type]
    write_json(
        manifest_path,
        {
            "tokens_bytes": num_bytes,
            "num_good": rejections.num_good,
            "rejected": [[*error.position, error.cause, error.cure] for error in rejections.errors],
            "rendering": asdict(builder.counts),
            "unused": sorted(seen.unused),
            "columns": sorted(seen.columns),
        },
    )


def _chunk_paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    stem = folder / f"chunk-{number:06d}"
    return stem.with_suffix(".tokens"), stem.with_suffix(".npz"), stem.with_suffix(".json")


def _read_manifest(folder: Path, number: int) -> dict[str, Any] | None:
    """The manifest of a finished piece; None if it was never finished or its files are not whole."""
    tokens_path, columns_path, manifest_path = _chunk_paths(folder, number)
    with suppress(OSError, ValueError, KeyError):
        manifest: dict[str, Any] = json.loads(manifest_path.read_text())
        if tokens_path.stat().st_size == manifest["tokens_bytes"] and columns_path.exists():
            return manifest
    return None


def open_chunk(folder: Path, number: int) -> StoredArrays:
    """A finished piece; its tokens stay on disk."""
    tokens_path, columns_path, _ = _chunk_paths(folder, number)
    with np.load(columns_path, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    return stored_arrays(tokens_path, columns)
