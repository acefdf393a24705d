"""Raw files → a clean data folder: checked, without duplicates, split, in one record form, with a report."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import clean_staging, staged_file, write_json
from ollatune.config.schema import DataConfig, DataSource
from ollatune.data.conversation import ChatMessage, Conversation, Document, Sample
from ollatune.data.forms import MAPPABLE_FIELDS, Seen
from ollatune.data.load import (
    Method,
    field_warnings,
    iter_samples,
    nothing_to_train_on,
    source_files,
)
from ollatune.data.position import RecordError
from ollatune.data.progress import OnRead, Progress, TwoReadings
from ollatune.data.records import RecordReader
from ollatune.data.rejects import Rejections
from ollatune.data.sources import (
    REJECTED_NAME,
    REPORT_NAME,
    SPLITS,
    TEXT_SUFFIXES,
    DataFile,
    Split,
    data_suffix,
    find_files,
    iter_records,
)
from ollatune.data.split import Rows, first_of_each, split_number, split_rows


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` did. `as_dict` is the report file."""

    output: str
    form: str
    """Record form of the output: `instruction`, `messages` or `text`."""
    source_forms: Mapping[str, str]
    num_records: dict[str, int]
    """Written, per split."""
    num_read: int
    num_duplicates_removed: int
    num_rejected: int
    length_percentiles: dict[str, int]
    """Characters of a record."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"schema": 1, **asdict(self)}


class _Survey:
    """The first reading: what has to be known of all records before any can be written."""

    def __init__(self) -> None:
        self.digests = array("Q")
        self.splits = array("b")
        self.lengths = array("q")
        self.is_simple = True

    def add(self, sample: Sample, split: Split | None) -> None:
        self.digests.append(sample.digest())
        self.splits.append(split_number(split))
        if isinstance(sample, Document):
            self.lengths.append(len(sample.text))
            return
        self.lengths.append(sum(len(message.content) for message in sample.messages))
        self.is_simple = self.is_simple and _is_single_exchange(sample)


def _is_single_exchange(sample: Conversation) -> bool:
    """Whether instruction, context and response can hold all of it."""
    roles = [message.role for message in sample.messages if message.role != "system"]
    has_extras = sample.tools or any(m.tool_calls or m.thinking for m in sample.messages)
    return roles == ["user", "assistant"] and not has_extras


def prepare(
    config: DataConfig,
    sources: Sequence[DataSource],
    output: Path,
    *,
    seed: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` (those that get records) and a report to `output`.

    Of exact duplicates one is kept, in the test split before the validation split before the training split, so that
    nothing that is measured on was trained on. The data is read twice and never held in memory; `progress` counts the
    bytes of both readings.
    Raises UsageError where the output exists and `overwrite` is not set, and what reading raises.
    """
    _refuse_overwriting(output, overwrite)
    clean_staging(output)
    config = config.model_copy(
        update={"system": None}
    )  # the default is for training, not for the data
    method = _method_of(sources, config)
    rejections = Rejections(skip_bad=config.skip_bad)
    survey = _Survey()
    seen: dict[str, Seen] = {}
    files = [source_files(source, method) for source in sources]
    _refuse_own_input(output, [file.path for its_files in files for file in its_files])
    reading = TwoReadings([file.path for its_files in files for file in its_files], progress)
    for source, its_files in zip(sources, files, strict=True):
        met = seen[source.path] = Seen()
        for sample, position, split in iter_samples(
            source, config, method, rejections, met, files=its_files, on_read=reading
        ):
            if method == "continued-pretraining" and not isinstance(sample, Document):
                raise InputError(
                    f"{position}: a record with an answer among plain documents.",
                    hint="Prepare the two kinds into two folders: they are trained in different ways.",
                )
            survey.add(sample, split)
            rejections.num_good += 1
    rejections.check()
    digests = np.array(survey.digests, np.uint64)
    rows, num_duplicates = _distinct_rows(digests, np.array(survey.splits, np.int64), config, seed)
    form = "text" if method == "continued-pretraining" else "instruction"
    if form == "instruction" and not survey.is_simple:
        form = "messages"
    reading.begin_second()
    samples = _samples(sources, files, config, method, reading)
    _write(output, samples, rows, len(digests), form)
    reading.finish()
    if rejections.errors:
        rejections.write(output / REJECTED_NAME)
    report = PreparedData(
        str(output),
        form,
        {path: ", ".join(sorted(met.forms)) for path, met in seen.items()},
        {split: len(rows[split]) for split in SPLITS},
        len(digests) + len(rejections.errors),
        num_duplicates,
        len(rejections.errors),
        _percentiles(np.array(survey.lengths, np.int64)),
        [
            *_warnings(rows, num_duplicates, rejections),
            *field_warnings(seen, config.model_copy(update={"sources": list(sources)})),
        ],
    )
    write_json(output / REPORT_NAME, report.as_dict())
    return report


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    ours = [output / f"{split}.jsonl" for split in SPLITS]
    existing = [path for path in ours if path.exists()]
    if existing and not overwrite:
        raise UsageError(
            f"{existing[0]} exists already.", hint="Choose another --output, or pass --overwrite."
        )


