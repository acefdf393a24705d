"""From configuration to training, validation and test examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError, UsageError
from ollatune.base.faults import fault_point
from ollatune.base.log import get_logger
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.builder import StoreBuilder
from ollatune.data.conversation import Document, Sample
from ollatune.data.forms import TEXT_FILE, Seen
from ollatune.data.order import SampleOrder, source_repeats
from ollatune.data.position import Position, RecordError
from ollatune.data.progress import OnRead
from ollatune.data.protocols import PromptTemplate, Tokenizer
from ollatune.data.records import RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.render import Renderer
from ollatune.data.report import DataReport, RenderCounts, make_report
from ollatune.data.sources import (
    SPLITS,
    TEXT_SUFFIXES,
    DataFile,
    Split,
    data_suffix,
    find_files,
    iter_records,
)
from ollatune.data.split import split_number, split_rows
from ollatune.data.store import (
    ExampleSet,
    ExampleSource,
    TokenStore,
    WindowSet,
)

Method = Literal["fine-tuning", "continued-pretraining"]
Progress = Callable[[int], None]

_log = get_logger("data")


class SampleView(Sequence[Sample]):
    """Records by number, fetched when asked for."""

    def __init__(self, rows: npt.NDArray[np.int64], sample_of: Callable[[int], Sample]) -> None:
        self._rows = rows
        self._sample_of = sample_of

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample_of(int(row)) for row in self._rows[index]]
        return self._sample_of(int(self._rows[index]))


@dataclass(frozen=True)
class DatasetSplits:
    """Examples of each split. `validation` and `test` are None where there are none."""

    train: ExampleSource
    validation: ExampleSource | None
    test: ExampleSource | None
    report: DataReport
    rejections: Rejections
    samples: Mapping[Split, Sequence[Sample]]
    """The records of each split in normal form, in their examples' order: for scoring generated answers."""


def data_sources(config: DataConfig, path: str | Path | None = None) -> list[DataSource]:
    """The configured sources, or `path` in their place. Raises UsageError where there is neither."""
    sources = [DataSource(path=str(path))] if path is not None else list(config.sources)
    if not sources:
        raise UsageError(
            "No data was named.",
            hint="Name a file or folder (`train --data PATH`, `preprocess PATH`), or list data.sources.",
        )
    return sources


def source_files(source: DataSource, method: Method) -> list[DataFile]:
    """The files of one source. In fine-tuning, plain texts that lie beside records are notes, not data."""
    files = find_files(source.path)
    texts = [file for file in files if data_suffix(file.path) in TEXT_SUFFIXES]
    if method == "fine-tuning" and texts and len(texts) < len(files):
        _log.info("%s: %d text files are not used for fine-tuning.", source.path, len(texts))
        files = [file for file in files if file not in texts]
    return files


def iter_samples(
    source: DataSource,
    config: DataConfig,
    method: Method,
    rejections: Rejections,
    seen: Seen,
    *,
    files: Sequence[DataFile] | None = None,
    on_read: OnRead | None = None,
) -> Iterator[tuple[Sample, Position, Split | None]]:
    """Every good record of a source in normal form, with its place and the split its file is named after.

    The record forms and fields that are met are added to `seen`. `files` are those of `source_files`, where they
    are known already; `on_read` is told of the bytes read from the disk.
    """
    columns = source.columns or config.columns
    for file in source_files(source, method) if files is None else files:
        reader = RecordReader(columns=columns, system=config.system)
        for record in iter_records(file.path, rejections, on_read):
            try:
                sample = reader(record)
                check_method(sample, record.position, method)
            except RecordError as error:
                rejections(error)
                continue
            fault_point("data.record")
            yield sample, record.position, file.split
        seen.forms.add(reader.form.name if reader.form else TEXT_FILE)
        seen.add(reader.seen)


def check_method(sample: Sample, position: Position, method: Method) -> None:
    """Raises InputError for a document in fine-tuning: there is no answer in it to learn."""
    if method == "fine-tuning" and isinstance(sample, Document):
        raise InputError(
            f"{position}: this is plain text without an answer, and training.method is fine-tuning.",
            hint="Set training.method: continued-pretraining, or give records with instruction and response.",
        )


