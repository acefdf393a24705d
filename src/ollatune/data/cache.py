"""Data larger than memory: tokenised once, piece by piece and in parallel, then read by memory map.

A cache folder is named after everything its content depends on: the digests of the data, the template and the
tokenizer, and the settings of rendering. Pieces that a killed build finished are kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ollatune.base.files import clean_staging, make_folder, storage_error
from ollatune.base.locks import LocksUnsupportedError, try_lock
from ollatune.base.log import get_logger
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.cache_build import (
    CacheJob,
    build_chunks,
    iter_chunk_samples,
    make_renderer,
    open_chunk,
)
from ollatune.data.chunks import CHUNK_BYTES, Chunk, plan_chunks, scan_file
from ollatune.data.conversation import Sample
from ollatune.data.forms import TEXT_FILE, Seen
from ollatune.data.load import (
    DatasetSplits,
    Method,
    data_sources,
    make_splits,
    source_files,
)
from ollatune.data.position import FileError, Position, RecordError
from ollatune.data.progress import Progress
from ollatune.data.protocols import MakeRendererParts, PromptTemplate, Tokenizer
from ollatune.data.records import RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.report import RenderCounts
from ollatune.data.sources import DataFile, iter_records
from ollatune.data.store import TokenStore

_FORMAT_VERSION = 5
_LOCK_POLL_SECONDS = 0.2


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
        config.truncation, config.system, config.columns, config.skip_bad,
        [source.columns for source in sources],
        [[(f.path.name, f.split, fact.sha256) for f, fact in zip(*pair, strict=True)]
         for pair in zip(files, facts, strict=True)],
    )  # fmt: skip
    forms = {
        str(file.path): _first_form(file.path, source.columns or config.columns, config)
        for source, of_source in zip(sources, files, strict=True)
        for file in of_source
    }
    job = CacheJob(
        cache_folder / key, config, tuple(sources), method, max_length, make_parts, forms
    )
    make_folder(job.folder)
    clean_staging(job.folder)
    renderer = make_renderer(job, tokenizer, template)
    with _alone(job.folder):
        manifests = build_chunks(job, renderer, chunks, num_workers, progress)
    _refuse_empty_files(chunks, manifests)
    store = TokenStore(open_chunk(job.folder, n) for n in range(len(chunks)))
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
        seen=_seen(sources, files, forms, chunks, manifests),
        rendering=rendering,
        rejections=rejections,
        sample_of=sample_of,
    )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process builds a cache; others that want the same (the ranks of a run) wait and find it done."""
    path = folder / "build.lock"
    try:
        stream = path.open("a")
    except OSError as error:
        raise storage_error(error, path) from error
    with stream:
        with contextlib.suppress(
            LocksUnsupportedError
        ):  # then each builds it: pieces are whole or absent
            if not try_lock(stream.fileno()):
                get_logger("data").info(
                    "Another process is tokenising the same data: waiting for it."
                )
                while not try_lock(stream.fileno()):
                    time.sleep(_LOCK_POLL_SECONDS)
        yield


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


def _seen(
    sources: Sequence[DataSource],
    files: Sequence[Sequence[DataFile]],
    forms: Mapping[str, tuple[str, Position] | None],
    chunks: Sequence[Chunk],
    manifests: Sequence[dict[str, Any]],
) -> dict[str, Seen]:
    """What the records of each source had, from its files' forms and its pieces' manifests."""
    found = [Seen() for _ in sources]
    for met, of_source in zip(found, files, strict=True):
        met.forms = {form[0] if (form := forms[str(f.path)]) else TEXT_FILE for f in of_source}
    for chunk, manifest in zip(chunks, manifests, strict=True):
        found[chunk.source_id].add(
            Seen(unused=set(manifest["unused"]), columns=set(manifest["columns"]))
        )
    return {source.path: met for source, met in zip(sources, found, strict=True)}


def _rejections(manifest: dict[str, Any], skip_bad: bool) -> Rejections:
    found = Rejections(skip_bad=skip_bad)
    found.num_good = manifest["num_good"]
    for *position, cause, cure in manifest["rejected"]:
        found.errors.append(RecordError(Position(*position), cause, cure))
    return found


def _samples_of(job: CacheJob, chunk: Chunk) -> list[Sample]:
    """All samples of one piece again, by ordinal."""
    return [
        sample
        for sample, _ in iter_chunk_samples(job, chunk, Rejections(skip_bad=job.config.skip_bad))
    ]


def _refuse_empty_files(chunks: Sequence[Chunk], manifests: Sequence[dict[str, Any]]) -> None:
    counts: dict[str, int] = {}
    for chunk, manifest in zip(chunks, manifests, strict=True):
        num_records = manifest["num_good"] + len(manifest["rejected"])
        counts[chunk.path] = counts.get(chunk.path, 0) + num_records
    for path, num_records in counts.items():
        if not num_records:
            raise FileError(Position(path, 1), "no record in this file", "Remove it or fill it.")
