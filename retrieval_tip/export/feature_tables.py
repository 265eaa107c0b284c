"""Write the keys or the text weights of an index to a feature table."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.arrays import slices
from retrieval_tip.backbones.base import Part
from retrieval_tip.data.feature_table import TABLE_ROWS
from retrieval_tip.data.tables import FEATURE
from retrieval_tip.data.writing import schema_of, table_of, write_table
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import real
from retrieval_tip.model import Index
from retrieval_tip.wording import show

log = logging.getLogger(__name__)


def export_table(index: Index, out: Path) -> int:
    """Write the keys of an index to a feature table, in index order, and return the number of rows.

    The table has the columns ``id``, ``label``, ``feature`` (one for each encoder), ``key_id``, ``shot``, ``views``,
    ``digest`` and ``added_at``, and the extra columns of the label store. ``id`` is the source of the key, and
    ``feature`` has the dtype of the keys. A table cannot store trained values, so a warning is logged if the index has
    them.

    Raises InputError if ``out`` cannot be written. In this case, no file is left behind.
    """
    _refuse_inside(index, out)
    if index.values is not None and index.fitted is None:  # solved values can be refitted
        log.warning(
            "%s: a table cannot hold trained values, so an index built from it will give other answers",
            show(out),
        )
    table = index.labels
    keys = index.rows.in_memory().keys
    parts = index.parts or (Part(index.d, FEATURE, index.backbone),)
    own = {"class_id", "label", "source", "id", FEATURE, *(part.column for part in parts)}
    further = [
        table.schema.field(name).remove_metadata() for name in table.column_names if name not in own
    ]
    schema = schema_of(parts, index.dtype, further)

    def blocks() -> Iterator[pa.Table]:
        for block in slices(index.n, TABLE_ROWS):
            rows = table[block]
            blank = pc.equal(pc.utf8_trim_whitespace(rows["source"]), "").fill_null(True)
            number = pc.binary_join_element_wise("key", rows["key_id"].cast(pa.string()), " ")
            yield table_of(
                schema,
                pc.if_else(blank, number, rows["source"]),
                rows["label"],
                keys[block],
                {field.name: rows[field.name] for field in further},
            )

    return write_table(out, schema, blocks())


def export_text(index: Index, out: Path) -> int:
    """Write the text weights of an index to a feature table with one row per class, and return the number of classes.

    You can pass the table to ``--text`` when you build another index. Raises UsageError if the index has no text
    weights. Raises InputError if a class has no text weight or if ``out`` cannot be written.
    """
    _refuse_inside(index, out)
    if not index.has_text:
        raise UsageError("text: this index has no text weights; export its keys instead")
    weights = index.text_weights.cpu().numpy()
    bare = np.flatnonzero(~weights.any(axis=1))
    if bare.size:
        raise InputError(
            f"text: class {index.class_names[bare[0]]!r} has no text weight; build the index with one"
        )
    names = pa.array(index.class_names, pa.string())
    schema = schema_of([Part(index.d, FEATURE, index.backbone)], weights.dtype)
    parts = ((names[rows], weights[rows]) for rows in slices(len(names), TABLE_ROWS))
    return write_table(out, schema, (table_of(schema, name, name, part) for name, part in parts))


def _refuse_inside(index: Index, out: Path) -> None:
    if index.folder is not None and real(out).is_relative_to(real(index.folder)):
        raise UsageError(f"{show(out)}: is inside the index; give a path outside it")
