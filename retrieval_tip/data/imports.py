"""Keys from and to other programs, as feature tables: research caches, arrays, folders of embeddings, and indexes."""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from retrieval_tip.data.feature_tables import NORM_TOLERANCE, TABLE_ROWS, schema_of, table_of, write_table
from retrieval_tip.data.tables import (
    FEATURE,
    MAX_ROWS,
    MAX_TEXT,
    few_names,
    open_csv,
    open_parquet,
    reading,
    row_list,
    texts,
)
from retrieval_tip.errors import InputError, UsageError, first_line, show
from retrieval_tip.files import check_regular, open_regular, read_regular, real

Array = npt.NDArray[Any]

MAX_NAMES = 1 << 27
"""Largest file of class names, in bytes."""
MAX_NAME = 1024
"""Longest class name, in characters. Ids may have :data:`tables.MAX_TEXT`, as in every table that is read."""

ID_COLUMNS = ("id", "path", "image_path", "key")
LABEL_COLUMNS = ("label", "class")
PATH_COLUMNS = ("image_path", "path")
NAME_COLUMNS = ("name", "class_name", "classname", "class", "label")
"""Columns that are looked for, in this order."""

_RESEARCH = re.compile(r"(keys|best_F)_(\d+)shots\.pt")
_NUMBER = re.compile(r"(\d+)\.[^.]+$")
_FOLDER = r"^(?s:.*[/\\])?(?P<folder>[^/\\]+)[/\\]+[^/\\]+$"
_KINDS = (
    "expected keys_{K}shots.pt or best_F_{K}shots.pt beside values_{K}shots.pt, a .npy with --labels, "
    "a folder with img_emb and metadata, or a folder of .npy and .parquet files"
)

_UNFIT: dict[str, Callable[[Array], Any]] = {
    "the feature holds NaN, infinity or more than float32 can": lambda rows: ~np.isfinite(rows).all(axis=1),
    "the feature is zero, so it has no direction": lambda rows: ~rows.any(axis=1),
}


@dataclass(frozen=True)
class _Part:
    """One file of features ``[n, d]``, and the table, in a file or at hand, whose row i describes its row i."""

    file: Path
    features: Callable[[], Array]
    rows: Path | pa.Table

    @property
    def where(self) -> str:
        """The file that says what the rows are, for messages."""
        return show(self.rows if isinstance(self.rows, Path) else self.file)


class _Columns(NamedTuple):
    """Where ids and labels stand: ``id`` ``None`` is a running number, ``folder`` the label is the folder's name."""

    id: str | None
    label: str
    folder: bool


