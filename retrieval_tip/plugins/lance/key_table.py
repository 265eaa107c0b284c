"""Read and write a LanceDB table of keys and their labels.

Each row has the columns of the label store and the column ``vector`` (the key). If the index has a metric, each row
also has the column ``_point``, which is the key transformed by the metric.

Every write creates an immutable version of the table. The manifest of the index contains the version number to use.
LanceDB's vector indexes are not used: reading the keys of the classes that can win is as fast for a single query, six
times as fast for many, and needs no second copy of the keys.
"""

from __future__ import annotations

import datetime
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval_tip.arrays import IntArray, KeyArray
from retrieval_tip.data.writing import vectors
from retrieval_tip.errors import RetrievalTipError, StoreError, UsageError
from retrieval_tip.machine import install
from retrieval_tip.plugins.lance.bucket import check_process, storage_options
from retrieval_tip.store.address import Address
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.versions import changed_meanwhile
from retrieval_tip.wording import first_line

KeyArray = KeyArray  # as in :mod:`retrieval.inputs`, which imports torch

TABLE = "keys"
VECTOR, POINT, ROW = "vector", "_point", "_rowid"
VALUES = {"float32": pa.float32(), "float16": pa.float16()}
FLAT, CLASSES = "Flat", "Classes"
"""Index types for no index, and for an index over class ids that is used to read the keys of a few classes."""
UNINDEXED = 20_000
"""Minimum number of unindexed rows before they are added to the index."""
CACHE_BYTES = 3 << 28
"""Maximum size in bytes of the index data in memory. The rest is read on demand."""
SCANNED = 8192
"""Number of rows that are read at a time."""
GROUPED = 1 << 28
"""Number of bytes of rows that are sorted by class at a time while a table is written."""
RESTORE = "go back to an earlier version, or build the store again"
TAG = "kept-"
FOREVER = datetime.timedelta(days=36500)
ASKED_AT_ONCE = 4096
"""Maximum number of key ids in one condition."""
LARGEST = (1 << 63) - 1
"""Maximum value of an int64 column."""

_CONFLICT = re.compile(
    "concurrent transaction|commit conflict|not found: .*/_refs/tags/", re.IGNORECASE
)
"""What LanceDB says if another process has changed the same rows, or removed its tags."""


def lancedb() -> Any:
    """Import LanceDB. Raises UsageError if it is not installed."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # suppresses warnings about intended uses
    try:
        return importlib.import_module("lancedb")
    except ImportError as error:
        raise UsageError(
            f"LanceDB cannot be imported ({first_line(error)}); run {install('lance')}"
        ) from None


@cache
def _session() -> Any:
    """Return the LanceDB session, whose caches are shared by all tables in this process."""
    return lancedb().Session(
        index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=CACHE_BYTES // 4
    )


def rows_of(labels: pa.Table, keys: KeyArray, points: KeyArray | None = None) -> pa.Table:
    """Combine labels, keys and points into table rows."""
    rows = labels.append_column(VECTOR, vectors(keys))
    return rows if points is None else rows.append_column(POINT, vectors(points))


def grouped(rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Sort rows by class, so that the keys of each class are stored together.

    For 500 keys per class, reading two classes took 21 ms in random order and 4 ms in sorted order.
    """
    while held := list(_next_group(rows)):
        ids = np.concatenate([batch["class_id"].to_numpy() for batch in held])
        if (ids[1:] >= ids[:-1]).all():
            yield from held
            continue
        whole = pa.concat_batches(held)  # taking rows from chunks is three times slower
        order = np.argsort(ids, kind="stable")
        for start in range(0, len(order), SCANNED):
            yield whole.take(pa.array(order[start : start + SCANNED]))


