"""Functions that write results as a table, JSON lines, CSV or Parquet, to standard output or a file."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from wcwidth import wcswidth

from retrieval_tip.data.writing import parquet_writer, row_groups_of
from retrieval_tip.errors import RetrievalTipError, UsageError
from retrieval_tip.files import csv_of, output
from retrieval_tip.predictions import shown_probability
from retrieval_tip.wording import first_line, json_line, one_line

CHUNK = 1024
WIDE = 200
"""Maximum number of characters in an aligned cell. A longer cell only shifts its own line."""

Row = Mapping[str, Any]


def write_tables(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    style: str,
    path: Path | None,
    expected: Mapping[str, Iterable[str]] | None = None,
    *,
    predictions: bool = False,
) -> None:
    """Write tables that have the same schema as they arrive, in the format ``style``.

    An output file appears only once it is complete. In the format ``table``, floats are rounded. ``expected`` contains
    the texts that will appear in a column, so that the column is aligned from the first row. If the rows are
    ``predictions``, a table has lines below a row instead of nested columns, and CSV has probabilities with 4 digits
    and the classes of a ``set`` separated by ``|``, with a backslash before a ``|`` or backslash in a name.

    Control characters are escaped (see :func:`wording.one_line`) in tables, in CSV on a terminal, and in JSON (where
    escaping does not change any value).

    Raises UsageError if Parquet would be written to a terminal. Raises InputError if the file cannot be written.
    """
    if style == "parquet" and path is None and sys.stdout.isatty():
        raise UsageError(
            "--format parquet: output is binary; give --out FILE or redirect standard output"
        )
    with output(path) as target:
        if style == "parquet":
            with parquet_writer(target, schema) as writer:
                for table in row_groups_of(tables):
                    writer.write_table(table)
            return
        text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
        rows = (table.to_pylist() for table in tables)
        try:
            if style == "table":
                fields = [
                    field
                    for field in schema
                    if not (predictions and pa.types.is_nested(field.type))
                ]
                right = {field.name: _is_number(field.type) for field in fields}
                blocks = _table(rows, right, expected or {}, predictions=predictions)
            elif style == "json":
                blocks = ("".join(f"{json_line(row)}\n" for row in block) for block in rows)
            else:
                blocks = _csv(
                    rows, schema.names, path is None and sys.stdout.isatty(), short=predictions
                )
            for block in blocks:
                text.write(block)
                target.flush()  # so that the reader of a pipe gets each answer immediately
        finally:
            text.detach()


def _details(row: Row) -> Iterator[str]:
    """Yield the lines to print below a prediction, which show its evidence and the class probabilities."""
    if row.get("neighbours"):
        shots = list(row["neighbours"])
        if row.get("opposing"):
            shots.append(row["opposing"])
        # The first class that a shot gives to is the answer.
        rows = [shot | {"contribution": shot["gives"][0]} for shot in shots]
        lines = _lines(
            rows, contribution=True, affinity=True, label=False, source=False, key_id=True
        )
        if row.get("opposing"):
            lines.insert(-1, "strongest against it:")
        yield from (f"    {line}" for line in lines)
    if row.get("similar"):
        yield "    given by this photo and by similar photos, with the label of each alone:"
        yield from (
            f"    {line}" for line in _lines(row["similar"], gives=True, label=False, input=False)
        )
    if row.get("set") is not None:
        yield "    set: " + (", ".join(map(one_line, row["set"])) or "no class")
    others = list(zip(row.get("labels", ()), row.get("probabilities", ()), strict=True))
    if others:
        yield "    " + ", ".join(
            f"{one_line(label)} {shown_probability(chance)}" for label, chance in others
        )


def write_table(
    table: pa.Table, style: str, path: Path | None, *, predictions: bool = False
) -> None:
    """Write a table in the same way as :func:`write_tables`, but round its times to microseconds."""
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            times = table.column(place).cast(pa.timestamp("us", field.type.tz), safe=False)
            table = table.set_column(place, field.name, times)
    try:
        whole = style == "parquet"
        parts = (
            [table]
            if whole
            else (pa.Table.from_batches([batch]) for batch in table.to_batches(CHUNK))
        )
        write_tables(parts, table.schema, style, path, predictions=predictions)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, RetrievalTipError):
            raise
        reason = first_line(error)
        raise UsageError(
            f"a value cannot be written as {style} ({reason}); cast its column to VARCHAR"
        ) from None


def _lines(rows: Sequence[Row], **right: bool) -> list[str]:
    """Return a heading and one aligned line per row (see :func:`_table`)."""
    return "".join(_table([rows], right, {})).splitlines()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) and not pa.types.is_temporal(kind))


def _width(texts: Iterable[str]) -> int:
    return max((wcswidth(text) for text in texts if len(text) <= WIDE), default=0)


def _aligned(
    lines: Iterable[Sequence[str]], right: Iterable[bool], widths: Sequence[int]
) -> Iterator[str]:
    for line in lines:
        padded = []
        for text, width, is_right in zip(line, widths, right, strict=True):
            gap = " " * (width - wcswidth(text))
            padded.append(gap + text if is_right else text + gap)
        yield "  ".join(padded).rstrip()


def _table(
    blocks: Iterable[Sequence[Row]],
    right: Mapping[str, bool],
    expected: Mapping[str, Iterable[str]],
    *,
    predictions: bool = False,
) -> Iterator[str]:
    """Yield blocks of a table as text. A column becomes wider if a later block has wider cells.

    ``right`` are the columns, and whether each is aligned to the right.
    """
    heading = list(map(one_line, right))
    widths = []
    for name, column in zip(heading, right, strict=True):
        cells_to_come = [_cell(text, column) for text in expected.get(column, ())]
        widths.append(_width([name, *cells_to_come]))
    head = [heading]
    for rows in filter(None, blocks):
        cells = [[_cell(row.get(column), column) for column in right] for row in rows]
        widths = [
            max(width, _width(texts))
            for width, texts in zip(widths, zip(*cells, strict=True), strict=True)
        ]
        text = io.StringIO()
        text.writelines(f"{line}\n" for line in _aligned(head, right.values(), widths))
        for row, line in zip(rows, _aligned(cells, right.values(), widths), strict=True):
            text.write(f"{line}\n")
            if predictions:
                text.writelines(f"{below}\n" for below in _details(row))
        head = []
        yield text.getvalue()


def _csv(
    blocks: Iterable[Iterable[Row]], columns: Sequence[str], safe: bool, *, short: bool
) -> Iterator[str]:
    def cell(value: Any, column: str = "") -> object:
        if short and column in ("probability", "probabilities"):
            value = (
                [_shortened(number) for number in value]
                if isinstance(value, list)
                else _shortened(value)
            )
        if short and column == "set" and value is not None:
            value = "|".join(re.sub(r"[\\|]", r"\\\g<0>", name) for name in value)
        text = json_line(value) if isinstance(value, list | dict) else value
        return one_line(str(text)) if safe and text is not None else text

    head = csv_of([map(cell, columns)])
    for rows in blocks:
        yield head + csv_of(map(cell, row.values(), columns) for row in rows)
        head = ""
    yield head


def _shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _cell(value: object, column: str) -> str:
    if isinstance(value, float):
        if column == "probability":
            return shown_probability(value)
        return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.4f}"
    if isinstance(value, list | dict):
        return json_line(value)
    return "-" if value is None else one_line(str(value))
