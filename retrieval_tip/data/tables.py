"""Find, open and read tables of items: CSV, TSV and Parquet files, and folders of Parquet parts."""

from __future__ import annotations

import codecs
import io
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from retrieval_tip.data import remote
from retrieval_tip.data.source import check_lengths, refuse_rows
from retrieval_tip.errors import InputError, RetrievalTipError, warn_once
from retrieval_tip.files import map_regular
from retrieval_tip.wording import first_line, message, show

FEATURE = "feature"
NAMES = {
    "id": ("id",),
    "path": ("path", "image", "image_path", "file_name", "filename", "filepath", "file", "input"),
    "label": ("label", "class", "class_name"),
    FEATURE: (FEATURE, "embedding", "vector"),
}
"""Accepted column names. If a table has several of these columns, the one that comes first in this list is used."""
SUFFIXES = (".csv", ".tsv", ".parquet")
RUN = "_run.json"  # the description of a folder of parts
COMPLETE = "_complete.json"  # the mark of a complete folder
IDENTITY_KEY = b"retrieval_tip.backbone"
MAX_ROWS = 2**31 - 1  # largest number of rows; even a tiny file can declare any number
MOST_OPEN = 64  # largest number of parts that stay open; the system limits the number of open files


@dataclass(frozen=True, eq=False)
class InMemory:
    """A table in memory: its name in messages, and the bytes of its CSV or Parquet file."""

    name: str
    data: bytes | mmap.mmap

    def __fspath__(self) -> str:
        return self.name

    @classmethod
    def of(cls, frame: Any, name: str = "table") -> InMemory:
        """Return a table of pandas, polars or Arrow. Raises InputError if Arrow or Parquet lacks one of its types."""
        sink = pa.BufferOutputStream()
        with reading(name):
            pq.write_table(pa.table(frame), sink)
        return cls(name, sink.getvalue().to_pybytes())


Place = Path | str | InMemory
"""A file, the folder or the URL of a table, or a table in memory."""


def is_frame(given: object) -> bool:
    """Return whether an object is a table of pandas, polars or Arrow."""
    return hasattr(given, "__arrow_c_stream__") and hasattr(given, "columns")


def is_table(where: str) -> bool:
    """Return whether a path or URL is a table: a folder of parts, or a file with a suffix (if remote, ``.parquet``)."""
    if remote.is_remote(where):
        return where.lower().endswith(".parquet") or _holds(where, RUN)
    return (where.lower().endswith(SUFFIXES) and os.path.isfile(where)) or _holds(where, RUN)


def _holds(folder: str, name: str) -> bool:
    place = os.path.join(folder, name)
    if not remote.is_remote(folder):
        return os.path.isfile(place)
    with remote.reaching(folder):
        return bool(remote.system_of(folder).exists(place))


def table_files(table: Place) -> Sequence[Place]:
    """List the Parquet files of a table, which are its parts or itself. Raises InputError if any is missing."""
    where = os.fspath(table)
    if (
        isinstance(table, InMemory)
        or (remote.is_remote(where) and where.endswith(".parquet"))
        or not _holds(where, RUN)
    ):
        return [table]
    if not _holds(where, COMPLETE):
        raise InputError(
            f"{show(where)}: some parts are missing; run the command that writes it again"
        )
    return part_files(where)


def part_files(folder: str) -> list[Path | str]:
    """List the files in a folder of parts, in order."""
    if not remote.is_remote(folder):
        return sorted(Path(folder).glob("part=*/*.parquet"))
    return [url for url in remote.find(folder) if url.endswith(".parquet")]


class ParquetFiles:
    """The Parquet files of a table, which are its parts or itself.

    Each file is opened once, until :meth:`close`. In a folder of more than :data:`MOST_OPEN` parts, each pass opens
    them again. A pickled object has no open files.
    """

    def __init__(self, place: Place) -> None:
        self.name = show(place)
        self._place = place
        self._files = table_files(place)
        self._open = lru_cache(MOST_OPEN)(open_parquet)

    def __reduce__(self) -> tuple[type[ParquetFiles], tuple[Place]]:
        return ParquetFiles, (self._place,)

    def __iter__(self) -> Iterator[tuple[pq.ParquetFile, int, str]]:
        """Yield each file with the number of its first row, and its name."""
        start = 0
        for part in self._files:
            file = self._open(part)
            yield file, start, show(part)
            start += file.metadata.num_rows

    def close(self) -> None:
        """Close all files."""
        self._open.cache_clear()


def items_of(file: Place, most: int = MAX_ROWS) -> tuple[pa.Table, ParquetFiles | None]:
    """Return all columns of a table except features, and its files if it has features. Ids default to row numbers."""
    name = show(file)
    if _is_text(file):
        items = _read_csv(file)
        _check(items.column_names, len(items), most, name)
        return items, None
    has_features = False
    tables = []
    files = ParquetFiles(file)
    for parquet, start, part in files:
        schema = parquet.schema_arrow
        columns = schema.names
        feature = feature_column(schema)
        has_vectors = any(is_vector(field.type) for field in schema)
        has_paths = not set(NAMES["path"]).isdisjoint(columns)
        has_features = feature is not None or (has_vectors and not has_paths)
        end = start + parquet.metadata.num_rows
        _check(columns, end, most, name)
        with reading(part):
            items = parquet.read(columns=[column for column in columns if column != feature])
            if has_features and "id" not in columns:
                numbers = pa.array(map(str, range(start, end)), pa.string())
                items = items.append_column("id", numbers)
            tables.append(_sound(items, part))
    with reading(name):
        return pa.concat_tables(tables), files if has_features else None


