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
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from retrieval_tip.backbones.base import Backbone, FloatArray, Identity, Part, identity_of, same_backbone, side_by_side
from retrieval_tip.data import remote
from retrieval_tip.data.source import Source, check_lengths, refuse_rows
from retrieval_tip.errors import (
    BackboneError,
    InputError,
    UsageError,
    counted,
    few,
    first_line,
    one_line,
    show,
    warn_once,
)
from retrieval_tip.files import check_regular, open_regular, replacing
from retrieval_tip.settings import Levels, Norms

FEATURE = "feature"
NAMES = {
    "path": ("path", "image", "image_path", "file_name", "filename", "filepath", "file", "input"),
    "label": ("label", "class", "class_name"),
    FEATURE: (FEATURE, "embedding", "vector"),
}
"""Accepted column names. If a table has several of these columns, the one that comes first in this list is used."""
SUFFIXES = (".csv", ".tsv", ".parquet")
RUN, COMPLETE = "_run.json", "_complete.json"  # the description of a folder of parts, and the mark of a complete one
IDENTITY_KEY = b"retrieval_tip.backbone"
NORM_TOLERANCE = 0.01
MOST_KEPT = 1e9  # largest norm that ``norms="keep"`` accepts; the squared product of two features then fits float32
MAX_ROWS = 2**31 - 1  # largest number of rows; even a tiny file can declare any number
MOST_GROUPED, MOST_GROUPS = 100_000, 1 << 24  # classes and bytes of a table of groups, which every manifest has
MOST_LEVELS = 16  # levels of groups above the classes
GROUP_ROWS = 1024  # smallest number of rows in a Parquet row group
TABLE_ROWS = 8192  # largest number of features that are read at a time
MAX_SHOWN = 64  # largest number of column names in a message, and of characters in each name


class InMemory(str):
    """The name of a table in memory, and its bytes in Parquet format."""

    data: pa.Buffer

    @classmethod
    def of(cls, frame: Any) -> InMemory:
        """Return a table of pandas, polars or Arrow. Raises InputError if Arrow or Parquet lacks one of its types."""
        held, sink = cls("table"), pa.BufferOutputStream()
        try:
            pq.write_table(pa.table(frame), sink)
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"{held}: cannot be read: {first_line(error)}") from None
        held.data = sink.getvalue()
        return held


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


def table_files(table: Path | str) -> list[Path | str]:
    """List the Parquet files of a table, which are its parts or itself. Raises InputError if any is missing."""
    where = os.fspath(table)
    if (
        isinstance(table, InMemory)
        or (remote.is_remote(where) and where.endswith(".parquet"))
        or not _holds(where, RUN)
    ):
        return [table]
    if not _holds(where, COMPLETE):
        raise InputError(f"{show(where)}: some parts are missing; run the command that writes it again")
    return part_files(where)


def part_files(folder: str) -> list[Path | str]:
    """List the files in a folder of parts, in order."""
    if not remote.is_remote(folder):
        return sorted(Path(folder).glob("part=*/*.parquet"))
    return [url for url in remote.find(folder) if url.endswith(".parquet")]


def items_of(file: Path | str, most: int = MAX_ROWS) -> tuple[pa.Table, bool]:
    """Return all columns of a table except features, and whether it has any. Ids default to row numbers."""
    name, number, has_features = show(file), 0, False
    if _is_text(file):
        items = _read_csv(Path(file))
        _check(items.column_names, len(items), most, name)
        return items, False
    tables: list[pa.Table] = []
    for parquet, start, part in _parquets(file):
        columns, feature = parquet.schema_arrow.names, feature_column(parquet.schema_arrow)
        unnamed = not set(NAMES["path"]) & set(columns) and any(is_vector(one.type) for one in parquet.schema_arrow)
        number, has_features = start + parquet.metadata.num_rows, feature is not None or unnamed
        _check(columns, number, most, name)
        with reading(part):
            kept = parquet.read(columns=[column for column in columns if column != feature])
            tables.append(_sound(kept, part))
    with reading(name):
        items = pa.concat_tables(tables)
    if has_features and "id" not in items.column_names:
        ids = pa.array([str(row) for row in range(number)], pa.string())
        items = items.append_column("id", ids) if items.num_columns else pa.table({"id": ids})
    return items, has_features


