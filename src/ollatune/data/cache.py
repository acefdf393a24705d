"""Data larger than memory: tokenised once, piece by piece and in parallel, then read by memory map.

A cache folder is named after everything its content depends on: the digests of the data, the template and the
tokenizer, and the settings of rendering. Pieces that a killed build finished are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ollatune.base.errors import OutOfMemoryError, StorageError
from ollatune.base.files import clean_staging, free_bytes, make_folder, staged_file, write_json
from ollatune.base.text import format_bytes
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.builder import StoreBuilder, stored_arrays
from ollatune.data.chunks import CHUNK_BYTES, Chunk, iter_chunk, plan_chunks, scan_file
from ollatune.data.conversation import Sample
from ollatune.data.load import (
    DatasetSplits,
    Method,
    check_method,
    data_sources,
    make_splits,
    source_files,
)
from ollatune.data.position import FileError, Position, RecordError
from ollatune.data.protocols import MakeRendererParts, PromptTemplate, Tokenizer
from ollatune.data.records import TEXT_FILE, RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.render import Renderer
from ollatune.data.report import RenderCounts
from ollatune.data.sources import iter_records
from ollatune.data.store import StoredArrays, TokenStore

_FORMAT_VERSION = 1
_CACHE_BYTES_PER_INPUT_BYTE = (
    1.5  # four bytes a token, a token about three characters of typical text
)

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class _Job:
    """What a worker needs beside the piece itself. Crosses process borders."""

    folder: Path
    config: DataConfig
    sources: tuple[DataSource, ...]
    method: Method
    max_length: int
    make_parts: MakeRendererParts | None
    forms: Mapping[str, tuple[str, Position] | None]
    """Per file: the record form, and the record that it was recognised from; None for text files."""


def load_cached(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    cache_folder: Path,
    make_parts: MakeRendererParts | None = None,
    max_length: int,
    method: Method = "fine-tuning",
    seed: int = 42,
    path: str | Path | None = None,
    num_workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> DatasetSplits:
    """As `load_examples`, through a cache on disk; memory use does not grow with the data.

    `make_parts` makes tokenizer and template anew in worker processes (`num_workers`, by default one per core); it
    must be picklable. Without it everything is done in this process. Raises as `load_examples` does, and StorageError
    where the cache does not fit on the disk.
    """
    sources = data_sources(config, path)
    files = [source_files(source, method) for source in sources]
    facts = [
        [scan_file(file.path, cache_folder / "files", chunk_bytes) for file in of_source]
        for of_source in files
    ]
    chunks = [
        chunk
        for source_id, of_source in enumerate(files)
        for chunk in plan_chunks(of_source, source_id, facts[source_id])
    ]
    key = _digest(
        _FORMAT_VERSION, chunk_bytes, tokenizer.digest, template.digest, method, max_length, config.targets,
        config.truncation, config.system, config.columns,
        [source.columns for source in sources],
        [[(f.path.name, f.split, fact.sha256) for f, fact in zip(*pair, strict=True)]
         for pair in zip(files, facts, strict=True)],
    )  # fmt: skip
    forms = {
        str(file.path): _first_form(file.path, source.columns or config.columns, config)
        for source, of_source in zip(sources, files, strict=True)
        for file in of_source
    }
    job = _Job(cache_folder / key, config, tuple(sources), method, max_length, make_parts, forms)
    make_folder(job.folder)
    clean_staging(job.folder)
    renderer = _make_renderer(job, tokenizer, template)
    manifests = _build(job, renderer, chunks, num_workers, progress)
    _refuse_empty_files(chunks, manifests)
    store = TokenStore([_open_chunk(job.folder, n) for n in range(len(chunks))])
    rejections = Rejections(skip_bad=config.skip_bad)
    rendering = RenderCounts()
    for manifest in manifests:
        rejections.add(_rejections(manifest, config.skip_bad))
        rendering.add(RenderCounts(**manifest["rendering"]))
    samples = functools.lru_cache(maxsize=1)(lambda number: _samples_of(job, chunks[number]))

    def sample_of(row: int) -> Sample:
        chunk_number, ordinal = store.place(row)
        return samples(chunk_number)[ordinal]

    return make_splits(
        store,
        config,
        method=method,
        max_length=max_length,
        seed=seed,
        forms={
            source.path: ", ".join(
                sorted({_form_name(forms[str(file.path)]) for file in of_source})
            )
            for source, of_source in zip(sources, files, strict=True)
        },
        rendering=rendering,
        rejections=rejections,
        sample_of=sample_of,
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _first_form(
    path: Path, columns: dict[str, str] | None, config: DataConfig
) -> tuple[str, Position] | None:
    """The form of the first good record of a file, which all workers then require."""
    reader = RecordReader(columns=columns, system=config.system)
    rejections = Rejections(skip_bad=config.skip_bad)
    for record in iter_records(path, rejections):
        try:
            reader(record)
        except RecordError as error:
            if reader.form is None:
                rejections(error)
                continue
        return (reader.form.name, record.position) if reader.form else None
    return None


def _form_name(form: tuple[str, Position] | None) -> str:
    return form[0] if form else TEXT_FILE


def _build(
    job: _Job,
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
    job: _Job,
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
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise OutOfMemoryError(
                    "A worker that prepared data was killed, most likely because memory ran out.",
                    hint="Start again, with fewer workers: what was finished is kept.",
                ) from error
            raise


_worker: tuple[_Job, Renderer] | None = None


def _start_worker(job: _Job) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert job.make_parts is not None
    _worker = (job, _make_renderer(job, *job.make_parts()))


def _work(number: int, chunk: Chunk) -> None:
    assert _worker is not None, "the pool's initializer ran"
    job, renderer = _worker
    _make_chunk(job, renderer, number, chunk)


def _make_renderer(job: _Job, tokenizer: Tokenizer, template: PromptTemplate) -> Renderer:
    return Renderer(
        tokenizer,
        template,
        max_length=job.max_length,
        targets=job.config.targets,
        truncation=job.config.truncation,
    )


def _iter_samples(
    job: _Job, chunk: Chunk, rejections: Rejections
) -> Iterator[tuple[Sample, Position]]:
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
        yield sample, record.position


def _make_chunk(job: _Job, renderer: Renderer, number: int, chunk: Chunk) -> None:
    """Write one piece: tokens and columns first, the manifest that makes them count last."""
    tokens_path, columns_path, manifest_path = _chunk_paths(job.folder, number)
    rejections = Rejections(skip_bad=job.config.skip_bad)
    with staged_file(tokens_path) as stream:
        builder = StoreBuilder(lambda tokens: stream.write(tokens.tobytes()))
        for ordinal, (sample, position) in enumerate(_iter_samples(job, chunk, rejections)):
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


def _open_chunk(folder: Path, number: int) -> StoredArrays:
    tokens_path, columns_path, _ = _chunk_paths(folder, number)
    with np.load(columns_path, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    if tokens_path.stat().st_size == 0:
        return stored_arrays(np.zeros(0, np.uint32), columns)
    return stored_arrays(np.memmap(tokens_path, np.uint32, mode="r"), columns)


def _rejections(manifest: dict[str, Any], skip_bad: bool) -> Rejections:
    found = Rejections(skip_bad=skip_bad)
    found.num_good = manifest["num_good"]
    for *position, cause, cure in manifest["rejected"]:
        found.errors.append(RecordError(Position(*position), cause, cure))
    return found


def _samples_of(job: _Job, chunk: Chunk) -> list[Sample]:
    """All samples of one piece again, by ordinal."""
    return [
        sample for sample, _ in _iter_samples(job, chunk, Rejections(skip_bad=job.config.skip_bad))
    ]


def _refuse_empty_files(chunks: Sequence[Chunk], manifests: Sequence[dict[str, Any]]) -> None:
    counts: dict[str, int] = {}
    for chunk, manifest in zip(chunks, manifests, strict=True):
        num_records = manifest["num_good"] + len(manifest["rejected"])
        counts[chunk.path] = counts.get(chunk.path, 0) + num_records
    for path, num_records in counts.items():
        if not num_records:
            raise FileError(Position(path, 1), "no record in this file", "Remove it or fill it.")
