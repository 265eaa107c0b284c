"""Read and write tables: CSV, TSV and Parquet files, and folders of Parquet parts.

A feature table is a Parquet table with a column of features. Its metadata can name the backbone that made them.
"""

from __future__ import annotations

import codecs
import io
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from retrieval_tip.arrays import FloatArray, IntArray
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    Part,
    identity_of,
    same_backbone,
    side_by_side,
)
from retrieval_tip.data import remote
from retrieval_tip.data.source import Source, check_lengths, refuse_rows
from retrieval_tip.errors import (
    BackboneError,
    InputError,
    RetrievalTipError,
    UsageError,
    counted,
    few,
    first_line,
    message,
    show,
    warn_once,
)
from retrieval_tip.files import map_regular, replacing
from retrieval_tip.settings import Levels, Norms

FEATURE = "feature"
NAMES = {
    "id": ("id",),
    "path": ("path", "image", "image_path", "file_name", "filename", "filepath", "file", "input"),
    "label": ("label", "class", "class_name"),
    FEATURE: (FEATURE, "embedding", "vector"),
}
"""Accepted column names. If a table has several of these columns, the one that comes first in this list is used."""
SUFFIXES = (".csv", ".tsv", ".parquet")
RUN, COMPLETE = (
    "_run.json",
    "_complete.json",
)  # the description of a folder of parts, and the mark of a complete one
IDENTITY_KEY = b"retrieval_tip.backbone"
NORM_TOLERANCE = 0.01
MOST_KEPT = 1e9  # largest norm that ``norms="keep"`` accepts; the squared product of two features then fits float32
MAX_ROWS = 2**31 - 1  # largest number of rows; even a tiny file can declare any number
MOST_GROUPED, MOST_GROUPS = (
    100_000,
    1 << 24,
)  # classes and bytes of a table of groups, which every manifest has
MOST_LEVELS = 16  # levels of groups above the classes
GROUP_ROWS = 1024  # smallest number of rows in a Parquet row group
TABLE_ROWS = 8192  # largest number of features that are read at a time
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


def items_of(file: Place, most: int = MAX_ROWS) -> tuple[pa.Table, FeatureTable | None]:
    """Return all columns of a table except features, and the table if it has features. Ids default to row numbers."""
    name = show(file)
    has_features = False
    if _is_text(file):
        items = _read_csv(file)
        _check(items.column_names, len(items), most, name)
        return items, None
    tables = list[pa.Table]()
    table = FeatureTable(file)
    for parquet, start, part in table.parquets():
        columns = parquet.schema_arrow.names
        feature = feature_column(parquet.schema_arrow)
        unnamed = not set(NAMES["path"]) & set(columns) and any(
            is_vector(one.type) for one in parquet.schema_arrow
        )
        end = start + parquet.metadata.num_rows
        has_features = feature is not None or unnamed
        _check(columns, end, most, name)
        with reading(part):
            kept = parquet.read(columns=[column for column in columns if column != feature])
            if has_features and "id" not in columns:
                kept = kept.append_column("id", pa.array(map(str, range(start, end)), pa.string()))
            tables.append(_sound(kept, part))
    with reading(name):
        return pa.concat_tables(tables), table if has_features else None


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


def read_groups(table: str | os.PathLike[str] | bytes, class_names: Sequence[str]) -> Levels:
    """Read the groups of classes (see :class:`settings.BuildOptions`). Warn of classes that are not ``class_names``.

    ``table`` is a file, or the bytes of a file. Raises InputError if it is invalid, or if it has no such class.
    """
    name = "groups" if isinstance(table, bytes) else show(table)
    with reading(name):
        data = table if isinstance(table, bytes) else map_regular(table)
    if (
        len(data) > MOST_GROUPS
        or (items := items_of(InMemory(name, data), MOST_GROUPED)[0]).nbytes > MOST_GROUPS
    ):
        raise InputError(
            f"{name}: larger than {MOST_GROUPS:,} bytes; keep the classes of the index"
        )
    if (levels := items.num_columns - 1) > MOST_LEVELS:
        raise InputError(f"{name}: {levels:,} levels of groups; keep at most {MOST_LEVELS}")
    columns = {
        one: texts(items, name, one, needed=not at) for at, one in enumerate(items.column_names)
    }
    rows = list(
        zip(
            *(pc.utf8_trim_whitespace(values).to_pylist() for values in columns.values()),
            strict=True,
        )
    )
    for label, times in Counter(row[0] for row in rows).most_common(1):
        if times > 1:
            raise InputError(f"{name}: class {label!r} occurs twice; keep one row")
    groups = Levels(tuple(columns), {label: path for label, *path in rows})
    others = groups.others(class_names)
    if len(others) == len(rows):
        raise InputError(f"{name}: has no class of this index ({few(class_names)})")
    if others:
        warn_once(f"{name}: {not_in_index(others)}")
    return groups


