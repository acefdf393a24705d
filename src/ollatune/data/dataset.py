"""The one way in: small data is read into memory, large data goes through the cache on disk."""

from __future__ import annotations

from pathlib import Path

from ollatune.base.folders import user_cache_folder
from ollatune.base.log import get_logger
from ollatune.base.text import format_bytes
from ollatune.config.schema import DataConfig
from ollatune.data.cache import load_cached
from ollatune.data.load import DatasetSplits, Method, data_sources, load_examples, source_files
from ollatune.data.progress import Progress
from ollatune.data.protocols import MakeRendererParts, PromptTemplate, Tokenizer
from ollatune.data.sources import data_suffix
from ollatune.data.streams import compression, file_error

LARGE_BYTES = 64 << 20
"""Data of at least this size is cached on disk."""

_EXPANSION = 4  # of compressed files and Parquet, roughly

_log = get_logger("data")


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    make_parts: MakeRendererParts | None = None,
    max_length: int,
    method: Method = "fine-tuning",
    seed: int = 42,
    path: str | Path | None = None,
    cache_folder: Path | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> DatasetSplits:
    """Examples of a data set of any size, with equal results either way.

    `make_parts` makes tokenizer and template anew in the worker processes that large data is prepared by; it must be
    picklable, and without it this process does all the work. `path` replaces the configured sources. With several
    processes, let the first of a machine call this before the others do: they then find the cache.
    """
    size = sum(
        _size_bytes(file.path)
        for source in data_sources(config, path)
        for file in source_files(source, method)
    )
    if size >= LARGE_BYTES:
        folder = cache_folder or user_cache_folder() / "data"
        _log.info("%s of data: tokenised once, kept in %s.", format_bytes(size), folder)
        return load_cached(
            config,
            tokenizer,
            template,
            make_parts=make_parts,
            cache_folder=folder,
            max_length=max_length,
            method=method,
            seed=seed,
            path=path,
            num_workers=num_workers,
            progress=progress,
        )
    return load_examples(
        config, tokenizer, template, max_length=max_length, method=method, seed=seed, path=path
    )


def _size_bytes(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise file_error(path, error) from error
    is_packed = bool(compression(path)) or data_suffix(path) == ".parquet"
    return size * _EXPANSION if is_packed else size
