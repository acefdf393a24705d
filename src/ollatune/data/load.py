"""From configuration to training, validation and test examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ollatune.base.errors import InputError, UsageError
from ollatune.base.log import get_logger
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.conversation import Document, Sample
from ollatune.data.order import SampleOrder, source_repeats
from ollatune.data.position import Position, RecordError
from ollatune.data.protocols import PromptTemplate, Tokenizer
from ollatune.data.records import TEXT_FILE, RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.render import Rendered, Renderer
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
    StoredArrays,
    TokenStore,
    WindowSet,
    pack_tokens,
)

Method = Literal["fine-tuning", "continued-pretraining"]
Progress = Callable[[int], None]

_log = get_logger("data")


@dataclass(frozen=True)
class DatasetSplits:
    """Examples of each split. `validation` and `test` are None where there are none."""

    train: ExampleSource
    validation: ExampleSource | None
    test: ExampleSource | None
    report: DataReport
    rejections: Rejections
    samples: Mapping[Split, Sequence[Sample]] = field(default_factory=dict)
    """Validation and test records in normal form, in the examples' order: for scoring generated answers."""


def data_sources(config: DataConfig, path: str | Path | None = None) -> list[DataSource]:
    """The configured sources, or `path` in their place. Raises UsageError where there is neither."""
    sources = [DataSource(path=str(path))] if path is not None else list(config.sources)
    if not sources:
        raise UsageError("No data was named.", hint="Give --data PATH or list data.sources.")
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
    reader: RecordReader | None = None,
) -> Iterator[tuple[Sample, Position, Split | None]]:
    """Every good record of a source in normal form, with its place and the split its file is named after."""
    columns = source.columns or config.columns
    reader = reader or RecordReader(columns=columns, system=config.system)
    for file in source_files(source, method):
        for record in iter_records(file.path, rejections):
            try:
                sample = reader(record)
                check_method(sample, record.position, method)
            except RecordError as error:
                rejections(error)
                continue
            yield sample, record.position, file.split


def check_method(sample: Sample, position: Position, method: Method) -> None:
    """Raises InputError for a document in fine-tuning: there is no answer in it to learn."""
    if method == "fine-tuning" and isinstance(sample, Document):
        raise InputError(
            f"{position}: this is plain text without an answer, and training.method is fine-tuning.",
            hint="Set training.method: continued-pretraining, or give records with instruction and response.",
        )


class StoreBuilder:
    """Collects rendered samples into the arrays of a TokenStore."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._columns: list[tuple[int, int, int, int, float]] = []
        self.counts = RenderCounts()

    def __len__(self) -> int:
        return len(self._columns)

    def add(self, sample: Sample, rendered: Rendered, source_id: int) -> None:
        """Append one sample."""
        example = rendered.example
        self._tokens.append(pack_tokens(example.token_ids, example.is_target))
        self._columns.append(
            (
                int(np.count_nonzero(example.is_target)),
                sample.digest(),
                sample.prompt_digest(),
                source_id,
                sample.score,
            )
        )
        counts = self.counts
        counts.num_truncated += rendered.is_truncated
        counts.num_answers_cut += rendered.is_answer_cut
        counts.num_tokens_cut += rendered.num_tokens_before - len(example)
        counts.longest_before = max(counts.longest_before, rendered.num_tokens_before)
        counts.num_early_ends += rendered.num_early_ends

    def arrays(self) -> StoredArrays:
        """All that was added."""
        lengths = [len(tokens) for tokens in self._tokens]
        columns = list(zip(*self._columns, strict=True)) or [()] * 5
        return StoredArrays(
            tokens=np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.uint32),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            num_targets=np.asarray(columns[0], np.int64),
            digests=np.asarray(columns[1], np.uint64),
            prompt_digests=np.asarray(columns[2], np.uint64),
            source_ids=np.asarray(columns[3], np.int64),
            scores=np.asarray(columns[4], np.float64),
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
    named: list[int] = []
    samples: list[Sample] = []
    forms: dict[str, str] = {}
    for source_id, source in enumerate(data_sources(config, path)):
        reader = RecordReader(columns=source.columns or config.columns, system=config.system)
        for sample, position, split in iter_samples(source, config, method, rejections, reader):
            try:
                rendered = renderer(sample, position)
            except RecordError as error:
                rejections(error)
                continue
            rejections.num_good += 1
            builder.add(sample, rendered, source_id)
            named.append(split_number(split))
            samples.append(sample)
            if progress:
                progress(1)
        forms[source.path] = reader.form.name if reader.form else TEXT_FILE
    rejections.check()
    store = TokenStore([builder.arrays()])
    rows = split_rows(
        np.asarray(named, np.int64),
        store.digests,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=seed,
    )
    report = make_report(
        store,
        rows,
        forms=forms,
        rendering=builder.counts,
        rejections=rejections,
        max_length=max_length,
    )
    kept = {split: [samples[int(row)] for row in rows[split]] for split in SPLITS[1:]}
    return make_splits(store, rows, config, method, max_length, report, rejections, kept)


def make_splits(
    store: TokenStore,
    rows: Mapping[Split, np.ndarray],
    config: DataConfig,
    method: Method,
    max_length: int,
    report: DataReport,
    rejections: Rejections,
    samples: Mapping[Split, Sequence[Sample]],
) -> DatasetSplits:
    """Examples (fine-tuning) or windows (continued pre-training) over the rows of a store."""
    if not len(rows["train"]):
        raise InputError(
            "No record is left to train on.",
            hint="Check the data's file names and split fractions.",
        )

    def examples(split: Split) -> ExampleSource | None:
        if not len(rows[split]):
            return None
        if method == "continued-pretraining":
            return WindowSet(store, rows[split], window=max_length, overlap=config.window_overlap)
        return ExampleSet(store, rows[split])

    train = examples("train")
    assert train is not None
    return DatasetSplits(
        train, examples("validation"), examples("test"), report, rejections, samples
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
    difficulty = {
        "none": None,
        "length": examples.lengths.astype(np.float64),
        "score": examples.scores,
    }[config.curriculum]
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