def load_examples(
    config: DataConfig,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    max_length: int,
    method: Method = "fine-tuning",
    seed: int = 42,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> DatasetSplits:
    """Read, check, render and split a data set in memory. `path` replaces the configured sources.

    Raises RecordError with file and line for the first bad record, or InputError when more than the allowed share
    is bad (`skip_bad`).
    """
    renderer = Renderer(
        tokenizer,
        template,
        max_length=max_length,
        targets=config.targets,
        truncation=config.truncation,
    )
    rejections = Rejections(skip_bad=config.skip_bad)
    builder = StoreBuilder()
    samples: list[Sample] = []
    seen: dict[str, Seen] = {}
    for source_id, source in enumerate(data_sources(config, path)):
        met = seen[source.path] = Seen()
        for sample, position, split in iter_samples(source, config, method, rejections, met):
            try:
                rendered = renderer(sample, position)
            except RecordError as error:
                rejections(error)
                continue
            rejections.num_good += 1
            builder.add(
                sample,
                rendered,
                source_id=source_id,
                split=split_number(split),
                ordinal=len(samples),
            )
            samples.append(sample)
            if progress:
                progress(1)
    rejections.check()
    store = TokenStore([builder.arrays()])
    return make_splits(
        store,
        config,
        method=method,
        max_length=max_length,
        seed=seed,
        seen=seen,
        rendering=builder.counts,
        rejections=rejections,
        sample_of=lambda row: samples[store.place(row)[1]],
    )


def make_splits(
    store: TokenStore,
    config: DataConfig,
    *,
    method: Method,
    max_length: int,
    seed: int,
    seen: Mapping[str, Seen],
    rendering: RenderCounts,
    rejections: Rejections,
    sample_of: Callable[[int], Sample],
) -> DatasetSplits:
    """Split a tokenised data set and report on it. Raises InputError where nothing is left to train on."""
    rejections.check()
    rows = split_rows(
        store.splits,
        store.digests,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=seed,
    )
    if not len(rows["train"]):
        raise nothing_to_train_on(store.splits)
    report = make_report(
        store,
        rows,
        seen=seen,
        rendering=rendering,
        rejections=rejections,
        max_length=max_length,
    )
    report.warnings.extend(field_warnings(seen, config))

    def examples(split: Split) -> ExampleSource | None:
        if not len(rows[split]):
            return None
        if method == "continued-pretraining":
            return WindowSet(store, rows[split], window=max_length, overlap=config.window_overlap)
        return ExampleSet(store, rows[split])

    train = examples("train")
    if not train:  # its only window may be too short to learn from
        raise nothing_to_train_on(store.splits)
    samples = {
        split: SampleView(rows[split][store.is_record_start[rows[split]]], sample_of)
        for split in SPLITS
    }
    return DatasetSplits(
        train, examples("validation"), examples("test"), report, rejections, samples
    )


def field_warnings(seen: Mapping[str, Seen], config: DataConfig) -> list[str]:
    """What `Seen.warnings` says of every source, with the columns that are mapped for it."""
    columns = {source.path: source.columns for source in config.sources}
    return [
        warning
        for path, met in seen.items()
        for warning in met.warnings(path, columns.get(path) or config.columns)
    ]


def nothing_to_train_on(named: npt.NDArray[np.integer]) -> InputError:
    """The error where no record is left for training; `named` says what split each record's file is named after."""
    if len(named) and (named > 0).all():
        return InputError(
            "Every file is named after validation or test, so no record is left to train on.",
            hint="Name a file after train (`train.jsonl`), or rename the others.",
        )
    return InputError(
        "No record is left to train on.",
        hint="Check the data's file names and split fractions.",
    )


def make_order(
    examples: ExampleSource,
    config: DataConfig,
    *,
    seed: int,
    sources: Sequence[DataSource],
    group_size: int = 0,
) -> SampleOrder:
    """The training order that the configuration asks for. `group_size` is the micro-batch size for length groups."""
    sizes = [int((examples.source_ids == s).sum()) for s in range(len(sources))]
    difficulty: npt.NDArray[np.floating] | None = None
    if config.curriculum == "length":
        difficulty = examples.lengths.astype(np.float64)
    elif config.curriculum == "score" and isinstance(examples, WindowSet):
        raise UsageError(
            "`data.curriculum: score` sorts records, and continued pre-training joins them into windows.",
            hint="Sort the documents in the file and set data.shuffle: false, or choose `length`.",
        )
    elif config.curriculum == "score":
        difficulty = examples.scores
        if not difficulty.any():
            raise UsageError(
                "`data.curriculum: score` sorts by the field `score`, which no record has (or all have 0).",
                hint="Give the records a `score`, map one in `data.columns`, or choose `length`.",
            )
    return SampleOrder(
        len(examples),
        seed=seed,
        shuffle=config.shuffle,
        source_ids=examples.source_ids,
        repeats=source_repeats(sizes, [s.weight for s in sources], config.mixing_temperature),
        difficulty=difficulty,
        lengths=examples.lengths if config.group_by_length else None,
        group_size=group_size if config.group_by_length else 0,
    )
