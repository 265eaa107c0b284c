"""Read and write feature tables, which are Parquet files of features that name their backbone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_tip.backbones.base import Backbone, FloatArray, Identity, same_backbone
from retrieval_tip.data.source import Source, row_list
from retrieval_tip.data.tables import (
    FEATURE,
    MAX_ROWS,
    feature_column,
    few_names,
    is_vector,
    open_parquet,
    reading,
    row_groups,
    table_files,
    vectors,
)
from retrieval_tip.errors import BackboneError, InputError, first_line, show
from retrieval_tip.files import replacing
from retrieval_tip.settings import Norms

IDENTITY_KEY = b"retrieval_tip.backbone"
NORM_TOLERANCE = 0.01
MOST_KEPT = 1e9
"""Largest norm that ``norms="keep"`` accepts. The squared product of two features then fits float32."""
TABLE_ROWS = 8192


def check_backbone(identity: Identity | None, d: int, backbone: Backbone | None, sources: Sequence[Source]) -> None:
    """Check that ``backbone`` and ``sources`` fit an index whose features have ``d`` values and come from ``identity``.

    Raises BackboneError if the backbones differ, or if the decoder of the index is no longer supported. Raises
    InputError if the features have different lengths.
    """
    if backbone is not None and identity is not None:
        if "decoder" in identity.preprocess:
            raise BackboneError(
                f"index: its photos were decoded by {identity.preprocess['decoder']!r}, which retrieval-tip no "
                "longer supports; build the index again, or classify a feature table"
            )
        same_backbone(identity, backbone.identity, "index")
    if backbone is not None and backbone.dim != d:
        raise BackboneError(f"encoder {backbone.identity}: its features have {backbone.dim} values; the index has {d}")
    for source in sources:
        if source.table is not None:
            own = table_identity(source.table)
            if identity is not None and own is not None:
                same_backbone(own, identity, source.name)
            if (dim := table_dim(source.table)) != d:
                raise InputError(f"{source.name}: its features have {dim} values; the index has {d}")


def table_identity(path: Path | str) -> Identity | None:
    """Return the backbone that is named in the metadata of a feature table, if any."""
    files = table_files(path)
    raw = (open_parquet(files[0]).schema_arrow.metadata or {}).get(IDENTITY_KEY) if files else None
    if raw is None:
        return None
    try:
        return Identity.from_dict(json.loads(raw))
    except (ValueError, RecursionError, BackboneError) as error:
        raise InputError(f"{show(path)}: its metadata cannot be read ({error})") from None


def table_dim(path: Path | str) -> int:
    """Return the length ``d`` of the features in a table."""
    for _, batch in read_rows(path, None, last=1):
        return int(batch.shape[1])
    raise InputError(f"{show(path)}: has no rows")


def read_features(path: Path | str, norms: Norms = "check") -> Iterator[FloatArray]:
    """Yield the features of a table in blocks, as float32 arrays of shape ``[b, d]``.

    Raises InputError if a row cannot be used.
    """
    for _, features in read_rows(path, norms):
        yield features


def read_rows(
    path: Path | str, norms: Norms | None, first: int = 0, last: int = MAX_ROWS
) -> Iterator[tuple[int, FloatArray]]:
    """Yield the features of each block that overlaps rows ``first`` to ``last``, and the number of its first row.

    If ``norms`` is ``None``, the rows are not checked.
    """
    start, dim = 0, None
    for part in table_files(path):
        file, begins, name = open_parquet(part), start, show(part)
        start += file.metadata.num_rows
        groups, at = row_groups(file, first - begins, last - begins)
        if not groups:
            continue
        feature = _column(file, name)
        with reading(name):
            for batch in file.iter_batches(TABLE_ROWS, row_groups=groups, columns=[feature]):
                if begins + at >= last:
                    break
                if batch.num_rows and begins + at + batch.num_rows > first:
                    features = _matrix(batch.column(feature), at, dim, name)
                    dim = features.shape[1]
                    yield begins + at, features if norms is None else check_norms(features, at, norms, name)
                at += batch.num_rows


def _column(file: pq.ParquetFile, name: str) -> str:
    column = feature_column(file.schema_arrow)
    if column is None:
        raise InputError(f"{name}: no column {FEATURE!r}; its columns are {few_names(file.schema_arrow.names)}")
    if len(file.schema_arrow.get_all_field_indices(column)) > 1:
        raise InputError(f"{name}: duplicate column {column!r}")
    kind = file.schema_arrow.field(column).type
    if not is_vector(kind):
        raise InputError(f"{name}: column {column!r} has type {kind}; expected lists of float32 or float16")
    return column


def _matrix(column: pa.Array, start: int, dim: int | None, name: str) -> FloatArray:
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise InputError(f"{name}: {row_list(rows + start)} without a feature")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    dim = int(lengths[0]) if dim is None else dim
    if dim == 0:
        raise InputError(f"{name}: row {start} has no values")
    if (wrong := np.flatnonzero(lengths != dim)).size:
        row = int(wrong[0])
        raise InputError(f"{name}: row {row + start} has {int(lengths[row])} values; earlier rows have {dim}")
    values = column.flatten()
    if values.null_count:
        rows = np.unique(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)) // dim)
        raise InputError(f"{name}: {row_list(rows + start)} with a missing value in the feature")
    with np.errstate(over="ignore"):  # values that are too large become infinite and are then rejected
        matrix: FloatArray = values.to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32)
    return matrix


def check_norms(features: FloatArray, start: int, norms: Norms, name: str) -> FloatArray:
    """Check or scale the norms of a block of features.

    Raises InputError if a row cannot be used. The number of the first row is ``start``.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", features, features, dtype=np.float64))

    def refuse(wrong: npt.NDArray[np.bool_], why: str) -> None:
        if (rows := np.flatnonzero(wrong)).size:
            raise InputError(f"{name}: {row_list(rows + start)}: {why.format(norm=lengths[rows[0]])}")

    refuse(~np.isfinite(lengths), "the feature contains NaN or infinity")
    if norms == "keep":
        refuse(lengths > MOST_KEPT, "norm {norm:.4g}, too large for float32; scale rows to norm 1 (norms unit)")
        return features
    refuse(lengths == 0, "the feature is zero, so it has no direction")
    if norms == "unit":
        scaled: FloatArray = (features / lengths[:, None]).astype(np.float32)
        return scaled
    advice = "use norms=unit to scale it to 1, or norms=keep to leave it"
    refuse(np.abs(lengths - 1) > NORM_TOLERANCE, "norm {norm:.4g} instead of 1; " + advice)
    return features


