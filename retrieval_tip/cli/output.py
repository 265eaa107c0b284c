"""Printing of results: rows as a table, JSON lines, CSV or Parquet, to standard output or to a file."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from wcwidth import wcswidth

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, first_line, json_line, one_line
from retrieval_tip.files import replacing
from retrieval_tip.predictions import shown_probability

FORMATS = ("table", "json", "csv", "parquet")
CHUNK = 1024
READER_WAIT, READER_POLL = 10.0, 0.05
"""Seconds that the reader of a pipe that is named as output is waited for, and between two looks."""
WIDE = 200
"""Characters of a cell that the others of its column are aligned with, at most; a longer one moves its own line."""

Row = Mapping[str, Any]
Details = Callable[[Row], Iterable[str]]


def write_rows(
    rows: Iterable[Row],
    columns: Sequence[str],
    style: str,
    path: Path | None,
    schema: pa.Schema,
    details: Details | None = None,
) -> None:
    """Write rows of these columns in one of ``FORMATS``, as they come; a file is renamed in when whole.

    ``table`` is for eyes: floats are rounded. ``details`` gives lines to stand below a row there, in place of its lists
    (:func:`prediction_details`). ``schema`` gives the types of Parquet.

    What a terminal would obey is escaped (:func:`errors.one_line`): in a table wherever that goes, in CSV on a
    terminal, in files not, for it is data. In JSON it always is: that changes no value.

    Raises UsageError for Parquet on a terminal; InputError for a file that cannot be written.
    """
    if style == "parquet" and path is None and _stdout().isatty():
        raise UsageError("format parquet is binary: give --output FILE, or send standard output somewhere")
    with _target(path) as target:
        if style == "parquet":
            _parquet(rows, schema, target)
            return
        text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
        try:
            if style == "table":
                nested = {field.name for field in schema if details is not None and pa.types.is_nested(field.type)}
                _table(rows, [column for column in columns if column not in nested], text, details)
            elif style == "json":
                _json(rows, columns, text)
            else:
                _csv(rows, columns, text, safe=path is None and sys.stdout.isatty())
        finally:
            text.detach()


def prediction_details(row: Row) -> Iterator[str]:
    """Lines of a table below a prediction: its nearest keys, and classes with their probabilities."""
    if row.get("neighbours"):
        near = [neighbour | {"gives": neighbour["gives"][0]} for neighbour in row["neighbours"]]  # to the answer
        for text in table_lines(near, ["affinity", "weight", "gives", "label", "source", "key_id"]):
            yield f"    {text}"
    others = list(zip(row.get("labels", ()), row.get("probabilities", ()), strict=True))
    if others:
        yield "    " + ", ".join(f"{one_line(label)} {shown_probability(chance)}" for label, chance in others)


def write_table(table: pa.Table, style: str, path: Path | None) -> None:
    """Write a table as :func:`write_rows` does. Times are to the microsecond, as Python's are.

    Raises UsageError for a value that the format cannot hold, like an interval in Parquet or a year above 9999.
    """
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            rounded = table.column(place).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(place, field.name, rounded)
    rows = (row for batch in table.to_batches(CHUNK) for row in batch.to_pylist())
    try:
        if style == "parquet" and (path is not None or not _stdout().isatty()):
            with _target(path) as target:
                pq.write_table(table, target)
        else:
            write_rows(rows, table.column_names, style, path, table.schema)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, RetrievalTipError):
            raise
        reason = first_line(error)
        raise UsageError(f"a value cannot be written as {style} ({reason}); cast its column to VARCHAR") from None


def table_lines(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[str]:
    """Aligned lines with a heading; numbers to the right."""
    cells = [[_cell(row.get(column), column) for column in columns] for row in rows]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    heading = [one_line(column) for column in columns]
    columns_of_cells = zip(heading, *cells, strict=True)
    widths = [max([wcswidth(t) for t in texts if len(t) <= WIDE], default=0) for texts in columns_of_cells]
    for line in (heading, *cells):
        gaps = [" " * (width - wcswidth(text)) for text, width in zip(line, widths, strict=True)]
        padded = [gap + text if r else text + gap for text, gap, r in zip(line, gaps, right, strict=True)]
        yield "  ".join(padded).rstrip()


def _table(rows: Iterable[Row], columns: Sequence[str], target: IO[str], details: Details | None) -> None:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        lines = table_lines(chunk, columns)
        target.write(next(lines) + "\n")
        for row, line in zip(chunk, lines, strict=True):
            target.write(line + "\n")
            for text in () if details is None else details(row):
                target.write(text + "\n")


def _json(rows: Iterable[Row], columns: Sequence[str], target: IO[str]) -> None:
    for row in rows:
        target.write(json_line({column: row[column] for column in columns}) + "\n")


def _csv(rows: Iterable[Row], columns: Sequence[str], target: IO[str], safe: bool) -> None:
    writer = csv.writer(_Lines(target), lineterminator="\r\n")  # which makes it quote both of them within a field
    writer.writerow([one_line(column) for column in columns] if safe else columns)
    for row in rows:
        cells = [json_line(v) if isinstance(v, list | dict) else v for v in (row[column] for column in columns)]
        writer.writerow(["" if cell is None else one_line(str(cell)) for cell in cells] if safe else cells)


class _Lines:
    """The target of a CSV writer, with lines that end as they do everywhere."""

    def __init__(self, target: IO[str]) -> None:
        self._target = target

    def write(self, line: str) -> None:
        self._target.write(line.removesuffix("\r\n") + "\n")


def _parquet(rows: Iterable[Row], schema: pa.Schema, target: IO[bytes]) -> None:
    rows = iter(rows)
    with pq.ParquetWriter(target, schema) as writer:
        while chunk := list(itertools.islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist([dict(row) for row in chunk], schema=schema))


@contextmanager
def _target(path: Path | None) -> Iterator[IO[bytes]]:
    if path is None:
        target = _stdout().buffer
        yield target
        target.flush()
        return
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or pipe is not replaced
        with _opened(path) as file:
            yield file
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _stdout() -> TextIO:
    """Standard output. Raises InputError where this process has none."""
    if sys.stdout is None:
        raise InputError("standard output is closed; give --output FILE")
    return sys.stdout


def _opened(path: Path) -> IO[bytes]:
    """A device or pipe to write to. Raises InputError for a pipe that nobody comes to read."""
    ends = time.monotonic() + (READER_WAIT if path.is_fifo() else 0)
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
            if time.monotonic() >= ends:
                raise InputError(f"{one_line(str(path))}: a pipe that nobody reads; start its reader first") from None
            time.sleep(READER_POLL)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


def _cell(value: object, column: str) -> str:
    if isinstance(value, float):
        if column == "probability":
            return shown_probability(value)
        return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.4f}"
    if isinstance(value, list | dict):
        return json_line(value)
    return "-" if value is None else one_line(str(value))
