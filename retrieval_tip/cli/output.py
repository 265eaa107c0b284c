"""How results are printed: rows as a table, JSON lines, CSV or Parquet, to standard output or to a file."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.data.encoder import replacing
from retrieval_tip.errors import RetrievalTipError, UsageError, first_line, one_line

if TYPE_CHECKING:
    from retrieval_tip.predictions import Prediction

FORMATS = ("table", "json", "csv", "parquet")
CHUNK = 1024

Row = Mapping[str, Any]


def write_rows(rows: Iterable[Row], columns: Sequence[str], style: str, path: Path | None, schema: pa.Schema) -> None:
    """Write rows of these columns in one of ``FORMATS``, as they come; a file is renamed in when whole.

    ``table`` is for eyes: floats are rounded, lists get lines of their own. ``schema`` gives the Parquet types.

    Raises UsageError for Parquet on a terminal; InputError for a file that cannot be written.
    """
    if style == "parquet" and path is None and sys.stdout.isatty():
        raise UsageError("format parquet is binary: give --output FILE, or send standard output somewhere")
    with _target(path) as target:
        if style == "parquet":
            _parquet(rows, schema, target)
            return
        text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
        try:
            {"table": _table, "json": _json, "csv": _csv}[style](rows, columns, text)
        finally:
            text.detach()


def prediction_row(
    name: str, found: Prediction, columns: Sequence[str], abstain: float | None = None
) -> dict[str, Any]:
    """A prediction as ``classify`` writes it, of these columns; below ``abstain`` it has no label."""
    row = vars(found) | {
        "input": name,
        "label": found.label if abstain is None or found.probability >= abstain else None,
        "logits": found.logits.tolist() if "logits" in columns and found.logits is not None else None,
        "neighbours": [vars(neighbour) for neighbour in found.neighbours],
    }
    return {column: row[column] for column in columns}


def write_table(table: pa.Table, style: str, path: Path | None) -> None:
    """Write a table as :func:`write_rows` does. Times are to the microsecond, as Python's are.

    Raises UsageError for a value that the format cannot hold, like an interval in Parquet or a year above 9999.
    """
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            rounded = table.column(place).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(place, field.name, rounded)
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    try:
        if style == "parquet" and (path is not None or not sys.stdout.isatty()):
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
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in ([*columns], *cells):
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)]
        yield "  ".join(padded).rstrip()


def _table(rows: Iterable[Row], columns: Sequence[str], target: IO[str]) -> None:
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        shown = [column for column in columns if not isinstance(chunk[0].get(column), list)]
        for line in _with_details(chunk, shown):
            target.write(line + "\n")


def _with_details(chunk: Sequence[Row], shown: Sequence[str]) -> Iterator[str]:
    lines = table_lines(chunk, shown)
    yield next(lines)
    for row, line in zip(chunk, lines, strict=True):
        yield line
        near = row.get("neighbours") or []
        for text in table_lines(near, ["affinity", "weight", "label", "source", "key_id"]) if near else ():
            yield f"    {text}"
        others = list(zip(row.get("labels", ()), row.get("probabilities", ()), strict=True))
        if others:
            yield "    " + ", ".join(f"{one_line(label)} {probability:.4f}" for label, probability in others)


def _json(rows: Iterable[Row], columns: Sequence[str], target: IO[str]) -> None:
    for row in rows:
        target.write(json.dumps({column: row[column] for column in columns}, ensure_ascii=False, default=str) + "\n")


def _csv(rows: Iterable[Row], columns: Sequence[str], target: IO[str]) -> None:
    writer = csv.writer(_Lines(target), lineterminator="\r\n")  # which makes it quote both of them within a field
    writer.writerow(columns)
    for row in rows:
        values = (row[column] for column in columns)
        writer.writerow([json.dumps(v, ensure_ascii=False, default=str) if isinstance(v, list) else v for v in values])


class _Lines:
    """What a CSV writer writes to: its lines end here as they do everywhere."""

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
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or pipe is not replaced
        with path.open("wb") as file:
            yield file
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.4f}"
    return "-" if value is None else one_line(str(value))
