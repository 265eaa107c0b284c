"""Feature tables: Parquet files of features, read and written, and the backbone that they say they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.backbones.base import Backbone, Identity
from retrieval_tip.data.sources import Source
from retrieval_tip.data.tables import (
    FEATURE,
    feature_column,
    few_names,
    open_parquet,
    reading,
    row_groups,
    row_list,
    table_files,
    vectors,
)
from retrieval_tip.errors import BackboneError, InputError, first_line, show
from retrieval_tip.files import replacing
from retrieval_tip.settings import Norms

FloatArray = npt.NDArray[np.float32]

IDENTITY_KEY = b"retrieval_tip.backbone"
NORM_TOLERANCE = 0.01
MOST_KEPT = 1e9
"""Largest norm of features that are kept as they are: the square of a product of two fits float32."""
TABLE_ROWS = 8192


def same_backbone(one: Identity, other: Identity, what: str) -> None:
    """Raise BackboneError naming both, unless features of the two can be compared."""
    if one.fingerprint != other.fingerprint:
        raise BackboneError(
            f"{what}: made with backbone {one}, but {other} is in use; their features cannot be compared"
        )


def check_backbone(identity: Identity | None, d: int, backbone: Backbone | None, sources: Sequence[Source]) -> None:
    """Raise where features of ``sources`` cannot be compared with an index of ``d`` values by ``identity``.

    BackboneError names both backbones, or the decoder that this package no longer has; InputError the two lengths.
    """
    if backbone is not None:
        if identity is not None and "decoder" in identity.preprocess:
            raise BackboneError(
                f"index: its photos were decoded by {identity.preprocess['decoder']!r}, which retrieval-tip no "
                "longer has; build the index again from its photos, or ask it about a feature table"
            )
        if identity is not None:
            same_backbone(identity, backbone.identity, "index")
        if backbone.dim != d:
            raise BackboneError(f"backbone {backbone.identity}: its features have {backbone.dim} values, the index {d}")
    for source in sources:
        if source.table is not None:
            said = table_identity(source.table)
            if identity is not None and said is not None:
                same_backbone(said, identity, source.name)
            if table_dim(source.table) != d:
                raise InputError(f"{source.name}: features of {table_dim(source.table)} values, the index has {d}")


def table_identity(path: Path | str) -> Identity | None:
    """The backbone in a feature table's metadata, if there is one."""
    files = table_files(path)
    raw = (open_parquet(files[0]).schema_arrow.metadata or {}).get(IDENTITY_KEY) if files else None
    if raw is None:
        return None
    try:
        return Identity.from_dict(json.loads(raw))
    except (ValueError, RecursionError, BackboneError) as error:
        raise InputError(f"{show(path)}: its backbone metadata cannot be read ({error})") from None


def table_dim(path: Path | str) -> int:
    """Length ``d`` of the features of a table."""
    for batch in read_features(path, "keep"):
        return int(batch.shape[1])
    raise InputError(f"{show(path)}: has no rows")


def read_features(path: Path | str, norms: Norms = "check") -> Iterator[FloatArray]:
    """The features of a table in file order, ``[b, d]`` float32 a time, so that no table has to fit in memory.

    Raises InputError naming the rows where features are missing, of unequal length, not finite, or not of unit norm.
    """
    for _, features in read_rows(path, norms, 0, None):
        yield features


def read_rows(path: Path | str, norms: Norms, first: int, last: int | None) -> Iterator[tuple[int, FloatArray]]:
    """:func:`read_features` with the number of each block's first row, of blocks that hold rows ``first`` to ``last``.

    Row groups and files without any of them are not read.
    """
    start, dim = 0, None
    for part in table_files(path):
        file, begins, name = open_parquet(part), start, show(part)
        start += file.metadata.num_rows
        if start <= first or (last is not None and begins >= last):
            continue
        feature = _column(file, name)
        groups, at = row_groups(file, max(0, first - begins), None if last is None else last - begins)
        with reading(name):
            for batch in file.iter_batches(TABLE_ROWS, row_groups=groups, columns=[feature]):
                if at + batch.num_rows > first - begins and batch.num_rows:
                    features = _matrix(batch.column(feature), at, dim, name)
                    dim = features.shape[1]
                    yield begins + at, check_norms(features, at, norms, name)
                at += batch.num_rows
                if last is not None and begins + at >= last:
                    break