def _refuse_own_input(output: Path, files: Sequence[Path]) -> None:
    """What is written must not be what is read: it would replace the user's only copy."""
    inside = [path for path in files if path.resolve().parent == output.resolve()]
    if inside:
        raise UsageError(
            f"{inside[0]} is read, and it lies in the output folder {output}.",
            hint="Choose another --output, or name the raw files alone.",
        )


def _method_of(sources: Sequence[DataSource], config: DataConfig) -> Method:
    """Whether there are answers to learn: what the first record of the first file with records says."""
    for source in sources:
        for file in find_files(source.path):
            if data_suffix(file.path) in TEXT_SUFFIXES:
                continue
            reader = RecordReader(columns=source.columns or config.columns, system=None)
            for record in iter_records(file.path, Rejections(skip_bad=config.skip_bad)):
                try:
                    sample = reader(record)
                except RecordError:
                    continue  # the survey reports it
                return "continued-pretraining" if isinstance(sample, Document) else "fine-tuning"
    return "continued-pretraining"


def _distinct_rows(
    digests: npt.NDArray[np.uint64],
    named: npt.NDArray[np.int64],
    config: DataConfig,
    seed: int,
) -> tuple[dict[Split, Rows], int]:
    """Rows of each split without duplicates, within it and across; and how many were left out."""
    # Stable by descending split number: test (2) before validation (1) before the rest.
    by_rank = np.argsort(-np.maximum(named, 0), kind="stable")
    kept = np.sort(by_rank[first_of_each(digests[by_rank])])
    split = split_rows(
        named[kept],
        digests[kept],
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=seed,
    )
    if not len(split["train"]):
        raise nothing_to_train_on(named)
    return {name: kept[rows] for name, rows in split.items()}, len(digests) - len(kept)


def _samples(
    sources: Sequence[DataSource],
    files: Sequence[Sequence[DataFile]],
    config: DataConfig,
    method: Method,
    on_read: OnRead,
) -> Iterator[Sample]:
    """The good records again, in the order of the survey."""
    for source, its_files in zip(sources, files, strict=True):
        rejections = Rejections(skip_bad=config.skip_bad)
        for sample, _, _ in iter_samples(
            source, config, method, rejections, Seen(), files=its_files, on_read=on_read
        ):
            yield sample


def _write(
    output: Path, samples: Iterator[Sample], rows: Mapping[Split, Rows], num_records: int, form: str
) -> None:
    split_of_row = np.full(num_records, -1, np.int8)
    for number, split in enumerate(SPLITS):
        split_of_row[rows[split]] = number
    with ExitStack() as stack:
        streams: list[IO[bytes] | None] = [
            stack.enter_context(staged_file(output / f"{split}.jsonl"))
            if len(rows[split])
            else None
            for split in SPLITS
        ]
        for row, sample in enumerate(samples):
            stream = streams[split_of_row[row]] if split_of_row[row] >= 0 else None
            if stream is not None:
                line = json.dumps(_as_record(sample, form), ensure_ascii=False)
                stream.write(line.encode() + b"\n")
    for split in SPLITS:
        if not len(rows[split]):
            (output / f"{split}.jsonl").unlink(missing_ok=True)  # of an earlier, overwritten result


def _as_record(sample: Sample, form: str) -> dict[str, Any]:
    record = {k: _plain(v) for k, v in (sample.metadata or {}).items() if k not in MAPPABLE_FIELDS}
    if sample.score:
        record["score"] = sample.score
    if isinstance(sample, Document):
        return {"text": sample.text, **record}
    if form == "messages":
        record = {"messages": [_as_message(m) for m in sample.messages], **record}
        return {**record, "tools": list(sample.tools)} if sample.tools else record
    system = [m.content for m in sample.messages if m.role == "system"]
    question, answer = (m.content for m in sample.messages if m.role != "system")
    instruction, context = sample.question_parts if any(sample.question_parts) else (question, "")
    fields = {"instruction": instruction, "context": context, "response": answer}
    return {**fields, **({"system": system[0]} if system else {}), **record}


def _plain(value: Any) -> Any:
    """Metadata as JSON has it: Parquet also knows dates, bytes and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _as_message(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        fields["thinking"] = message.thinking
    if message.tool_calls:
        fields["tool_calls"] = list(message.tool_calls)
    if message.tool_name:
        fields["name"] = message.tool_name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if not message.is_trained:
        fields["weight"] = 0
    return fields


def _percentiles(lengths: npt.NDArray[np.int64]) -> dict[str, int]:
    marks = (0, 50, 90, 99, 100)
    found = np.percentile(lengths, marks, method="lower")
    return {f"p{mark}": int(value) for mark, value in zip(marks, found, strict=True)}


def _warnings(rows: Mapping[Split, Rows], num_duplicates: int, rejections: Rejections) -> list[str]:
    found = []
    if num_duplicates:
        found.append(f"{num_duplicates} exact duplicates were left out.")
    if rejections.errors:
        found.append(f"{len(rejections.errors)} bad records were set aside in {REJECTED_NAME}.")
    if not len(rows["validation"]):
        found.append("There is no validation split: overfitting would go unseen.")
    return found