def not_in_index(class_names: Sequence[str]) -> str:
    """Return the warning for classes of a table of groups that an index does not have."""
    return f"{counted(len(class_names), 'class', 'is', 'are')} not in the index: {few(class_names)}"


def check_backbone(
    identity: Identity | None,
    d: int,
    backbone: Backbone | None,
    sources: Sequence[Source],
    parts: Sequence[Part] = (),
) -> None:
    """Check that ``backbone`` and ``sources`` fit an index whose features have ``d`` values and come from ``identity``.

    The sources can be tables with one column for each of the ``parts`` of a feature.

    Raises BackboneError if the backbones differ, and InputError if the features have different lengths.
    """
    if backbone is not None:
        same_backbone(identity, backbone.identity, "index")
        if backbone.dim != d:
            raise BackboneError(
                f"encoder {backbone.identity}: its features have {backbone.dim} values; the index has {d}"
            )
    for source in sources:
        if source.table is not None:
            found = source.table.parts(parts)
            same_backbone(identity_of(found), identity, source.name)
            if (dim := sum(part.width for part in found)) != d:
                raise InputError(
                    f"{source.name}: its features have {dim} values; the index has {d}"
                )


class FeatureTable:
    """A Parquet file or a folder of Parquet parts.

    Each file is opened once, and closed when its features have been read. A further pass opens it again, and so does
    each pass over a folder of more than :data:`MOST_OPEN` parts. A pickled table has no open files.
    """

    def __init__(self, place: Place) -> None:
        self.name = show(place)
        self._place = place
        self._files = table_files(place)
        self._open = lru_cache(MOST_OPEN)(open_parquet)

    def __reduce__(self) -> tuple[type[FeatureTable], tuple[Place]]:
        return FeatureTable, (self._place,)

    def parquets(self) -> Iterator[tuple[pq.ParquetFile, int, str]]:
        """Yield each file with the number of its first row, and its name."""
        start = 0
        for part in self._files:
            file = self._open(part)
            yield file, start, show(part)
            start += file.metadata.num_rows

    def parts(self, wanted: Sequence[Part] = ()) -> tuple[Part, ...]:
        """Return the columns of features, or those of the ``wanted`` parts, with their width and their backbone.

        Raises InputError if a column is missing, and BackboneError if it names another backbone than its part.
        """
        for file, _, name in self.parquets():
            found = _columns(file.schema_arrow, name, wanted)
            with reading(name):
                for batch in file.iter_batches(1, columns=[part.column for part in found]):
                    return tuple(
                        replace(part, width=_matrix(batch.column(part.column), 0, 0, name).shape[1])
                        for part in found
                    )
        raise InputError(f"{self.name}: has no rows")

    def identity(self, wanted: Sequence[Part] = ()) -> Identity | None:
        """Return the backbone of the features, or ``None`` if it is not known or there are no such features."""
        with suppress(InputError):  # reading the features raises it again
            return identity_of(self.parts(wanted))
        return None

    def features(
        self, rows: IntArray, norms: Norms, wanted: Sequence[Part] = ()
    ) -> Iterator[tuple[slice, FloatArray]]:
        """Yield the features of some ``rows``, which are ascending, in blocks, and which of the rows each block has.

        Raises InputError if a row has no usable feature. If there are several parts, their columns are joined (see
        :func:`base.side_by_side`).
        """
        parts = self.parts(wanted)
        for file, begins, name in self.parquets():
            sizes = [
                file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)
            ]
            starts = np.cumsum([begins, *sizes])
            groups = np.flatnonzero(
                np.diff(np.searchsorted(rows, starts))
            )  # those that contain some of the rows
            if not groups.size:
                continue
            at = int(starts[groups[0]])
            groups = np.arange(groups[0], groups[-1] + 1)
            with reading(name):
                columns = [
                    part.column for part in _columns(file.schema_arrow, name, wanted or parts)
                ]
                for batch in file.iter_batches(
                    TABLE_ROWS, row_groups=groups.tolist(), columns=columns
                ):
                    low, high = np.searchsorted(rows, (at, at + len(batch)))
                    if low < high:
                        made = []
                        for part, column in zip(parts, columns, strict=True):
                            where = f"{name}: column {column!r}" if wanted else name
                            matrix = _matrix(batch.column(column), at - begins, part.width, where)
                            made.append(check_norms(matrix, at - begins, norms, where))
                        joined = made[0] if len(made) == 1 else side_by_side(made)
                        yield slice(low, high), joined[rows[low:high] - at]
                    at += len(batch)
                    if at > rows[-1]:
                        break
        self._open.cache_clear()  # mapped pages count as memory in use


