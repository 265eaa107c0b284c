"""Compute a digest of the rows of a table that does not depend on their order.

    digest = sum of SHA-256(row) over all rows, modulo 2^256

When a row is added or removed, its SHA-256 is added or subtracted, so only the changed rows have to be read. The digest
detects damage. It does not protect against an attacker who can also write the manifest.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.errors import InputError, first_line
from retrieval_tip.lance.key_table import POINT, SCANNED, VECTOR

_EMPTY = pa.scalar(b"", pa.large_binary())


def with_rows(digest: int, rows: pa.Table | pa.RecordBatch, sign: int = 1) -> int:
    """Return the digest of a table after adding rows, or after removing them if ``sign`` is -1.

    The hash of a row covers the names and values of its columns, sorted by name, followed by the bytes of its key.
    Nulls are skipped, so that a new column does not change the digest of older rows. Points are skipped too. Raises
    InputError if a value cannot be read.
    """
    names = sorted({*rows.schema.names} - {VECTOR, POINT})
    rows = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
    for batch in rows.to_batches(SCANNED):
        texts = pc.binary_join_element_wise(
            *(_fields(name, batch[name]) for name in names), _EMPTY, null_handling="skip"
        )
        keys = batch[VECTOR].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        keys = keys.astype(keys.dtype.newbyteorder("<"), copy=False)
        for text, key in zip(texts.to_pylist(), keys, strict=True):
            digest += sign * int.from_bytes(hashlib.sha256(text + key.tobytes()).digest(), "big")
    return digest % (1 << 256)


def hexadecimal(digest: int) -> str:
    """Format a digest as 64 hexadecimal digits."""
    return f"{digest:064x}"


def _fields(name: str, column: pa.Array) -> pa.Array:
    """Convert each value of a column to the bytes ``name length value``. Null values stay null."""
    kind = column.type
    if pa.types.is_primitive(kind) and 8 <= kind.bit_width <= 64:  # hash every bit of floats and times
        column, kind = column.view(f"int{kind.bit_width}"), pa.int64()
    plain = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_kind(kind) for is_kind in plain):
        try:
            values = [None if value is None else ascii(value) for value in column.to_pylist()]
        except ValueError as error:
            raise InputError(f"column {name!r}: a value cannot be read ({first_line(error)})") from None
        column = pa.array(values, pa.large_string())
    value = column.cast(pa.large_string())
    length = pc.binary_length(value).cast(pa.large_string())
    named = pc.binary_join_element_wise(
        pa.scalar(name, pa.large_string()), length, value, pa.scalar(" ", pa.large_string())
    )
    return named.cast(pa.large_binary())  # damaged text may be invalid UTF-8