def _is_text(file: Place) -> bool:
    """Return whether a table is a text file by the suffix of its name, or by its content if the suffix is unknown."""
    suffix = os.path.splitext(file)[1].lower()
    if not isinstance(file, InMemory) and (remote.is_remote(file) or os.path.isdir(file)):
        return False
    if suffix in SUFFIXES:
        return suffix != ".parquet"
    with reading(show(file)):
        return _content(file)[:4] != b"PAR1"


def _content(file: Place) -> bytes | mmap.mmap:
    return file.data if isinstance(file, InMemory) else map_regular(file)


def feature_column(schema: pa.Schema) -> str | None:
    """Return ``feature``, else the first column of vectors with another name in ``NAMES``, else ``None``."""
    there = {field.name for field in schema if field.name == FEATURE or is_vector(field.type)}
    return next((name for name in NAMES[FEATURE] if name in there), None)


def is_vector(kind: pa.DataType) -> bool:
    """Return whether a type is a list of floating-point numbers."""
    is_list = isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
    return is_list and pa.types.is_floating(kind.value_type)


def renamed(items: pa.Table, *wanted: str) -> pa.Table:
    """Rename columns that have an alternative name in ``NAMES`` to the ``wanted`` names."""
    for column in wanted:
        there = [name for name in NAMES[column] if name in items.column_names]
        if there:
            items = items.rename_columns({there[0]: column})
    return items


def _sound(items: pa.Table, name: str) -> pa.Table:
    """Check that text is valid UTF-8, and convert view columns to plain ones, which support ``take``."""
    kinds = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    for column in items.column_names:
        with reading(f"{name}: column {column!r}"):
            items[column].validate(full=True)
    items = items.cast(
        pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in items.schema])
    )
    items.slice(0, 1).take(pa.array([0][: len(items)], pa.int64()))  # fails for views inside lists
    return items


def open_parquet(file: Place) -> pq.ParquetFile:
    """Open a Parquet file. A local file is memory-mapped. Raises InputError if it cannot be read."""
    with reading(show(file)):
        if remote.is_remote(file):
            with remote.reaching(file):
                remote.system_of(file).info(
                    file
                )  # obstore would report a missing object later, outside any handler
                raw = pa.PythonFile(remote.system_of(file).open(file, "rb"), "r")
        else:
            raw = pa.BufferReader(_content(file))
        parquet = pq.ParquetFile(raw)
        "".join(parquet.schema_arrow.names)  # fails if a name is not UTF-8
        return parquet


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert errors that occur while reading a table to InputError."""
    try:
        yield
    except RetrievalTipError:
        raise
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(f"{name}: cannot be read: {first_line(error)}") from None


def _read_csv(file: Place) -> pa.Table:
    name = show(file)
    with reading(name):
        data = _content(file)
        encoding = _encoding(data, name)
        line = io.TextIOWrapper(io.BytesIO(data[: 1 << 16]), encoding, "replace").readline()
        delimiter = "\t" if name.lower().endswith(".tsv") else max(",;\t|", key=line.count)
        return pyarrow.csv.read_csv(
            pa.BufferReader(data),
            pyarrow.csv.ReadOptions(encoding=encoding),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                default_column_type=pa.string(), strings_can_be_null=True, null_values=[""]
            ),
        )


def _encoding(data: bytes | mmap.mmap, name: str) -> str:
    """Guess the encoding of a CSV file: UTF-16 with a byte-order mark, UTF-8, or Windows-1252, which Excel writes."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    first = re.search(rb"[\x80-\xff].{0,3}", data, re.DOTALL)
    if first is None or not "\udc80" <= first[0].decode(errors="surrogateescape")[0] <= "\udcff":
        return "utf8"
    warn_once(f"{name}: not UTF-8; reading it as Windows-1252 (if that is wrong, save it as UTF-8)")
    return "cp1252"


def _check(columns: Sequence[str], number: int, most: int, name: str) -> None:
    if len(set(columns)) < len(columns):
        raise InputError(f"{name}: duplicate column name among {message(', '.join(columns))}")
    if number > most:
        raise InputError(f"{name}: {number:,} rows; expected at most {most:,}")


def texts(
    items: pa.Table, name: str, what: str, *, needed: bool = True, hint: str = ""
) -> pa.ChunkedArray:
    """Read a column of ids, paths or labels as text. Blank values count as missing, and integers are converted.

    Raises InputError if there is no such column, if a value is not text or is too long, or if one is missing but
    ``needed``. ``hint`` says which columns a table needs.
    """
    if what not in items.column_names:
        raise InputError(
            f"{name}: no column {what!r} among {message(', '.join(items.column_names))}{hint}"
        )
    column = items[what]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = kind in (pa.string(), pa.large_string(), pa.string_view())
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(f"{name}: column {what!r} has type {column.type}; expected text")
    with reading(f"{name}: column {what!r}"):
        values = column.cast(kind).cast(pa.string())
    values = pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)
    if needed:
        refuse_rows(
            values.is_null(), name, f" without {'an' if what[0] in 'aeiou' else 'a'} {what}"
        )
    check_lengths(values, name, what)
    return values