def _columns(schema: pa.Schema, name: str, wanted: Sequence[Part]) -> list[Part]:
    """Return the column of each part, without its width: the one that names its backbone, or else that has its name.

    If no parts are wanted, return all columns that name their own backbone if there are several, or else the main
    column. Raises BackboneError if a column names another backbone than its part.
    """
    own = {
        field.name: _identity_of(field, schema, name) for field in schema if is_vector(field.type)
    }
    named = {
        identity.fingerprint: column for column, identity in own.items() if identity is not None
    }
    several = [field.name for field in schema if IDENTITY_KEY in (field.metadata or {})]
    main = several if len(several) > 1 else [feature_column(schema) or FEATURE]
    columns = [
        named.get(part.identity.fingerprint if part.identity else "", part.column)
        for part in wanted
    ] or main
    for column in columns:
        if schema.names.count(column) != 1:
            raise InputError(
                f"{name}: expected one column {column!r}; its columns are {message(', '.join(schema.names))}"
            )
        if column not in own:
            raise InputError(
                f"{name}: column {column!r} has type {schema.field(column).type}; expected lists of float32 or float16"
            )
    for part, column in zip(wanted, columns, strict=False):
        same_backbone(own[column], part.identity, f"{name}: column {column!r}")
    return [Part(0, column, own[column]) for column in columns]


def _identity_of(field: pa.Field, schema: pa.Schema, name: str) -> Identity | None:
    """Return the backbone of a column. The metadata of the whole table describes its main column."""
    whole = schema.metadata if field.name == feature_column(schema) else None
    if (raw := ((whole or {}) | (field.metadata or {})).get(IDENTITY_KEY)) is None:
        return None
    try:
        return Identity.from_dict(json.loads(raw))
    except (ValueError, RecursionError, BackboneError) as error:
        raise InputError(f"{name}: its metadata cannot be read ({error})") from None


def _matrix(column: pa.Array, start: int, dim: int, name: str) -> FloatArray:
    """Return the features of a column, whose first row is ``start``. If ``dim`` is 0, the first row sets their length.

    Raises InputError if a row or a value is missing, or if a row has another length.
    """
    refuse_rows(column.is_null(), name, " without a feature", start)
    lengths = np.asarray(pc.list_value_length(column))
    dim = dim or int(lengths[0])
    if not dim:
        raise InputError(f"{name}: row {start} has no values")
    refuse_rows(
        lengths != dim,
        name,
        lambda row: f" with {lengths[row]} values; earlier rows have {dim}",
        start,
    )
    values = column.flatten()
    missing = np.asarray(values.is_null()).reshape(-1, dim).any(axis=1)
    refuse_rows(missing, name, " with a missing value in the feature", start)
    with np.errstate(
        over="ignore"
    ):  # values that are too large become infinite and are then rejected
        return np.asarray(values, np.float32).reshape(-1, dim)