def _is_text(file: Path | str) -> bool:
    """Return whether a table is a text file by the suffix of its name, or by its content if the suffix is unknown."""
    suffix = os.path.splitext(file)[1].lower()
    if isinstance(file, InMemory) or remote.is_remote(file) or suffix == ".parquet" or os.path.isdir(file):
        return False
    if suffix in SUFFIXES:
        return True
    with reading(show(file)), open_regular(file) as raw:
        return not raw.read(4).startswith(b"PAR1")


def feature_column(schema: pa.Schema) -> str | None:
    """Return ``feature``, else the first column of vectors with another name in ``NAMES``, else ``None``."""
    if FEATURE in schema.names:
        return FEATURE
    names = [name for name in NAMES[FEATURE] if schema.names.count(name) == 1 and is_vector(schema.field(name).type)]
    return names[0] if names else None


def is_vector(kind: pa.DataType) -> bool:
    """Return whether a type is a list of floating-point numbers."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and bool(pa.types.is_floating(kind.value_type))


def renamed(items: pa.Table, *wanted: str) -> pa.Table:
    """Rename columns that have an alternative name in ``NAMES`` to the ``wanted`` names."""
    for column in wanted:
        there = [name for name in NAMES[column] if name in items.column_names]
        if there and there[0] != column:
            items = items.rename_columns({there[0]: column})
    return items


def _sound(items: pa.Table, name: str) -> pa.Table:
    """Check that text is valid UTF-8, and convert view columns to plain ones, which support ``take``."""
    kinds = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    for field, column in zip(items.schema, items.columns, strict=True):
        with reading(f"{name}: column {field.name!r}"):
            column.validate(full=True)
    items = items.cast(pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in items.schema]))
    items.slice(0, 1).take(pa.array([0] if len(items) else [], pa.int64()))  # fails for views inside lists
    return items


def open_parquet(file: Path | str) -> pq.ParquetFile:
    """Open a Parquet file. A local file is memory-mapped. Raises InputError if it cannot be read."""
    with reading(show(file)):
        if isinstance(file, InMemory):
            raw = pa.BufferReader(file.data)
        elif remote.is_remote(file):
            with remote.reaching(file):
                remote.system_of(file).info(file)  # obstore would report a missing object later, outside any handler
                raw = pa.PythonFile(remote.system_of(file).open(file, "rb"), "r")
        else:
            check_regular(file)
            raw = pa.memory_map(os.fsencode(file))
        parquet = pq.ParquetFile(raw)
        "".join(parquet.schema_arrow.names)  # fails if a name is not UTF-8
        return parquet


def _parquets(table: Path | str) -> Iterator[tuple[pq.ParquetFile, int, str]]:
    """Open the Parquet files of a table. Yield each with the number of its first row, and its name."""
    start = 0
    for part in table_files(table):
        file = open_parquet(part)
        yield file, start, show(part)
        start += file.metadata.num_rows


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert errors that occur while reading a table to InputError."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read: {first_line(error)}") from None


def _read_csv(file: Path) -> pa.Table:
    with reading(show(file)):
        check_regular(file)
        encoding = _encoding(file)
        with file.open(encoding=encoding, errors="replace") as text:
            line = text.readline(1 << 16)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=line.count)
        read = pyarrow.csv.ReadOptions(encoding=encoding)
        parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
        convert = pyarrow.csv.ConvertOptions(
            default_column_type=pa.string(), strings_can_be_null=True, null_values=[""]
        )
        return pyarrow.csv.read_csv(pa.OSFile(os.fsencode(file)), read, parse, convert)  # the name may not be UTF-8


def _encoding(file: Path) -> str:
    """Guess the encoding of a CSV file: UTF-16 with a byte-order mark, UTF-8, or Windows-1252, which Excel writes."""
    with open_regular(file) as raw:
        data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    first = re.search(rb"[\x80-\xff].{0,3}", data, re.DOTALL)
    if first is None or not "\udc80" <= first[0].decode(errors="surrogateescape")[0] <= "\udcff":
        return "utf8"
    warn_once(f"{show(file)}: not UTF-8; reading it as Windows-1252 (if that is wrong, save it as UTF-8)")
    return "cp1252"


def _check(columns: Sequence[str], number: int, most: int, name: str) -> None:
    if len(set(columns)) < len(columns):
        raise InputError(f"{name}: duplicate column name among {few_names(columns)}")
    if number > most:
        raise InputError(f"{name}: {number:,} rows; expected at most {most:,}")


def texts(items: pa.Table, name: str, what: str, *, needed: bool = True, hint: str = "") -> pa.ChunkedArray:
    """Read a column of ids, paths or labels as text. Blank values count as missing, and integers are converted.

    Raises InputError if there is no such column, if a value is not text or is too long, or if one is missing but
    ``needed``. ``hint`` says which columns a table needs.
    """
    if what not in items.column_names:
        raise InputError(f"{name}: no column {what!r} among {few_names(items.column_names)}{hint}")
    column = items[what]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise InputError(f"{name}: column {what!r} has type {column.type}; expected text")
    with reading(f"{name}: column {what!r}"):
        values = column.cast(kind).cast(pa.string())
    values = pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)
    if needed:
        refuse_rows(values.is_null().to_numpy(), name, f" without {'an' if what[0] in 'aeiou' else 'a'} {what}")
    check_lengths(values, name, what)
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])


def read_groups(path: str | os.PathLike[str], class_names: Sequence[str]) -> Levels:
    """Read the groups of classes (see :class:`settings.BuildOptions`). Warn of classes that are not ``class_names``.

    Raises InputError if the table is invalid, or if it has no such class.
    """
    name = show(path)
    with reading(name):
        size = Path(path).stat().st_size
    if size > MOST_GROUPS or (items := items_of(Path(path), MOST_GROUPED)[0]).nbytes > MOST_GROUPS:
        raise InputError(f"{name}: larger than {MOST_GROUPS:,} bytes; keep the classes of the index")
    if (levels := items.num_columns - 1) > MOST_LEVELS:
        raise InputError(f"{name}: {levels:,} levels of groups; keep at most {MOST_LEVELS}")
    columns = {one: texts(items, name, one, needed=not at) for at, one in enumerate(items.column_names)}
    rows = list(zip(*(pc.utf8_trim_whitespace(values).to_pylist() for values in columns.values()), strict=True))
    if twice := [label for label, times in Counter(row[0] for row in rows).items() if times > 1]:
        raise InputError(f"{name}: class {twice[0]!r} occurs twice; keep one row")
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


def few_names(columns: Sequence[str]) -> str:
    """Format the first column names for a message."""
    shown = ", ".join(one_line(column)[:MAX_SHOWN] for column in columns[:MAX_SHOWN])
    return shown + (f" and {len(columns) - MAX_SHOWN} more" if len(columns) > MAX_SHOWN else "")


def check_backbone(
    identity: Identity | None, d: int, backbone: Backbone | None, sources: Sequence[Source], parts: Sequence[Part] = ()
) -> None:
    """Check that ``backbone`` and ``sources`` fit an index whose features have ``d`` values and come from ``identity``.

    The sources can be tables with one column for each of the ``parts`` of a feature.

    Raises BackboneError if the backbones differ, and InputError if the features have different lengths.
    """
    if backbone is not None:
        same_backbone(identity, backbone.identity, "index")
        if backbone.dim != d:
            has = f"its features have {backbone.dim} values; the index has {d}"
            raise BackboneError(f"encoder {backbone.identity}: {has}")
    for source in sources:
        if source.table is not None:
            found = parts_in(source.table, parts)
            same_backbone(identity_of(found), identity, source.name)
            if (dim := sum(part.width for part in found)) != d:
                raise InputError(f"{source.name}: its features have {dim} values; the index has {d}")


def table_identity(path: Path | str, parts: Sequence[Part] = ()) -> Identity | None:
    """Return the backbone that the metadata of a feature table names, or of several, if it names all of them."""
    files, name = table_files(path), show(path)
    schema = open_parquet(files[0]).schema_arrow if files else pa.schema([])
    if not parts and feature_column(schema) is None:
        return None
    columns = _columns(schema, name, parts)
    return identity_of([Part(0, column, _identity_of(schema, column, name)) for column in columns])


def parts_in(path: Path | str, parts: Sequence[Part] = ()) -> tuple[Part, ...]:
    """Return the columns of features in a table with their width and their backbone (see :func:`_columns`)."""
    for file, _, name in _parquets(path):
        columns = _columns(file.schema_arrow, name, parts)
        with reading(name):
            for batch in file.iter_batches(1, columns=columns):
                widths = [_matrix(batch.column(column), 0, None, name).shape[1] for column in columns]
                own = [_identity_of(file.schema_arrow, column, name) for column in columns]
                return tuple(map(Part, widths, columns, own))
    raise InputError(f"{show(path)}: has no rows")


def has_part(path: Path | str, part: Part) -> bool:
    """Return whether a table has features of one of several encoders."""
    try:
        return parts_in(path, [part])[0].width == part.width
    except InputError:
        return False


def _identity_of(schema: pa.Schema, column: str, name: str) -> Identity | None:
    """Return the backbone of a column. The metadata of the whole table describes its main column."""
    whole = schema.metadata if column == feature_column(schema) else None
    metadata = (whole or {}) | (schema.field(column).metadata or {})
    if (raw := metadata.get(IDENTITY_KEY)) is None:
        return None
    try:
        return Identity.from_dict(json.loads(raw))
    except (ValueError, RecursionError, BackboneError) as error:
        raise InputError(f"{name}: its metadata cannot be read ({error})") from None


def read_rows(
    path: Path | str, norms: Norms, first: int = 0, last: int = MAX_ROWS, parts: Sequence[Part] = ()
) -> Iterator[tuple[int, FloatArray]]:
    """Yield the first row and the features of each block in rows ``first`` to ``last``, with ``norms`` checked.

    If there are several ``parts``, their columns are joined (see :func:`base.side_by_side`).
    """
    dims: dict[int, int] = {}
    for file, begins, name in _parquets(path):
        groups, at = _row_groups(file, first - begins, last - begins)
        if not groups:
            continue
        columns = _columns(file.schema_arrow, name, parts)
        with reading(name):
            for batch in file.iter_batches(TABLE_ROWS, row_groups=groups, columns=columns):
                if begins + at >= last:
                    break
                if batch.num_rows and begins + at + batch.num_rows > first:
                    made = []
                    for number, column in enumerate(columns):
                        where = f"{name}: column {column!r}" if parts else name
                        features = _matrix(batch.column(column), at, dims.get(number), where)
                        dims[number] = features.shape[1]
                        made.append(check_norms(features, at, norms, where))
                    yield begins + at, made[0] if len(made) == 1 else side_by_side(made)
                at += batch.num_rows


def _row_groups(parquet: pq.ParquetFile, first: int, last: int) -> tuple[list[int], int]:
    """Return the row groups that contain rows ``first`` to ``last``, and the number of the first row in them."""
    sizes = np.array([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)], np.int64)
    starts = sizes.cumsum() - sizes
    groups = np.flatnonzero((starts + sizes > first) & (starts < last))
    return groups.tolist(), int(starts[groups[0]]) if groups.size else 0


def _columns(schema: pa.Schema, name: str, parts: Sequence[Part]) -> list[str]:
    """Return the column of each part: the one that names its backbone, or else the one that has its name.

    Without parts, return all columns that name their own backbone if there are several, or else the main column. Raises
    BackboneError if a column names another backbone than its part.
    """
    several = [field.name for field in schema if IDENTITY_KEY in (field.metadata or {})]
    named: dict[str | None, str] = {}
    for field in schema if any(part.identity for part in parts) else ():
        if is_vector(field.type) and (found := _identity_of(schema, field.name, name)) is not None:
            named[found.fingerprint] = field.name
    wanted = [(part.identity.fingerprint if part.identity else None, part.column) for part in parts]
    columns = [named.get(fingerprint, column) for fingerprint, column in wanted]
    columns = columns or (several if len(several) > 1 else [feature_column(schema) or FEATURE])
    for column in columns:
        if schema.names.count(column) != 1:
            raise InputError(f"{name}: expected one column {column!r}; its columns are {few_names(schema.names)}")
        if not is_vector(kind := schema.field(column).type):
            raise InputError(f"{name}: column {column!r} has type {kind}; expected lists of float32 or float16")
    for part, column in zip(parts, columns, strict=False):
        same_backbone(_identity_of(schema, column, name), part.identity, f"{name}: column {column!r}")
    return columns


def _matrix(column: pa.Array, start: int, dim: int | None, name: str) -> FloatArray:
    refuse_rows(column.is_null().to_numpy(zero_copy_only=False), name, " without a feature", start)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    dim = int(lengths[0]) if dim is None else dim
    if dim == 0:
        raise InputError(f"{name}: row {start} has no values")
    refuse_rows(lengths != dim, name, lambda row: f" with {lengths[row]} values; earlier rows have {dim}", start)
    values = column.flatten()
    missing = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, dim).any(axis=1)
    refuse_rows(missing, name, " with a missing value in the feature", start)
    with np.errstate(over="ignore"):  # values that are too large become infinite and are then rejected
        matrix: FloatArray = values.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)
    return matrix


def check_norms(features: FloatArray, start: int, norms: Norms, name: str) -> FloatArray:
    """Check or scale the norms of a block whose first row is ``start``. Raises InputError for an unusable row."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features, dtype=np.float64))

    refuse_rows(~np.isfinite(lengths), name, ": the feature contains NaN or infinity", start)
    if norms == "keep":
        advice = "too large for float32; scale rows to norm 1 (norms unit)"
        refuse_rows(lengths > MOST_KEPT, name, lambda row: f": norm {lengths[row]:.4g}, {advice}", start)
        return features
    refuse_rows(lengths == 0, name, ": the feature is zero, so it has no direction", start)
    if norms == "unit":
        scaled: FloatArray = (features / lengths[:, None]).astype(np.float32)
        return scaled
    advice = "use norms=unit to scale it to 1, or norms=keep to leave it"
    wrong = np.abs(lengths - 1) > NORM_TOLERANCE
    refuse_rows(wrong, name, lambda row: f": norm {lengths[row]:.4g} instead of 1; {advice}", start)
    return features


def schema_of(parts: Sequence[Part], dtype: npt.DTypeLike, further: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the schema of a feature table: ``id``, ``label``, one column of features for each part, and ``further``.

    A single column of features has the metadata of the table.
    """
    named = [{IDENTITY_KEY: json.dumps(part.identity.to_dict())} if part.identity else None for part in parts]
    features = [
        pa.field(
            part.column, pa.list_(pa.from_numpy_dtype(dtype), part.width), metadata=own if len(parts) > 1 else None
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
        column: vectors(part * scale) for column, part in zip(columns, np.split(features, ends, axis=1), strict=True)
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
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def parquet_writer(target: IO[bytes], schema: pa.Schema, compression: str = "snappy") -> pq.ParquetWriter:
    """Open a Parquet writer that uses dictionaries only for text, because numbers rarely repeat."""
    empty = io.BytesIO()
    pq.write_metadata(schema, empty)  # names the columns inside lists and structs
    columns = pq.ParquetFile(empty).schema
    text = [one.path for one in map(columns.column, range(len(columns))) if one.logical_type.type == "STRING"]
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
