"""Build and read the tables of a version, most of all its label store (see also :mod:`store.query`)."""

from __future__ import annotations

import datetime
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_tip.arrays import IntArray
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import real
from retrieval_tip.store.manifest import DataFile, Manifest
from retrieval_tip.wording import counted, few, first_line

LABEL_SCHEMA = pa.schema(
    [
        ("key_id", pa.int64()),
        ("class_id", pa.int32()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("shot", pa.int32()),
        ("views", pa.int32()),
        ("digest", pa.string()),
        ("added_at", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of the label store. Row i describes key i. Extra columns of a source follow these columns."""

VERSIONS_SCHEMA = pa.schema(
    [
        ("version", pa.int64()),
        ("parent", pa.int64()),
        ("created_at", pa.timestamp("us", "UTC")),
        ("created_by", pa.string()),
        ("change", pa.string()),
        ("keys", pa.int64()),
        ("classes", pa.int64()),
        ("bytes", pa.int64()),
        ("current", pa.bool_()),
    ]
)
"""Columns of the history, which has one row per version. ``bytes`` is the total file size of the version."""


PICKED, RANDOM = "picked", "random"
"""Optional column that tells how a photo was chosen for labelling, and its value for photos chosen at random."""

LabelChanges = Mapping[int, tuple[str | None, str | None]]
"""The labels of changed keys before and after a change, by key id. A key that is not there has the label ``None``."""

BESIDE = "./../"
"""Start of a stored source that is relative to the folder of the index, as in ``./../photos/crab/1.jpg``."""
NOTED = b"folder"
"""Key of the metadata of stored labels that has the folder of the index when they were written."""


def noun_of(backbone: object) -> str:
    """Return what a key is called in the history. If the encoder is unknown, keys need not be photos."""
    return "example" if backbone is None else "photo"


def edits_between(before: pa.Table, after: pa.Table) -> LabelChanges:
    """Compare two label stores."""
    columns = (
        [table[name].to_pylist() for name in ("key_id", "label")] for table in (before, after)
    )
    old, new = (dict(zip(*column, strict=True)) for column in columns)
    return {
        key_id: (old.get(key_id), new.get(key_id))
        for key_id in old | new
        if old.get(key_id) != new.get(key_id)
    }


def in_words(pairs: Iterable[tuple[str | None, str | None]], backbone: object) -> str:
    """Describe the labels of keys before and after a change, for example as ``5 photos: 3 crab, 2 ibis``."""
    added = Counter[str]()
    moved = Counter[str]()
    removed = Counter[str]()
    for (before, after), n in Counter(pairs).items():
        if before is None and after is not None:
            added[after] = n
        elif before is not None and after is None:
            removed[before] = n
        elif before != after:
            moved[f"{before} became {after}"] = n
    said = []
    for prefix, counts in (("", added), ("", moved), ("removed ", removed)):
        names = [f"{n:,} {name}" for name, n in counts.most_common()]
        if counts is moved and len(moved) == 1:
            names = list(moved)  # the number stands before the colon
        if counts:
            said.append(f"{prefix}{counted(counts.total(), noun_of(backbone))}: {few(names)}")
    return "; ".join(said)


def label_table(
    class_names: Sequence[str],
    class_ids: IntArray,
    sources: Sequence[str] | pa.ChunkedArray | None = None,
    *,
    key_ids: IntArray | None = None,
    views: int | npt.NDArray[np.integer] = 1,
    digests: Sequence[str | None] | None = None,
    extra: pa.Table | None = None,
) -> pa.Table:
    """Build the label store for keys with the given class ids. ``shot`` numbers the keys of each class from 0."""
    n = len(class_ids)
    extra = extra if extra is not None and extra.num_columns else None
    for what, values in (("sources", sources), ("digests", digests), ("extra", extra)):
        if values is not None and len(values) != n:
            raise InputError(f"{what}: expected {n} values, one per key, but got {len(values)}")
    if extra is not None and (
        reserved := sorted(set(extra.column_names) & set(LABEL_SCHEMA.names))
    ):
        raise InputError(f"extra: column {reserved[0]!r} is reserved by the label store; rename it")
    ids = np.arange(n) if key_ids is None else key_ids
    if sources is None:
        sources = [f"key {i}" for i in ids]
    if not isinstance(sources, pa.ChunkedArray):
        sources = pa.array(list(sources), pa.string())
    if digests is None:
        digests = [None] * n
    views = np.broadcast_to(np.asarray(views, dtype=np.int32), n)
    now = datetime.datetime.now(datetime.UTC)
    columns = {
        "key_id": pa.array(ids, pa.int64()),
        "class_id": pa.array(class_ids, pa.int32()),
        "label": pa.array(class_names, pa.string()).take(pa.array(class_ids)),
        "source": sources,
        "shot": pa.array(shots_of(class_ids)),
        "views": pa.array(views),
        "digest": pa.array(digests, pa.string()),
        "added_at": pa.array([now] * n, pa.timestamp("us", "UTC")),
    }
    table = pa.table(columns, schema=LABEL_SCHEMA)
    if extra is not None:
        for name in extra.column_names:
            table = table.append_column(name, extra[name])
    return table


def shots_of(class_ids: IntArray) -> npt.NDArray[np.int32]:
    """Number the keys of each class from 0, in order. Return an int32 array with one number per class id."""
    order = np.argsort(class_ids, kind="stable")
    counts = np.bincount(class_ids)
    shots = np.empty(len(class_ids), dtype=np.int32)
    shots[order] = np.arange(len(class_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return shots


def with_column(labels: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace a column, and keep the order of the columns."""
    return labels.set_column(labels.column_names.index(name), name, column)


def labels_in(labels: pa.Table, class_names: Sequence[str], class_ids: IntArray) -> pa.Table:
    """Replace the classes of labels, and number the shots of each class from 0."""
    names = pa.array([class_names[class_id] for class_id in class_ids], pa.string())
    for name, column in (("class_id", pa.array(class_ids, pa.int32())), ("label", names)):
        labels = with_column(labels, name, column)
    return with_column(labels, "shot", pa.array(shots_of(class_ids)))


def shots_after(added: pa.Table, ids: IntArray, following: npt.NDArray[np.int32]) -> pa.Table:
    """Renumber the shots of new labels, so that they follow the existing shots."""
    shots = pa.array(added["shot"].to_numpy() + following[ids], pa.int32())
    return with_column(added, "shot", shots)


def rows_with(
    table: pa.Table,
    labels: Sequence[str] = (),
    source: str | None = None,
    key_ids: Sequence[int] = (),
) -> pa.Table:
    """Select rows by label, by key id, and by text that occurs in the source, ignoring case.

    An empty argument selects all rows.
    """
    chosen = pa.array(np.ones(len(table), dtype=bool))
    if labels:
        chosen = pc.and_(chosen, pc.is_in(table["label"], value_set=pa.array(labels, pa.string())))
    if key_ids:
        chosen = pc.and_(chosen, pc.is_in(table["key_id"], value_set=pa.array(key_ids, pa.int64())))
    if source:
        chosen = pc.and_(chosen, pc.match_substring(table["source"], source, ignore_case=True))
    return table.filter(pc.fill_null(chosen, False))


def images_of(labels: pa.Table) -> IntArray:
    """Return an integer code for each key, which is the same for all keys of an image.

    Two keys belong to the same image if they have the same digest or, if they have no digest, the same source.
    """
    images = digest_codes(labels)
    sources = _codes(labels["source"])
    return np.where(images < 0, images.max(initial=-1) + 1 + sources, images)


def _codes(column: pa.ChunkedArray) -> IntArray:
    """Return an integer code for each string, and -1 for null."""
    encoded = column.dictionary_encode().unify_dictionaries()
    parts = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)


def digest_codes(labels: pa.Table, among: IntArray | None = None) -> IntArray:
    """Return an integer code for the digest of each row, and -1 for rows that have none.

    If ``among`` is given, only the digests of these rows are encoded. This is faster if there are few such rows.
    """
    column = labels["digest"]
    if among is not None:
        wanted = pc.unique(column.take(pa.array(among)).combine_chunks()).drop_null()
        wanted = wanted.filter(pc.not_equal(wanted, ""))
        if not len(wanted):
            return np.full(len(labels), -1)
        codes = pc.index_in(column, value_set=wanted).fill_null(-1)
        return np.asarray(codes.to_numpy(), dtype=np.int64)
    return _codes(pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column))


def portable(labels: pa.Table, folder: PurePath) -> pa.Table:
    """Return the labels as the index in ``folder`` stores them, so that the index can travel with its photos.

    The absolute path of a photo becomes relative to the folder, unless they only share the root of a file system. The
    table notes the folder, so that the photos are also found if the index travels without them.
    """
    flags = "(?i)" if isinstance(folder, PureWindowsPath) else ""
    sources = _with_start(labels["source"], re.escape(BESIDE), "../")
    for start, inside in _above(folder):
        if inside != "/":
            sources = _with_start(sources, flags + re.escape(inside), start)
    noted = with_column(labels, "source", sources)
    return noted.replace_schema_metadata({NOTED: os.fsencode(folder)})


def located(labels: pa.Table, folder: PurePath) -> pa.Table:
    """Return stored labels with the paths that photos have if the index is in ``folder``.

    If the first photo only exists beside the folder that the table notes, the index has left its photos there.
    """
    sources = labels["source"]
    noted = (labels.schema.metadata or {}).get(NOTED)
    labels = labels.replace_schema_metadata()
    if noted is not None:
        before = PurePath(os.fsdecode(noted))
        beside = sources.filter(pc.starts_with(sources, BESIDE))[:1].to_pylist()
        if any(_exists(before, name) and not _exists(folder, name) for name in beside):
            folder = before
    if pc.any(pc.starts_with(sources, BESIDE)).as_py():
        for start, inside in reversed(_above(folder)):
            sources = _with_start(sources, re.escape(start), inside.replace("\\", r"\\"))
    return with_column(labels, "source", sources)


def _exists(folder: PurePath, name: str) -> bool:
    return os.path.exists(os.path.normpath(f"{folder}/{name}"))  # noqa: PTH110 - of a pure path


def _with_start(sources: pa.ChunkedArray, pattern: str, new: str) -> pa.ChunkedArray:
    return pc.replace_substring_regex(sources, f"^{pattern}", new)


def _above(folder: PurePath) -> list[tuple[str, str]]:
    """Return how paths in each folder above begin, relative to ``folder`` and absolute, nearest folder first."""
    return [
        (BESIDE + level * "../", parent.as_posix().rstrip("/") + "/")
        for level, parent in enumerate(folder.parents)
    ]


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """Read the label store, with the paths of this machine. Raises StoreError if it does not match the manifest."""
    file = manifest.files["labels"]
    path = folder / file.name
    table = _read_table(path)
    columns = list(zip(table.schema.names, table.schema.types, strict=True))
    expected = list(zip(LABEL_SCHEMA.names, LABEL_SCHEMA.types, strict=True))
    if (
        columns[: len(expected)] != expected
        or len(table) != file.rows
        or any(table[name].null_count for name in ("key_id", "class_id", "label"))
    ):
        raise StoreError(f"{path}: does not match the manifest's {file.rows} keys")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    if pc.max(table["key_id"]).as_py() >= manifest.next_key_id:
        raise StoreError(
            f"{folder}: the next_key_id of its manifest is in use; restore it, or build the index again"
        )
    return located(table, real(folder))


def read_curve(folder: Path, file: DataFile) -> pa.Table:
    """Read the loss curve of a fine-tuned index, which has one row per epoch."""
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
