"""CSV and Parquet: every row a record, with its line, or its row group and row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ollatune.base.text import format_bytes, printable
from ollatune.data.jsonl import MAX_RECORD_BYTES, Reject, decode_line
from ollatune.data.position import FileError, Position, Record, RecordError
from ollatune.data.progress import OnRead
from ollatune.data.streams import damage_reported, open_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ROWS_AT_A_TIME = 1024


def read_csv(stream: BinaryIO, path: Path, reject: Reject) -> Iterator[Record]:
    """Rows of a CSV (RFC 4180) or TSV file as mappings from the header's names to text."""
    suffixes = [suffix.lower() for suffix in reversed(path.suffixes)]
    delimiter = next((_DELIMITERS[s] for s in suffixes if s in _DELIMITERS), ",")
    here = [0]
    csv.field_size_limit(MAX_RECORD_BYTES)
    with damage_reported(path, here):
        rows = csv.reader(_csv_lines(stream, path, here), delimiter=delimiter, strict=True)
        header = _next_row(rows, path, 1)
        if header is None:
            return
        _check_header(header, Position(str(path), 1), delimiter)
        while True:
            start = rows.line_num + 1
            row = _next_row(rows, path, start)
            if row is None:
                return
            if not row:
                continue  # a blank line
            position = Position(str(path), start)
            if len(row) != len(header):
                reject(
                    RecordError(
                        position,
                        f"{len(row)} fields where the header has {len(header)}",
                        f"Quote fields that contain `{'TAB' if delimiter == chr(9) else delimiter}` or a line break.",
                    )
                )
                continue
            yield Record(dict(zip(header, row, strict=True)), position)


def _csv_lines(stream: BinaryIO, path: Path, here: list[int]) -> Iterator[str]:
    """Decoded lines, their ends kept. A bad byte is a FileError: quotes may run over lines, so no row can be named."""
    limit = MAX_RECORD_BYTES + 1
    while line := stream.readline(limit):
        here[0] += 1
        position = Position(str(path), here[0])
        if len(line) == limit:
            raise FileError(
                position,
                f"a line is longer than {format_bytes(MAX_RECORD_BYTES)}",
                "Split the record.",
            )
        try:
            text = decode_line(line, position)
        except RecordError as error:
            raise FileError(error.position, error.cause, error.cure) from None
        if "\x00" in text:
            raise FileError(position.at(text.index("\x00") + 1), "NUL byte", "Remove it.")
        yield text[1:] if here[0] == 1 and text[:1] == "\ufeff" else text


def _next_row(rows: Any, path: Path, start: int) -> list[str] | None:
    try:
        row: list[str] = next(rows)
    except StopIteration:
        return None
    except csv.Error as error:
        position = Position(str(path), start)
        if "unexpected end of data" in str(error) or "field larger" in str(error):
            raise FileError(
                position,
                "a quoted field that begins in this record has no closing quote",
                'Close it, and write quotes inside a field doubled: "".',
            ) from None
        raise FileError(position, f"not valid CSV: {error}", "Quote the field correctly.") from None
    return row


def _check_header(header: list[str], position: Position, delimiter: str) -> None:
    if len(header) == 1:
        for other, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
            if other != delimiter and other in header[0]:
                raise FileError(
                    position,
                    f"the header {printable(header[0], limit=60)!r} is separated by {name}",
                    "Save it with commas, or name the file .tsv if it is separated by tabs.",
                )
    for index, name in enumerate(header):
        if not name.strip():
            raise FileError(position, f"column {index + 1} has no name", "Name every column.")
        if name in header[:index]:
            raise FileError(position, f"two columns are called `{name}`", "Rename one of them.")


def open_parquet(path: Path) -> pq.ParquetFile:
    """An open Parquet file. Raises FileError for anything that is not one."""
    import pyarrow as pa  # here and not above: most data has no tables, and this takes as long as its records
    import pyarrow.parquet as pq

    with open_regular(path) as probe:
        head = probe.read(4)
        size_bytes = probe.seek(0, 2)
        probe.seek(max(0, size_bytes - 4))
        tail = probe.read(4)
    where = Position(str(path))
    if b"PARE" in (head, tail):
        raise FileError(where, "the Parquet file is encrypted", "Decrypt it first.")
    if head != b"PAR1":
        raise FileError(where, f"not a Parquet file: it begins with {head!r}", "Check the file.")
    if tail != b"PAR1":
        raise FileError(
            where, "the Parquet file has no footer (cut off?)", "Copy or download it again."
        )
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FileError(where, _parquet_reason(error), "Write the file again.") from error


def _parquet_reason(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"damaged Parquet data: {printable(first, limit=120).rstrip('.')}"


def read_parquet(
    path: Path,
    reject: Reject,
    *,
    row_groups: range | None = None,
    on_read: OnRead | None = None,
) -> Iterator[Record]:
    """Rows of a Parquet file, a few at a time; `row_groups` reads only some of it.

    `on_read` is told of each finished row group's bytes.
    """
    import pyarrow as pa

    name = str(path)
    with open_parquet(path) as file:
        schema = file.schema_arrow
        _check_schema(schema, Position(name))
        wanted = _in_microseconds(schema)
        is_too_fine = wanted != schema
        for group in row_groups or range(file.num_row_groups):
            row = 0
            batches = file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group])
            while True:
                try:
                    batch = next(batches, None)
                    if batch is not None and is_too_fine:
                        batch = batch.cast(wanted, safe=False)
                    values = batch.to_pylist() if batch is not None else None
                except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                    raise FileError(
                        Position(name, row_group=group, row=row),
                        _parquet_reason(error),
                        "Write the file again.",
                    ) from error
                if values is None:
                    break
                for value in values:
                    yield Record(value, Position(name, row_group=group, row=row))
                    row += 1
            if on_read is not None:
                columns = file.metadata.row_group(group)
                on_read(
                    sum(columns.column(i).total_compressed_size for i in range(columns.num_columns))
                )


def _in_microseconds(schema: pa.Schema) -> pa.Schema:
    """The schema with times in microseconds where they are in nanoseconds, for which Python has no type."""
    import pyarrow as pa

    def coarser(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            return pa.timestamp("us", kind.tz)
        if pa.types.is_duration(kind) and kind.unit == "ns":
            return pa.duration("us")
        return pa.time64("us") if kind == pa.time64("ns") else kind

    return pa.schema([field.with_type(coarser(field.type)) for field in schema])


def _check_schema(schema: pa.Schema, position: Position) -> None:
    """Names must be distinct; nothing else is asked of columns that a record form does not use."""
    for index, name in enumerate(schema.names):
        if name in schema.names[:index]:
            raise FileError(position, f"two columns are called `{name}`", "Rename one of them.")