def check_norms(features: FloatArray, start: int, norms: Norms, name: str) -> FloatArray:
    """Check or scale the norms of a block whose first row is ``start``. Raises InputError for an unusable row."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features, dtype=np.float64))

    refuse_rows(~np.isfinite(lengths), name, ": the feature contains NaN or infinity", start)
    if norms == "keep":
        advice = "too large for float32; scale rows to norm 1 (norms unit)"
        refuse_rows(
            lengths > MOST_KEPT, name, lambda row: f": norm {lengths[row]:.4g}, {advice}", start
        )
        return features
    refuse_rows(lengths == 0, name, ": the feature is zero, so it has no direction", start)
    if norms == "unit":
        scaled: FloatArray = (features / lengths[:, None]).astype(np.float32)
        return scaled
    advice = "use norms=unit to scale it to 1, or norms=keep to leave it"
    wrong = np.abs(lengths - 1) > NORM_TOLERANCE
    refuse_rows(wrong, name, lambda row: f": norm {lengths[row]:.4g} instead of 1; {advice}", start)
    return features


def schema_of(
    parts: Sequence[Part], dtype: npt.DTypeLike, further: Sequence[pa.Field] = ()
) -> pa.Schema:
    """Return the schema of a feature table: ``id``, ``label``, one column of features for each part, and ``further``.

    A single column of features has the metadata of the table.
    """
    named = [
        {IDENTITY_KEY: json.dumps(part.identity.to_dict())} if part.identity else None
        for part in parts
    ]
    features = [
        pa.field(
            part.column,
            pa.list_(pa.from_numpy_dtype(dtype), part.width),
            metadata=own if len(parts) > 1 else None,
        )
        for part, own in zip(parts, named, strict=True)
    ]
    front = [pa.field("id", pa.string()), pa.field("label", pa.string()), *features]
    return pa.schema([*front, *further], metadata=named[0] if len(parts) == 1 else None)


def table_of(
    schema: pa.Schema,
    ids: object,
    labels: object,
    features: npt.NDArray[Any],
    further: Mapping[str, object] = MappingProxyType({}),
) -> pa.Table:
    """Build the rows of a feature table with this schema. ``features`` has shape ``[m, d]`` (see :func:`schema_of`)."""
    columns = schema.names[2 : len(schema.names) - len(further)]
    ends = np.cumsum([schema.field(column).type.list_size for column in columns])[:-1]
    scale = features.dtype.type(len(columns) ** 0.5)  # undoes side_by_side
    made = {
        column: vectors(part * scale)
        for column, part in zip(columns, np.split(features, ends, axis=1), strict=True)
    }
    return pa.table({"id": ids, "label": labels, **made, **further}, schema=schema)


def row_groups_of(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join tables until they have :data:`GROUP_ROWS` rows, because small row groups enlarge the footer."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= GROUP_ROWS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def vectors(rows: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """Convert an array of shape ``[m, d]`` to a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1]
    )


def parquet_writer(
    target: IO[bytes], schema: pa.Schema, compression: str = "snappy"
) -> pq.ParquetWriter:
    """Open a Parquet writer that uses dictionaries only for text, because numbers rarely repeat."""
    empty = io.BytesIO()
    pq.write_metadata(schema, empty)  # names the columns inside lists and structs
    columns = pq.ParquetFile(empty).schema
    text = [
        one.path
        for one in map(columns.column, range(len(columns)))
        if one.logical_type.type == "STRING"
    ]
    return pq.ParquetWriter(target, schema, use_dictionary=text, compression=compression)


def write_table(out: Path, schema: pa.Schema, blocks: Iterable[pa.Table]) -> int:
    """Write a feature table block by block, and return the number of rows. After an error, there is no file.

    Raises UsageError if the name of the file has the suffix of another format.
    """
    if out.suffix.lower() not in ("", ".parquet"):
        raise UsageError(f"{show(out)}: a feature table is a Parquet file; use the suffix .parquet")
    number = 0
    try:
        with (
            replacing(out) as temporary,
            temporary.open("wb") as raw,
            parquet_writer(raw, schema, compression="none") as writer,
        ):
            for block in blocks:
                writer.write_table(block)
                number += len(block)
    except pa.ArrowException as error:  # a type that Parquet does not support
        raise InputError(f"{show(out)}: cannot be written: {first_line(error)}") from None
    return number
