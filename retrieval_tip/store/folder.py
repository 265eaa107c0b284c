"""Read the data files of a version in a folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_tip.errors import StoreError, first_line
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.manifest import DataFile, Manifest


def read_array(
    folder: Path, file: DataFile, shape: tuple[int, int], dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16)
) -> npt.NDArray[np.floating]:
    """Memory-map a ``.npy`` file in copy-on-write mode, so that torch can share the memory.

    Raises StoreError if the file cannot be read or if its shape or dtype is wrong.
    """
    path = folder / file.name
    try:
        array: npt.NDArray[np.floating] = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header can make numpy raise any error
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(f"{path}: an array of {array.dtype} {array.shape} does not match {shape} in the manifest")
    return array


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """Read the label store. Format 7 may have several segments. If one of them lacks a column, its values are null.

    Raises StoreError if the labels do not match the manifest.
    """
    tables = [_read_labels(folder / part.labels.name, part.labels.rows, manifest) for part in manifest.segments]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise StoreError(f"{folder}: label columns of its segments differ ({first_line(error)})") from None
    ranges = [pc.min_max(part["key_id"]).as_py() for part in tables]
    if ranges[-1]["max"] >= manifest.next_key_id:
        raise StoreError(
            f"{folder / 'manifest.json'}: its next_key_id is already in use; restore it, or build the index again"
        )
    if any(one["max"] >= next_one["min"] for one, next_one in itertools.pairwise(ranges)):
        raise StoreError(f"{folder}: key ids of its segments do not ascend; restore it, or build the index again")
    return table


def _read_labels(path: Path, rows: int, manifest: Manifest) -> pa.Table:
    table = _read_table(path)
    own = table.schema.names[: len(LABEL_SCHEMA)] == LABEL_SCHEMA.names and all(
        table.schema.field(i).type == LABEL_SCHEMA.field(i).type for i in range(len(LABEL_SCHEMA))
    )
    if not own or len(table) != rows or any(table[name].null_count for name in ("key_id", "class_id", "label")):
        raise StoreError(f"{path}: does not match the manifest's {rows} keys")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    return table


def read_curve(folder: Path, file: DataFile) -> pa.Table:
    """Read the loss curve of a fine-tuned index, which has one row per epoch.

    Raises StoreError if it does not match the manifest.
    """
    table = _read_table(folder / file.name)
    if len(table) != file.rows:
        raise StoreError(f"{folder / file.name}: has {len(table)} rows instead of {file.rows}")
    return table


def _read_table(path: Path) -> pa.Table:
    try:
        # Do not pass a Python file: Arrow's threads may free its buffers after the interpreter has shut down.
        # Do not pass a path: a folder named x=1 would become a column x.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
            table.validate(full=True)
            table.schema.names  # noqa: B018 - decodes the names, which may fail
            return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None


def check_name(folder: Path) -> None:
    """Raise StoreError if the name of a folder is not valid UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name") from None