def import_table(
    source: Path,
    out: Path,
    *,
    classes: Path | None = None,
    labels: Path | None = None,
    label_column: str | None = None,
) -> int:
    """Convert what another program wrote into one feature table: ``id``, ``label``, ``feature``, further columns.

    - Tip-Adapter's cache: ``keys_{K}shots.pt`` ``[d, n]`` (or the folder that holds one), or, where it is named itself,
      Tip-Adapter-F's ``best_F_{K}shots.pt`` ``[n, d]``; the one-hot ``values_{K}shots.pt`` ``[n, c]`` beside says the
      classes. Files are read as tensors only: no code in them is run.
    - ``.npy`` ``[n, d]``, and ``labels``: a ``.csv``, ``.tsv`` or ``.parquet`` of ``n`` rows, or a ``.npy`` ``[n]`` of
      whole numbers or strings
    - clip-retrieval's folder, ``img_emb/*.npy`` beside ``metadata/*.parquet``, or one of both kinds of files
      (autofaiss), paired by the number that ends their names, or by their order where they have none

    The label is the column ``label_column``, or else ``label``, ``class``, or the folder of ``image_path`` or ``path``;
    the id is ``id``, ``path``, ``image_path``, ``key``, or the row's number over all files. Ids may repeat, as in every
    feature table (such rows are one shot's views where it is fine-tuned). Columns are kept but those that became id or
    label, or have the name of one of the three. Features stay float16 or float32 (float64 and bfloat16 become float32),
    and their norms are not touched.

    Args:
        source: the file or folder.
        out: the table, written beside its place and renamed in when whole.
        classes: names of the classes: ``.txt``, one a line; ``.json``, a list, ``{id: name}`` or ``{name: id}``;
            ``.csv`` with a column ``name``. Labels that are whole numbers are positions among them; a text that is one
            of them stays. Without it research caches have ``class 0`` and so on.
        labels: the labels of a ``.npy``.
        label_column: the column of labels.

    Returns the number of rows.

    Raises:
        UsageError: arguments that do not go together, or a source that is none of these or several.
        InputError: a file that cannot be read or does not fit, naming it and its rows; ``out`` cannot be written. Then
            nothing is left of it.
    """
    try:
        names = None if classes is None else _class_names(classes)
        parts, names = _find(source, names, labels, label_column)
        used = [classes, labels, *(file for part in parts for file in (part.file, part.rows) if isinstance(file, Path))]
        if out.exists() and any(file is not None and out.samefile(file) for file in used):
            raise UsageError(f"{show(out)}: is what is read here; give another name to write")
    except OSError as error:
        raise InputError(f"{show(error.filename or source)}: cannot be read: {error.strerror or error}") from None
    columns, schema = _plan(parts, label_column)
    return write_table(out, schema, _blocks(parts, columns, schema, names))


# What is there


def _find(
    source: Path, names: list[str] | None, labels: Path | None, label_column: str | None
) -> tuple[list[_Part], list[str] | None]:
    """The files of a source in order, and the names of the classes."""
    name = show(source)
    if not source.exists():
        raise InputError(f"{name}: no such file or folder")
    if labels is not None and source.suffix.lower() != ".npy":
        raise UsageError("labels: go with a .npy of features; leave them out, what is imported has its own")
    file = source
    if source.is_dir():
        keys = [
            file for file in _files(source, ".pt") if file.name.startswith("keys") and _RESEARCH.fullmatch(file.name)
        ]
        nested = (source / "img_emb").is_dir()
        arrays = _files(source / "img_emb" if nested else source, ".npy")
        if not keys and not arrays:
            raise UsageError(f"{name}: holds nothing that can be imported; {_KINDS}")
        if len(keys) > 1 or (keys and arrays):
            several = ", ".join(show(path.name) for path in [*keys, *arrays][:4])
            raise UsageError(f"{name}: holds several things that can be imported ({several}); name one of them itself")
        if arrays:
            tables = _files(source / "metadata" if nested else source, ".parquet")
            return [
                _Part(_inside(source, array), partial(_read_npy, array), _inside(source, table))
                for array, table in _pairs(source, arrays, tables)
            ], names
        file = _inside(source, keys[0])
    elif not source.is_file():
        raise InputError(f"{name}: not a file")  # a pipe would wait for ever
    if _RESEARCH.fullmatch(file.name):
        if label_column is not None:
            raise UsageError(f"label_column: {show(file)} has no columns; leave it out")
        return _research(file, names)
    if file.suffix.lower() != ".npy":
        raise UsageError(f"{name}: cannot be imported; {_KINDS}")
    if labels is None:
        raise UsageError(f"{name}: needs labels; give a .csv, .tsv, .parquet or .npy with one a row")
    return [_Part(file, partial(_read_npy, file), _label_rows(labels))], names


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{show(folder)}: no such folder; it should hold {suffix} files")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() == suffix and not f.name.startswith("."))


def _inside(folder: Path, file: Path) -> Path:
    """A file that was found, not named: it has to lie in the folder, also when links are followed."""
    if not real(file).is_relative_to(real(folder)):
        raise InputError(f"{show(file)}: is a link that leads out of the folder; put the file itself there")
    if not file.is_file():
        raise InputError(f"{show(file)}: missing, or not a file")
    return file