def _next_group(rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    size = 0
    for batch in rows:
        yield batch
        size += batch.nbytes
        if size >= GROUPED:
            return


@contextmanager
def _store_errors(address: Address, what: str) -> Iterator[None]:
    """Convert LanceDB errors to a StoreError with one line. It says so if another process has written meanwhile."""
    check_process(address)  # a forked process lacks the threads of LanceDB
    try:
        yield
    except RetrievalTipError:
        raise
    except Exception as error:  # also catches LanceDB panics, which have their own type
        if _CONFLICT.search(str(error)):
            raise changed_meanwhile(address) from None
        raise StoreError(f"{address}: {what} failed ({first_line(error)[:300]})") from None


class KeyTable:
    """A version of the table of a store. Only the latest version can be changed."""

    def __init__(self, address: Address, table: Any) -> None:
        self.address = address
        self.table = table

    @classmethod
    def at(cls, address: Address, version: int | None = None) -> KeyTable:
        """Open a version of the table, by default the newest one, even if no manifest refers to it."""
        what = "its table" if version is None else f"version {version} of its table"
        with _store_errors(address, f"opening {what}"):
            table = _connected(address).open_table(TABLE)
            if version is not None:
                table.checkout(version)
        return cls(address, table)

    @classmethod
    def create(
        cls, address: Address, rows: Iterator[pa.RecordBatch], schema: pa.Schema
    ) -> KeyTable:
        """Write all ``rows`` to a new table, or to the next version of an existing table.

        If an error occurs, nothing is written.
        """
        failed: list[BaseException] = []

        def read() -> Iterator[pa.RecordBatch]:
            try:
                yield from rows
            except BaseException as error:  # raised below instead of the LanceDB error
                failed.append(error)
                raise

        reader = pa.RecordBatchReader.from_batches(schema, read())
        try:
            with _store_errors(address, "writing its table"):
                table = _connected(address).create_table(TABLE, reader, mode="overwrite")
        except StoreError:
            if failed:
                raise failed[0] from None
            raise
        return cls(address, table)

    @property
    def version(self) -> int:
        """Version number of the table."""
        with _store_errors(self.address, "reading its version"):
            return int(self.table.version)

    @property
    def rows(self) -> int:
        """Number of rows in the table."""
        with _store_errors(self.address, "counting its rows"):
            return int(self.table.count_rows())

    def rows_on_disk(self) -> int:
        """Count the rows by reading the files again. Raises StoreError if a file is damaged.

        LanceDB does not notice if the disk is full while it writes a deletion file, and then trusts its own cache.
        """
        with _store_errors(self.address, "reading what it wrote"):
            table = (
                lancedb().connect(self.address.uri).open_table(TABLE)
            )  # a new session, with empty caches
            table.checkout(self.version)
            return int(table.count_rows("key_id >= 0"))

    @property
    def schema(self) -> pa.Schema:
        """Schema of the table."""
        with _store_errors(self.address, "reading its schema"):
            schema: pa.Schema = self.table.schema
            return schema

    @property
    def has_points(self) -> bool:
        """Whether the table also contains the points of the keys."""
        return POINT in self.schema.names

    @property
    def vector_column(self) -> str:
        """Name of the column to compare with, which contains the points if there are any, and the keys otherwise."""
        return POINT if self.has_points else VECTOR

    @property
    def label_columns(self) -> list[str]:
        """Names of the columns of the label store."""
        return [name for name in self.schema.names if name not in (VECTOR, POINT)]

    @property
    def vector_type(self) -> tuple[int, pa.DataType]:
        """Length and value type of the keys. Raises StoreError if the table does not contain keys."""
        schema = self.schema
        if not {VECTOR, *LABEL_SCHEMA.names} <= set(schema.names):
            raise StoreError(
                f"{self.address}: its table does not hold keys and labels; build the store again"
            )
        kind = schema.field(VECTOR).type
        return kind.list_size, kind.value_type

    def scan(
        self,
        columns: Sequence[str],
        column: str = "",
        values: Sequence[int | str] = (),
        *,
        with_rows: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of all rows in batches, or of the rows whose ``column`` is one of ``values``.

        Numbers that do not fit in an int64 match no row. If ``with_rows`` is true, ``_rowid`` holds the row numbers.
        """
        values = [
            value for value in values if isinstance(value, str) or -LARGEST <= value <= LARGEST
        ]
        parts = (
            values[start : start + ASKED_AT_ONCE] for start in range(0, len(values), ASKED_AT_ONCE)
        )
        conditions = (
            (f"{column} IN ({', '.join(map(literal, part))})" for part in parts)
            if column
            else (None,)
        )
        with _store_errors(self.address, "reading its rows"):
            for condition in conditions:
                query = self.table.search().select(list(columns)).with_row_id(with_rows)
                query = query if condition is None else query.where(condition)
                yield from query.to_batches(SCANNED)

    def read(
        self, columns: Sequence[str], column: str = "", values: Sequence[int | str] = ()
    ) -> pa.Table:
        """Read the same rows as :meth:`scan` as one table."""
        return pa.Table.from_batches(
            list(self.scan(columns, column, values)), self._schema_of(columns)
        )

    def _schema_of(self, columns: Sequence[str]) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in columns])

    def take(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        """Read columns of rows, given their ascending row numbers. Raises StoreError if a row is missing."""
        if not len(rows):
            return self._schema_of(columns).empty_table()
        with _store_errors(self.address, "reading rows"):
            taken: pa.Table = (
                self.table.take_row_ids(rows.tolist()).select(list(columns)).to_arrow()
            )
        if len(taken) != len(rows):
            raise StoreError(
                f"{self.address}: found {len(taken)} of {len(rows)} rows; check it with index verify"
            )
        return taken.select(list(columns))

    def offsets(self, places: IntArray, columns: Sequence[str]) -> pa.Table:
        """Read columns of the rows at the given positions, which must be ascending."""
        with _store_errors(self.address, "reading rows"):
            taken: pa.Table = (
                self.table.take_offsets(places.tolist()).select(list(columns)).to_arrow()
            )
        return taken

    def matrix(self, column: pa.Array | pa.ChunkedArray) -> KeyArray:
        """Return the vectors of a column as an array of shape ``[m, d]``. Raises StoreError if a value is missing."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        values = column.flatten()
        if column.null_count or values.null_count:
            raise StoreError(f"{self.address}: a key has missing values; {RESTORE}")
        matrix: KeyArray = values.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        return matrix

    def class_ids(self, column: pa.Array | pa.ChunkedArray, n_classes: int) -> IntArray:
        """Return the class ids of a column. Raises StoreError if a class id is out of range."""
        ids: IntArray = column.to_numpy().astype(np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_classes:
            raise StoreError(
                f"{self.address}: class ids are out of range; check it with index verify"
            )
        return ids

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Write one version of the table, and raise StoreError if another process has written one in the meantime.

        LanceDB would silently apply the change to the rows of the other process.
        """
        before = self.version
        with _store_errors(self.address, what):
            yield
        if self.version != before + 1:
            raise changed_meanwhile(self.address)

    def append(self, rows: pa.Table) -> None:
        """Add rows to the table, after columns that it lacks. Columns that the rows lack are null."""
        there = self.schema
        if new := [field for field in rows.schema if field.name not in there.names]:
            with self._writing("adding columns"):
                self.table.add_columns(pa.schema(new))
            there = self.schema
        with self._writing("adding rows"):
            self.table.add(rows.cast(pa.schema([there.field(name) for name in rows.column_names])))

    def delete(self, key_ids: Sequence[int]) -> None:
        """Delete the rows of the given keys."""
        for start in range(0, len(key_ids), ASKED_AT_ONCE):
            with self._writing("removing rows"):
                self.table.delete(
                    f"key_id IN ({', '.join(map(str, key_ids[start : start + ASKED_AT_ONCE]))})"
                )

    def change(self, where: str, column: str, sql: str) -> None:
        """Set a column of the rows that match a condition to an SQL expression."""
        with self._writing("changing rows"):
            self.table.update(where=where, values_sql={column: sql})

    def restore(self, version: int) -> None:
        """Restore an earlier version as the newest version. This drops the rows of interrupted writers."""
        with _store_errors(self.address, f"going back to version {version} of its table"):
            self.table.restore(version)

    def build_index(self, kind: str) -> None:
        """Rebuild the index of the table. ``Flat`` only drops the index, and ``Classes`` indexes the class ids."""
        with _store_errors(self.address, f"building its index ({kind})"):
            for entry in self.table.list_indices():
                self.table.drop_index(entry.name)
            if kind == CLASSES:
                self.table.create_index("class_id", config=lancedb().index.BTree())

    def drop_points(self) -> None:
        """Remove the points from the table, and drop the indexes, which may cover them in older tables."""
        self.build_index(FLAT)
        with _store_errors(self.address, "removing points"):
            self.table.drop_columns([POINT])

    def unindexed(self) -> int:
        """Return the number of rows that are not in the index, or 0 if there is no index."""
        with _store_errors(self.address, "reading its index"):
            stats = [self.table.index_stats(entry.name) for entry in self.table.list_indices()]
        return max((int(own.num_unindexed_rows) for own in stats if own is not None), default=0)

    def optimize(self) -> None:
        """Merge small fragments, and add all rows to the index. No version is deleted."""
        with _store_errors(self.address, "optimizing its table"):
            self.table.optimize(
                cleanup_older_than=FOREVER
            )  # LanceDB deletes versions after seven days by default

    def prune(self, kept: Sequence[int]) -> None:
        """Delete the versions before the first version in ``kept``, and the data that only the deleted versions use.

        LanceDB deletes versions by age but never deletes a tagged version, so each version in ``kept`` has a tag.
        ``kept`` must be in ascending order, and another process may have added later versions.
        """
        with _store_errors(self.address, "marking versions"):
            tags = self.table.tags.list()
            for version in kept:
                if f"{TAG}{version}" not in tags:
                    self.table.tags.create(f"{TAG}{version}", version)
            for tag, entry in tags.items():
                if (
                    tag.startswith(TAG)
                    and entry["version"] not in kept
                    and entry["version"] < kept[-1]
                ):
                    self.table.tags.delete(tag)
            made = {entry["version"]: entry["timestamp"] for entry in self.table.list_versions()}
        self.optimize()  # the age is measured in the call below, which must be fast
        # Clocks differ, so the oldest is not always the first. Later versions may be those of a writer at work.
        oldest = min(at for version, at in made.items() if version in kept or version > kept[-1])
        for slack in (datetime.timedelta(seconds=0.002 * 2**doubled) for doubled in range(22)):
            since = max(datetime.datetime.now(oldest.tzinfo) - oldest, datetime.timedelta()) + slack
            try:
                with _store_errors(self.address, "deleting versions"):
                    self.table.optimize(cleanup_older_than=since)
                return
            except StoreError as error:
                if "tagged" not in str(error):
                    raise


def _connected(address: Address) -> Any:
    return lancedb().connect(
        address.uri, storage_options=storage_options(address) or None, session=_session()
    )


def literal(value: int | str) -> str:
    """Convert a value to an SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value))
