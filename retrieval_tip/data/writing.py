"""Write feature tables: the schema, the rows, and the Parquet file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.backbones.base import Part
from retrieval_tip.data.tables import IDENTITY_KEY
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import replacing
from retrieval_tip.wording import first_line, show

GROUP_ROWS = 1024  # smallest number of rows in a Parquet row group


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