def _pairs(folder: Path, arrays: Sequence[Path], tables: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Which table goes with which array: that of the same number, or the next where the names do not all have one."""
    numbers = [[int(m[1]) if (m := _NUMBER.search(f.name)) else None for f in files] for files in (arrays, tables)]
    if None not in numbers[0] and None not in numbers[1]:
        first, second = Counter(numbers[0]), Counter(numbers[1])
        if odd := [str(n) for n in {**first, **second} if (first[n], second[n]) != (1, 1)]:
            raise InputError(f"{show(folder)}: number {odd[0]} is not that of one .npy and one .parquet file")
        by_number = dict(zip(numbers[1], tables, strict=True))
        ordered = sorted(zip(numbers[0], arrays, strict=True))
        return [(array, by_number[number]) for number, array in ordered]
    if len(arrays) != len(tables):
        raise InputError(f"{show(folder)}: {len(arrays)} .npy and {len(tables)} .parquet files; each needs its other")
    return list(zip(arrays, tables, strict=True))


# Files


def _read_npy(file: Path) -> Array:
    """An array, memory-mapped: a header that claims more than the file holds is refused, and no pickle is read."""
    try:
        check_regular(file)
        array: Array = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # damaged headers fail anywhere in numpy's parser
        raise InputError(f"{show(file)}: cannot be read as .npy: {first_line(error)}") from None
    return array


def _read_tensor(file: Path) -> Array:
    """One tensor of ``torch.save``, memory-mapped where that works. Nothing that the file tells to run is run."""
    name, load = show(file), partial(torch.load, map_location="cpu", weights_only=True)
    try:
        with open_regular(file) as raw, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(raw) and any(entry.compress_type for entry in zipfile.ZipFile(raw).infolist()):
                raise ValueError("it is compressed, which torch.save never does")  # a little file may become a huge one
            raw.seek(0)
            try:
                tensor = load(str(file), mmap=True)
            except (RuntimeError, ValueError):  # of before torch 1.6, or of a name that is not UTF-8
                tensor = load(raw)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; the research code writes it beside the other") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{name}: holds something else than a tensor, which may be code and is not run, or is damaged; "
            "save the tensor alone: torch.save(tensor.cpu(), FILE)"
        ) from None
    except Exception as error:  # damaged files fail anywhere in torch
        raise InputError(f"{name}: not a file of torch.save, or damaged ({first_line(error)}); copy it again") from None
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise InputError(f"{name}: holds a {type(tensor).__name__} instead of a plain tensor; save the tensor alone")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise InputError(f"{name}: shape {tuple(tensor.shape)} is more than the file holds; save a contiguous tensor")
    try:
        tensor = tensor.detach()
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).resolve_neg().numpy()
    except (RuntimeError, TypeError):
        raise InputError(f"{name}: {tensor.dtype} cannot be used; save it as float32") from None
    return array


def _research(file: Path, names: list[str] | None) -> tuple[list[_Part], list[str]]:
    """Tip-Adapter's cache: keys with the classes that the one-hot values beside say."""
    name, match = show(file), _RESEARCH.fullmatch(file.name)
    assert match is not None
    values_file = _inside(file.parent, file.with_name(f"values_{match[2]}shots.pt"))
    keys, values = _read_tensor(file), _read_tensor(values_file)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{show(values_file)}: shape {values.shape}; expected [n, c], one-hot")
    n, c = values.shape
    if keys.ndim != 2 or n not in keys.shape:
        raise InputError(f"{name}: shape {keys.shape} does not fit {show(values_file.name)}, which has {n} rows")
    ids = _hot(values, show(values_file))
    if names is not None and len(names) != c:
        raise InputError(f"classes: {len(names)} names, but {show(values_file)} has {c} classes; give one a class")
    transposed = keys.shape[1] == n
    if match[1] == "best_F":  # the weight of a linear layer; trained, so that its norms say nothing
        transposed = keys.shape[0] != n
    elif keys.shape[0] == n and transposed:
        norms = [np.linalg.norm(keys.astype(np.float64), axis=axis) for axis in (1, 0)]
        rows, columns = (bool((np.abs(each - 1) <= NORM_TOLERANCE).all()) for each in norms)
        if rows == columns:
            raise InputError(
                f"{name}: as many keys as values in a key, and norms do not tell which are which; "
                "save the keys [n, d] as .npy, and give their labels"
            )
        transposed = columns
    features = keys.T if transposed else keys
    part = _Part(file, lambda: features, pa.table({"label": ids}))
    return [part], names or [f"class {i:0{len(str(c - 1))}}" for i in range(c)]


def _hot(values: Array, name: str) -> npt.NDArray[np.int64]:
    """Where the one of each row of one-hot values ``[n, c]`` stands. Raises InputError for anything else."""
    n, c = values.shape
    ids, wrong = np.empty(n, dtype=np.int64), np.zeros(n, dtype=bool)
    size = max(1, (1 << 24) // c)
    for block in (slice(start, start + size) for start in range(0, n, size)):
        hot = values[block] == 1
        wrong[block] = (np.count_nonzero(values[block], axis=1) != 1) | ~hot.any(axis=1)
        ids[block] = hot.argmax(axis=1)
    if wrong.any():
        raise InputError(
            f"{name}: {row_list(np.flatnonzero(wrong))} not one-hot; values that were trained have no place in a "
            "feature table: give the one-hot values of the same keys"
        )
    return ids


def _label_rows(labels: Path) -> Path | pa.Table:
    """The labels of a .npy: the table, or the one that an array ``[n]`` is."""
    name, suffix = show(labels), labels.suffix.lower()
    if not labels.is_file():
        raise InputError(f"{name}: {'not a file' if labels.exists() else 'no such file'}")
    if suffix in (".csv", ".tsv", ".parquet"):
        return labels
    if suffix != ".npy":
        raise UsageError(f"{name}: not labels; expected .csv, .tsv, .parquet or .npy")
    array = _read_npy(labels)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise InputError(f"{name}: {array.dtype} of shape {array.shape}; expected [n] of whole numbers or strings")
    try:
        table: pa.Table = pa.table({"label": pa.array(array.astype(array.dtype.newbyteorder("=")))})
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{name}: holds what is no text: {first_line(error)}") from None
    return table


def _class_names(file: Path) -> list[str]:
    """Names of the classes in order, distinct."""
    name, suffix = show(file), file.suffix.lower()
    if suffix not in (".txt", ".json", ".csv"):
        raise UsageError(f"{name}: not class names; expected .txt, .json or .csv")
    if not file.is_file():
        raise InputError(f"{name}: {'not a file' if file.exists() else 'no such file'}")
    try:
        if suffix == ".csv":
            columns = _columns_of(file).names
            column = next((column for column in NAME_COLUMNS if column in columns), columns[0])
            if column not in NAME_COLUMNS and len(columns) > 1:
                raise InputError(f"{name}: no column 'name' among {few_names(columns)}; call the column of names so")
            values: Any = [each for rows in _read_rows(file) for each in rows[column].to_pylist()]
        else:
            text = io.TextIOWrapper(io.BytesIO(read_regular(file, MAX_NAMES)), "utf-8-sig").read()
            values = json.loads(text) if suffix == ".json" else text.rstrip().split("\n")
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{name}: cannot be read: {error}") from None
    if isinstance(values, dict):
        numbers = [str(i) for i in range(len(values))]
        if all(type(value) is int for value in values.values()):  # {name: id}
            values = {str(number): key for key, number in values.items()}
        if values.keys() != set(numbers):
            raise InputError(f"{name}: expected ids from 0 to {len(numbers) - 1}, each once")
        values = [values[number] for number in numbers]
    names = [show(each).strip() if isinstance(each, str) else "" for each in values] if isinstance(values, list) else []
    if not names or not all(0 < len(each) <= MAX_NAME for each in names):
        at = f" {next(i for i, each in enumerate(names) if not 0 < len(each) <= MAX_NAME)}" if names else ""
        raise InputError(f"{name}: class{at} has no name; expected texts of 1 to {MAX_NAME} characters")
    if twice := [each for each, times in Counter(names).items() if times > 1]:
        raise InputError(f"{name}: class name {twice[0]!r} stands twice; give each class a name of its own")
    return names


# Blocks


def _plan(parts: Sequence[_Part], label_column: str | None) -> tuple[_Columns, pa.Schema]:
    """Check that the parts fit together, before anything is written: their columns, and the schema of the whole."""
    first, total, dtypes, further = parts[0], 0, set(), []
    columns = _choose(_columns_of(first.rows).names, label_column, first.where)
    d = first.features().shape[-1:]
    for part in parts:
        name, features, schema = show(part.file), part.features(), _columns_of(part.rows)
        if features.ndim != 2 or not features.shape[1] or features.dtype.kind != "f":
            raise InputError(
                f"{name}: {features.dtype} of shape {features.shape}; expected [n, d] of float16 or float32"
            )
        if features.shape[1:] != d:
            raise InputError(f"{name}: features of {features.shape[1]} values, {show(first.file)} has {d[0]}")
        if missing := [column for column in (columns.id, columns.label) if column and column not in schema.names]:
            raise InputError(f"{part.where}: no column {missing[0]!r}, which {first.where} has")
        if len(features) != (rows := _count(part.rows)):
            raise InputError(f"{name}: {len(features)} rows, but {rows} in {part.where}; each needs its other")
        total += rows
        dtypes.add(np.dtype(np.float16 if features.dtype.itemsize == 2 else np.float32))
        taken = {columns.id, None if columns.folder else columns.label, "id", "label", FEATURE}
        further.append(pa.schema([field.remove_metadata() for field in schema if field.name not in taken]))
    if not 0 < total <= MAX_ROWS:
        raise InputError(f"{show(first.file)}: {total} rows in all; expected 1 to {MAX_ROWS}")
    try:
        fields = list(pa.unify_schemas(further, promote_options="permissive"))
    except pa.ArrowException as error:
        raise InputError(f"{first.where}: a column is of another type in another file: {first_line(error)}") from None
    return columns, schema_of(d[0], np.result_type(*dtypes), fields)


def _choose(names: Sequence[str], label_column: str | None, where: str) -> _Columns:
    ident = next((column for column in ID_COLUMNS if column in names), None)
    if label_column is not None and label_column not in names:
        raise UsageError(f"label_column: {where} has no column {label_column!r} among {few_names(names)}")
    label = label_column or next((column for column in LABEL_COLUMNS if column in names), None)
    path = next((column for column in PATH_COLUMNS if column in names), None)
    if label is None and path is None:
        raise InputError(f"{where}: no column 'label' among {few_names(names)}; say which it is with label_column")
    return _Columns(None if ident == label else ident, label or path or "", label is None)


def _blocks(
    parts: Sequence[_Part], columns: _Columns, schema: pa.Schema, names: list[str] | None
) -> Iterator[pa.Table]:
    dtype, done = schema.field(FEATURE).type.value_type.to_pandas_dtype(), 0
    positions = None if names is None else {str(i): name for i, name in enumerate(names)}
    known = None if positions is None else positions | {name: name for name in positions.values()}
    for part in parts:
        features, start = part.features(), 0
        for rows in _read_rows(part.rows):
            number = pa.array(range(done + start, done + start + len(rows))).cast(pa.string())
            ids = _texts(rows[columns.id], "id", MAX_TEXT, start, part.where) if columns.id else number
            by = positions if pa.types.is_integer(rows[columns.label].type) else known
            labels = _labels(rows[columns.label], columns.folder, by, start, part.where)
            block = _checked(features, start, len(rows), dtype, show(part.file))
            further = {field.name: _cast(rows, field, part.where) for field in list(schema)[3:]}
            yield table_of(schema, ids, labels, block, further)
            start += len(rows)
        done += start


def _cast(rows: pa.Table, field: pa.Field, where: str) -> Any:
    """A further column as the whole table has it; a file may lack it."""
    if field.name not in rows.column_names:
        return pa.nulls(len(rows), field.type)
    try:
        return rows[field.name].cast(field.type)
    except pa.ArrowException as error:
        raise InputError(f"{where}: column {field.name!r}: {first_line(error)}") from None


def _columns_of(rows: Path | pa.Table) -> pa.Schema:
    if isinstance(rows, pa.Table):
        return rows.schema
    if rows.suffix.lower() != ".parquet":
        return open_csv(rows).schema
    schema = open_parquet(rows).schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{show(rows)}: a column name stands twice in {few_names(schema.names)}")
    return schema


def _count(rows: Path | pa.Table) -> int:
    if isinstance(rows, Path) and rows.suffix.lower() == ".parquet":
        return int(open_parquet(rows).metadata.num_rows)
    return len(rows) if isinstance(rows, pa.Table) else sum(map(len, _read_rows(rows)))


def _read_rows(rows: Path | pa.Table) -> Iterator[pa.Table]:
    """A table in blocks of :data:`TABLE_ROWS` at most; all columns of a text file are text."""
    if isinstance(rows, pa.Table):
        yield from (rows.slice(start, TABLE_ROWS) for start in range(0, len(rows), TABLE_ROWS))
        return
    batches = open_parquet(rows).iter_batches(TABLE_ROWS) if rows.suffix.lower() == ".parquet" else open_csv(rows)
    with reading(show(rows)):
        for batch in batches:
            for start in range(0, len(batch), TABLE_ROWS):
                yield pa.Table.from_batches([batch.slice(start, TABLE_ROWS)])


def _checked(features: Array, start: int, number: int, dtype: npt.DTypeLike, name: str) -> Array:
    """So many features from ``start``, in ``dtype``. Raises InputError naming all rows of the file that cannot be."""

    def block(at: int, size: int) -> Array:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
            return np.ascontiguousarray(features[at : at + size], dtype=dtype)

    rows_read = block(start, number)
    for what, test in _UNFIT.items():
        if test(rows_read).any():
            every = range(0, len(features), TABLE_ROWS)
            rows = np.concatenate([at + np.flatnonzero(test(block(at, TABLE_ROWS))) for at in every])
            raise InputError(f"{name}: {row_list(rows)}: {what}; leave it out, and its label")
    return rows_read


def _texts(column: pa.ChunkedArray, what: str, longest: int, start: int, where: str) -> pa.ChunkedArray:
    """Ids or labels as text. Raises InputError naming the rows that have none, or too long a one."""
    values = texts(column, where, what, needed=True, first=start)
    rows = np.flatnonzero(pc.greater(pc.utf8_length(values), longest).to_numpy())
    if rows.size:
        raise InputError(f"{where}: {row_list(rows + start)}: {what} longer than {longest} characters")
    return values


def _labels(
    column: pa.ChunkedArray, folder: bool, names: Mapping[str, str] | None, start: int, where: str
) -> pa.ChunkedArray:
    """The label of each row, by the folder that it lies in, or as one of ``names`` where there are some."""
    if folder:
        values = _texts(column, "path", MAX_TEXT, start, where)
        folders = pc.struct_field(pc.extract_regex(values, _FOLDER), "folder")
        column = pc.if_else(pc.is_in(folders, pa.array([".", ".."])), None, folders)
    values = _texts(column, "folder of its own" if folder else "label", MAX_NAME, start, where)
    if names is None:
        return values
    labels = [names.get(text) for text in values.to_pylist()]
    rows = np.flatnonzero([label is None for label in labels])
    if rows.size:
        wrong = values[int(rows[0])].as_py()
        raise InputError(f"{where}: {row_list(rows + start)}: label {wrong!r} is none of the classes")
    return pa.chunked_array([pa.array(labels, pa.string())])