def schema_of(d: int, dtype: npt.DTypeLike, further: Sequence[pa.Field], identity: Identity | None = None) -> pa.Schema:
    """Return the schema of a feature table, with the columns ``id``, ``label``, ``feature`` and ``further``."""
    return pa.schema(
        [("id", pa.string()), ("label", pa.string()), (FEATURE, pa.list_(pa.from_numpy_dtype(dtype), d)), *further],
        metadata={IDENTITY_KEY: json.dumps(identity.to_dict())} if identity is not None else None,
    )


def table_of(
    schema: pa.Schema, ids: object, labels: object, features: npt.NDArray[np.generic], further: Mapping[str, object]
) -> pa.Table:
    """Build the rows of a feature table with this schema. ``features`` has shape ``[m, d]``."""
    return pa.table({"id": ids, "label": labels, FEATURE: vectors(features), **further}, schema=schema)


def write_table(out: Path, schema: pa.Schema, blocks: Iterable[pa.Table]) -> int:
    """Write a feature table block by block, and return the number of rows.

    Raises InputError if the table cannot be written, in which case no file is created.
    """
    number, plain = 0, [name for name in schema.names if name != FEATURE]
    try:
        with (
            replacing(out) as temporary,
            temporary.open("wb") as raw,
            pq.ParquetWriter(raw, schema, use_dictionary=plain, compression="none") as writer,
        ):
            for block in blocks:
                writer.write_table(block)
                number += len(block)
    except pa.ArrowException as error:  # a type that Parquet does not support
        raise InputError(f"{show(out)}: cannot be written: {first_line(error)}") from None
    return number
