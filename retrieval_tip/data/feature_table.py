"""Read feature tables: Parquet tables with a column of features, whose metadata can name their backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import FileMetaData

from retrieval_tip.arrays import FloatArray, IntArray
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    Part,
    identity_of,
    same_backbone,
    side_by_side,
    width_of,
)
from retrieval_tip.data.source import Source, refuse_rows
from retrieval_tip.data.tables import (
    FEATURE,
    IDENTITY_KEY,
    ParquetFiles,
    feature_column,
    is_vector,
    reading,
)
from retrieval_tip.errors import BackboneError, InputError
from retrieval_tip.settings import Norms
from retrieval_tip.wording import message

NORM_TOLERANCE = 0.01
MOST_KEPT = 1e9  # largest norm that ``norms="keep"`` accepts; the squared product of two features then fits float32
TABLE_ROWS = 8192  # largest number of features that are read at a time


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
            if (dim := width_of(found)) != d:
                raise InputError(
                    f"{source.name}: its features have {dim} values; the index has {d}"
                )


@dataclass(frozen=True)
class FeatureTable:
    """The features of a Parquet file, or of a folder of Parquet parts."""

    files: ParquetFiles

    def parts(self, wanted: Sequence[Part] = ()) -> tuple[Part, ...]:
        """Return the columns of features, or those of the ``wanted`` parts, with their width and their backbone.

        Raises InputError if a column is missing, and BackboneError if it names another backbone than its part.
        """
        for file, _, name in self.files:
            found = _columns(file.schema_arrow, name, wanted)
            with reading(name):
                for batch in file.iter_batches(1, columns=[part.column for part in found]):
                    return tuple(
                        replace(part, width=_matrix(batch.column(part.column), 0, 0, name).shape[1])
                        for part in found
                    )
        raise InputError(f"{self.files.name}: has no rows")

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
        for file, begins, name in self.files:
            groups, first = _row_groups(file.metadata, begins, rows)
            if not groups:
                continue
            with reading(name):
                found = _columns(file.schema_arrow, name, wanted or parts)
                columns = [
                    replace(part, column=place.column)
                    for part, place in zip(parts, found, strict=True)
                ]
                names = [part.column for part in columns]
                for batch in file.iter_batches(TABLE_ROWS, row_groups=groups, columns=names):
                    low, high = np.searchsorted(rows, (first, first + len(batch)))
                    if low < high:
                        start = first - begins
                        features = _joined(batch, columns, start, norms, name, named=bool(wanted))
                        yield slice(low, high), features[rows[low:high] - first]
                    first += len(batch)
                    if first > rows[-1]:
                        break
        self.files.close()  # mapped pages count as memory in use


def _joined(
    batch: pa.RecordBatch,
    parts: Sequence[Part],
    start: int,
    norms: Norms,
    name: str,
    *,
    named: bool,
) -> FloatArray:
    """Return the features of a batch, whose first row is ``start``. Errors name the columns if they were asked for."""
    columns = []
    for part in parts:
        where = f"{name}: column {part.column!r}" if named else name
        matrix = _matrix(batch.column(part.column), start, part.width, where)
        columns.append(check_norms(matrix, start, norms, where))
    return side_by_side(columns)


def _row_groups(metadata: FileMetaData, begins: int, rows: IntArray) -> tuple[list[int], int]:
    """Return the consecutive row groups of a file that hold some of the ``rows``, and their first row.

    ``begins`` is the first row of the file.
    """
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    starts = np.cumsum([begins, *sizes])
    needed = np.flatnonzero(np.diff(np.searchsorted(rows, starts)))
    if not needed.size:
        return [], begins
    first = int(needed[0])
    return list(range(first, int(needed[-1]) + 1)), int(starts[first])


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