def _column(file: pq.ParquetFile, name: str) -> str:
    """The column of the features. Raises InputError where a file has none, or what is called so is none."""
    column = feature_column(file.schema_arrow)
    if column is None:
        raise InputError(f"{name}: no column {FEATURE!r} among {few_names(file.schema_arrow.names)}")
    kind = file.schema_arrow.field(column).type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise InputError(f"{name}: column {column!r} is {kind}; expected lists of float32 or float16")
    return column


def _matrix(column: pa.Array, start: int, dim: int | None, name: str) -> FloatArray:
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise InputError(f"{name}: {row_list(rows + start)} without a feature")
    if pa.types.is_fixed_size_list(column.type):
        lengths = np.full(len(column), column.type.list_size)
    else:
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    dim = int(lengths[0]) if dim is None else dim
    if dim == 0:
        raise InputError(f"{name}: row {start} has no values")
    wrong = np.flatnonzero(lengths != dim)
    if wrong.size:
        row = int(wrong[0])
        raise InputError(f"{name}: row {row + start} has {int(lengths[row])} values, the rows before have {dim}")
    values = column.flatten()
    if values.null_count:
        rows = np.unique(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)) // dim)
        raise InputError(f"{name}: {row_list(rows + start)} with a missing value in the feature")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as that
        matrix: FloatArray = values.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)
    return matrix


def check_norms(features: FloatArray, start: int, norms: Norms, name: str) -> FloatArray:
    """Features ``[b, d]``, rows from ``start`` on of ``name``, with the norms that ``norms`` asks for.

    Raises InputError naming rows that are not finite, are zero, (``check``) whose norm is not 1, or (``keep``) is above
    :data:`MOST_KEPT`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features, dtype=np.float64))
    rows = np.flatnonzero(~np.isfinite(lengths))
    if rows.size:
        raise InputError(f"{name}: {row_list(rows + start)}: the feature holds NaN or infinity")
    rows = np.flatnonzero(lengths == 0)
    if rows.size and norms != "keep":
        raise InputError(f"{name}: {row_list(rows + start)}: the feature is zero, so it has no direction")
    if norms == "unit":
        features = (features / lengths[:, None]).astype(np.float32)
    rows = np.flatnonzero(np.abs(lengths - 1) > NORM_TOLERANCE)
    if rows.size and norms == "check":
        raise InputError(
            f"{name}: {row_list(rows + start)}: norm {lengths[rows[0]]:.4g} instead of 1; "
            "use norms=unit to scale it to 1, or norms=keep to take it as it is"
        )
    rows = np.flatnonzero(lengths > MOST_KEPT)
    if rows.size and norms == "keep":
        raise InputError(
            f"{name}: {row_list(rows + start)}: norm {lengths[rows[0]]:.4g}, too large for float32; "
            "scale rows to norm 1 (norms unit)"
        )
    return features


def schema_of(d: int, dtype: npt.DTypeLike, further: Sequence[pa.Field], identity: Identity | None = None) -> pa.Schema:
    """Schema of a feature table: ``id``, ``label``, ``feature`` ``[d]`` of this dtype, then further columns.

    The backbone's ``identity`` is in its metadata.
    """
    return pa.schema(
        [("id", pa.string()), ("label", pa.string()), (FEATURE, pa.list_(pa.from_numpy_dtype(dtype), d)), *further],
        metadata={IDENTITY_KEY: json.dumps(identity.to_dict())} if identity is not None else None,
    )


def table_of(
    schema: pa.Schema, ids: Any, labels: Any, features: npt.NDArray[Any], further: Mapping[str, Any]
) -> pa.Table:
    """Rows of a feature table of this schema, from features ``[m, d]``."""
    return pa.table({"id": ids, "label": labels, FEATURE: vectors(features), **further}, schema=schema)


def write_table(out: Path, schema: pa.Schema, blocks: Iterable[pa.Table]) -> int:
    """Write a feature table, a block at a time; returns the number of rows.

    Raises InputError where it cannot be written; then nothing is left of it.
    """
    try:
        with replacing(out) as temporary:
            return write_blocks(temporary, schema, blocks)
    except pa.ArrowException as error:  # a type that Parquet has not
        raise InputError(f"{show(out)}: cannot be written: {first_line(error)}") from None


def write_blocks(file: Path, schema: pa.Schema, blocks: Iterable[pa.Table]) -> int:
    """:func:`write_table` into this very file. Errors are OSError and Arrow's."""
    number, plain = 0, [name for name in schema.names if name != FEATURE]
    with (
        file.open("wb") as raw,
        pq.ParquetWriter(raw, schema, use_dictionary=plain, compression="none") as writer,
    ):
        for block in blocks:
            writer.write_table(block)
            number += len(block)
    return number
