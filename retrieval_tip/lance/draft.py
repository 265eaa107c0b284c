"""Edit an index in LanceDB. You can add, remove and relabel the rows of a draft, and commit it as the next version."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from retrieval_tip import tip
from retrieval_tip.answering import EditableIndex, manifest_of
from retrieval_tip.cache_model import SUMS_FROM, CacheModel
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.index.folders import PAIRS
from retrieval_tip.index.items import Material
from retrieval_tip.lance.key_table import (
    CLASSES,
    FLAT,
    KINDS,
    POINT,
    UNINDEXED,
    VECTOR,
    VERSION,
    IntArray,
    KeyTable,
    changed_meanwhile,
    grouped,
    literal,
    rows_of,
    schema_of,
)
from retrieval_tip.lance.lance_model import LanceModel, check
from retrieval_tip.lance.versions import Classes, TableWriter
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.retrieval.duplicates import Duplicates, duplicates
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.keys import points_of
from retrieval_tip.retrieval.vector_index import auto_factory, inner_factory
from retrieval_tip.settings import Dtype, Fitted
from retrieval_tip.store.contents import array_of
from retrieval_tip.store.labels import LABEL_SCHEMA, label_table, shots_after, shots_of
from retrieval_tip.store.manifest import Table
from retrieval_tip.store.sums import Sums

ASSIGNED = ("key_id", "class_id", "label", "shot")
"""The columns of a key that an edit can change, after its id."""
MOST_ASKED, NEIGHBOURS = 512, 4
"""Maximum number of new keys to compare with their neighbours, and the number of neighbours per key."""
INDEX_FROM = 50_000
"""Minimum number of keys for which an index is faster than a comparison with every key."""
MOST_HELD = 1 << 30
"""Maximum size in bytes of the keys and solved values that are held in memory."""


@dataclass(repr=False, kw_only=True)
class LanceDraft(LanceModel, EditableIndex):
    """A :class:`LanceModel` that you can edit. :meth:`commit` makes it the current version.

    Use :meth:`changing` or :meth:`create` to get a draft. If the values were solved, ``solved`` is the index in memory
    that they belong to.
    """

    writer: TableWriter
    solved: CacheModel | None = None

    @classmethod
    def changing(cls, writer: TableWriter) -> LanceDraft:
        """Open the current version for editing. Raises StoreError if it is missing or damaged."""
        if writer.parent is None or writer.table is None:
            writer.store.manifest()  # raises an error that tells the user what to do
            raise changed_meanwhile(writer.store.address)
        return cls.of(writer.store, writer.parent, writer.table, "cpu", writer=writer)

    @classmethod
    def create(
        cls,
        writer: TableWriter,
        blocks: Iterable[tuple[pa.Table, KeyArray]],
        class_names: Sequence[str],
        text_weights: npt.NDArray[np.float32] | None,
        dtype: Dtype = "float32",
        index: str = "auto",
        *,
        stored: bool = False,
        metric: tip.Metric | None = None,
        known: Sums | None = None,
    ) -> LanceDraft:
        """Stream blocks of labels and keys into a table, and build its index.

        Each block is a label table (see :func:`labels.label_table`) and an array of keys of shape ``[b, d]``. Set
        ``stored`` if the labels come from another table and already contain the version that added each row. If you
        give a ``metric``, the table also contains the points of the keys. If you give the sums of the keys as
        ``known``, they are not recomputed.

        Raises UsageError if the store does not support the index type. Raises InputError if the table cannot store a
        column or if the text weights have the wrong length.
        """
        index_kind(index)
        ahead = iter(blocks)
        labels, keys = next(ahead)
        d, c, following = keys.shape[1], len(class_names), 0
        text = np.zeros((c, d), dtype=np.float32) if text_weights is None else text_weights
        inputs.check_shape("text_weights", text.shape, (c, d), "one per class, from the backbone of the keys")
        sums, point_sums = Sums.of([], c, d), None if metric is None else np.zeros((c, d))
        further = labels.drop_columns([VERSION]) if stored else labels
        extra = [further.schema.field(name) for name in further.column_names[len(LABEL_SCHEMA) :]]
        check_columns(extra)
        schema = schema_of(d, dtype, extra, points=metric is not None)

        def rows() -> Iterator[pa.RecordBatch]:
            nonlocal following
            for part, own in itertools.chain([(labels, keys)], ahead):
                ids = part["class_id"].to_numpy().astype(np.int64)
                with np.errstate(over="ignore"):  # an overflow is rejected below
                    own = own.astype(dtype)
                if not np.isfinite(own).all():
                    raise InputError(f"keys: some values are too large for {dtype}; use float32")
                points = points_of(metric, own, "cpu")
                if known is None:
                    sums.count(own, ids)
                if points is not None and point_sums is not None:
                    np.add.at(point_sums, ids, points.astype(np.float64))
                following = max(following, int(pc.max(part["key_id"]).as_py()) + 1)
                made = rows_of(part, own, writer.number, points).select(schema.names).cast(schema)
                yield from made.to_batches()

        table, sums = writer.create(grouped(rows()), schema), known or sums
        model = cls(
            store=writer.store, table=table,
            classes=Classes(list(class_names), text, sums.counts, sums.sums, point_sums), second=sums.second,
            metric=metric, dtype=dtype, next_key_id=following, writer=writer,
        )  # fmt: skip
        model._index(index)
        return model

    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        names, weights = inputs.new_classes(names, self.class_names, text_weights, self.d, self.has_text)
        old, more = self.classes, ((0, len(names)), (0, 0))
        self.classes = Classes(
            [*old.names, *names],
            np.concatenate([old.text, weights.numpy()]),
            np.pad(old.counts, more[0]),
            np.pad(old.sums, more),
            None if old.points is None else np.pad(old.points, more),
        )
        self._follow()

    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        self.classes, self.templates = replace(self.classes, text=weights), list(templates)
        self._follow()

    def add(
        self,
        keys: Features,
        labels: Labels,
        sources: Sequence[str] | pa.ChunkedArray | None = None,
        *,
        views: int | npt.NDArray[np.integer[Any]] = 1,
        digests: Sequence[str | None] | None = None,
        extra: pa.Table | None = None,
    ) -> list[int]:
        """See :meth:`answering.EditableIndex.add`."""
        array, ids = inputs.keys_to_add(keys, labels, self.class_names, self.d, self.dtype)
        key_ids = np.arange(self.next_key_id, self.next_key_id + len(array))
        added = label_table(self.class_names, ids, sources, key_ids=key_ids, views=views, digests=digests, extra=extra)
        check_columns(list(added.schema)[len(LABEL_SCHEMA) :])
        there = self.table.schema
        known = dict(zip(there.names, there.types, strict=True))
        for name, kind in zip(added.schema.names, added.schema.types, strict=True):
            if known.get(name, kind) != kind:
                raise InputError(f"labels: column {name!r} is {kind}, but {known[name]} in the index; convert it")
        added = shots_after(added, ids, self._next_shots(np.unique(ids)))
        order, array = np.argsort(ids, kind="stable"), array.astype(self.dtype)
        points = points_of(self.metric, array, self.device)
        self.check_lengths(array if points is None else points)
        ordered = points[order] if points is not None and self.table.has_points else None
        self._move(rows_of(added.take(pa.array(order)), array[order], self.writer.number, ordered), 1)
        self.next_key_id += len(array)
        return key_ids.tolist()

    def check_held(self, n: int) -> None:
        """Raise InputError if ``n`` keys with solved values do not fit in memory."""
        if n * (self.d + len(self.class_names)) * 4 > MOST_HELD:
            raise InputError(
                f"{self.store}: {n:,} keys with solved values of {len(self.class_names):,} classes are too many for a "
                f"LanceDB store; fit one-hot values first (retrieval-tip fit {self.store} --values one-hot)"
            )

    def _next_shots(self, class_ids: IntArray) -> npt.NDArray[np.int32]:
        """Return the next shot number of each class, or 0 for classes that are not in ``class_ids``."""
        following = np.zeros(len(self.class_names), dtype=np.int32)
        shots = self.table.of_ids("class_id", class_ids.tolist(), ["class_id", "shot"])
        np.maximum.at(following, shots["class_id"].to_numpy(), shots["shot"].to_numpy() + 1)
        return following

    def follow(self, cache: CacheModel) -> None:
        """Take over an edited index in memory, whose keys are those of this draft, apart from added and removed ones.

        Raises InputError if it has solved values and does not fit in memory, or if the table cannot store a column.
        """
        if cache.values is not None:
            self.check_held(cache.n)
        check_columns(list(cache.labels.schema)[len(LABEL_SCHEMA) :])
        old, new = self.table.read(ASSIGNED).sort_by("key_id"), cache.labels.select(ASSIGNED)
        places = np.clip(np.searchsorted(old["key_id"].to_numpy(), new["key_id"].to_numpy()), 0, len(old) - 1)
        before = old.take(pa.array(places))
        changed = ~np.logical_and.reduce([np.equal(before[name].to_numpy(), new[name].to_numpy()) for name in ASSIGNED])
        gone = ~np.isin(old["key_id"].to_numpy(), new["key_id"].to_numpy()[~changed])
        self.table.delete(old["key_id"].to_numpy()[gone].tolist())
        if changed.any():
            rows = pa.array(np.flatnonzero(changed))
            self.table.append(rows_of(cache.labels.take(rows), np.asarray(cache.keys[changed]), self.writer.number))
        blocks = ((keys, labels["class_id"].to_numpy().astype(np.int64)) for labels, keys in cache.stored_blocks())
        sums = Sums.of(blocks, len(cache.class_names), cache.d) if cache.sums is None else cache.sums
        text = cache.text_weights.cpu().numpy()
        self.classes, self.second = Classes(list(cache.class_names), text, sums.counts, sums.sums), sums.second
        for name in ("settings", "templates", "provenance", "built", "prior", "next_key_id"):
            setattr(self, name, getattr(cache, name))
        self._follow()
        self.set_fitted(cache.metric, cache.fitted, solved=cache)

    def _move(self, rows: pa.Table, sign: int) -> None:
        """Add rows, or delete them if ``sign`` is -1, and update the sums."""
        if sign > 0:
            self.table.append(rows)
        else:
            self.table.delete(rows["key_id"].to_pylist())
        ids, keys = rows["class_id"].to_numpy().astype(np.int64), self.table.matrix(rows[VECTOR])
        known = self.sums or Sums(self.classes.counts, self.classes.sums, np.zeros((self.d, self.d)))
        now, points = known.added(keys, ids) if sign > 0 else known.removed(keys, ids), self.classes.points
        if points is not None and POINT in rows.column_names:
            points = points.copy()
            np.add.at(points, ids, sign * self.table.matrix(rows[POINT]).astype(np.float64))
            points[now.counts == 0] = 0
        self.second = None if self.second is None else now.second
        self.classes = replace(self.classes, counts=now.counts, sums=now.sums, points=points)
        self._follow()

    def remove(self, key_ids: Sequence[int]) -> None:
        rows = self._of_ids(key_ids)
        if len(rows) == self.n:
            raise InputError("remove: an index needs at least one key; delete the store instead")
        if len(rows):
            self._move(rows, -1)

    def _of_ids(self, key_ids: Sequence[int]) -> pa.Table:
        rows = self.table.of_ids("key_id", list(dict.fromkeys(key_ids)), self.table.schema.names)
        missing = sorted(set(key_ids) - set(rows["key_id"].to_pylist()))
        if missing:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        return rows

    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        wanted = inputs.new_ids(key_ids, labels, self.class_names)
        moved = self._of_ids(list(wanted)).sort_by("key_id")
        ids = np.array([wanted[key_id] for key_id in moved["key_id"].to_pylist()], dtype=np.int64)
        changed = moved["class_id"].to_numpy() != ids
        moved, ids = moved.filter(pa.array(changed)), ids[changed]
        if not len(moved):
            return
        names = [self.class_names[class_id] for class_id in ids]
        shots = self._next_shots(np.unique(ids))[ids] + shots_of(ids)
        self._move(moved, -1)
        changed = {"class_id": ids.astype(np.int32), "label": names, "shot": shots}
        for name, column in {**changed, VERSION: np.full(len(moved), self.writer.number)}.items():
            moved = moved.set_column(moved.column_names.index(name), name, pa.array(column))
        self._move(moved, 1)

    def _update(self, where: str, name: str, sql: str) -> None:
        """Set a column of the rows that match ``where`` to an SQL expression."""
        self.table.change(where, {name: sql, VERSION: str(self.writer.number)})

    def rename(self, old: str, new: str) -> None:
        class_id, names = inputs.renamed(self.class_names, old, new)
        if len(names) < len(self.class_names):
            self._merge(class_id, new, names)
            return
        if self.classes.counts[class_id]:
            self._update(f"class_id = {class_id}", "label", literal(new))
        self.classes = replace(self.classes, names=names)
        self._follow()

    def _merge(self, class_id: int, into: str, names: list[str]) -> None:
        """Move the keys of a class to the class ``into``, and delete the class. ``names`` are the others."""
        old = self.class_names[class_id]
        self.relabel(self.find([old])["key_id"].to_pylist(), into)
        if self.classes.counts[class_id + 1 :].any():
            self._update(f"class_id > {class_id}", "class_id", "class_id - 1")
        classes = self.classes
        self.classes = Classes(
            names,
            np.delete(classes.text, class_id, axis=0),
            np.delete(classes.counts, class_id),
            np.delete(classes.sums, class_id, axis=0),
            None if classes.points is None else np.delete(classes.points, class_id, axis=0),
        )
        self._follow()

    def rewrite(self, factory: str | None = None, dtype: Dtype | None = None, known: Sums | None = None) -> None:
        """Rewrite every row and the index, so that the files of this version do not contain removed rows.

        You can change the index type with ``factory`` and the dtype of the keys with ``dtype``. If you give the sums of
        the keys as ``known``, they are not recomputed. Raises UsageError if the store does not support the index type.
        Raises InputError if a key overflows the dtype. Raises StoreError if rows are damaged.
        """
        if self.manifest is not None:  # damaged rows must not get valid sums and digests
            check(self.store, self.manifest, set())
        before = KeyTable.at(self.store.address, self.table.name, self.table.version)  # pinned during the replacement
        rewritten = self.create(
            self.writer, replace(self, table=before).blocks_of(before.label_columns), self.class_names,
            self.classes.text, dtype or self.dtype, factory or self._asked, stored=True,
            metric=self.metric if self.solved is None else None, known=known,
        )  # fmt: skip
        for name in ("table", "classes", "second", "dtype"):
            setattr(self, name, getattr(rewritten, name))
        self.index_type, self.built = rewritten.index_type, replace(self.built, auto_index=rewritten.built.auto_index)
        if factory is not None:
            self.settings = self.settings.override(k=index_kind(factory, self.n, len(self.class_names))[1])
        self._follow()

    def set_fitted(
        self,
        metric: tip.Metric | None,
        fitted: Fitted | None,
        factory: str | None = None,
        solved: CacheModel | None = None,
    ) -> None:
        """Set a fitted metric and the record of its fit.

        ``solved`` is the index in memory, if it was fitted there. Unless it has solved values, the table is rewritten
        with the points of the keys. ``factory`` defaults to the current index type. Raises InputError if the keys with
        solved values do not fit in memory.
        """
        self.metric, self.fitted = metric, fitted
        self.solved = None if solved is None or solved.values is None else solved
        if self.solved is not None:
            self.check_held(self.n)
        if metric is not None and self.solved is None:
            self.rewrite(factory, known=self.sums)
        elif self.table.has_points or factory is not None:
            if self.table.has_points:
                self.table.drop_points()
                self.classes = replace(self.classes, points=None)
            self._index(factory or self._asked)
        self._follow()

    @property
    def _asked(self) -> str:
        return "auto" if self.built.auto_index else self.index_type

    def _index(self, asked: str) -> None:
        self.index_type, met = index_kind(asked, self.n, len(self.class_names))
        self.settings = self.settings.override(k=self.settings.k or met)
        self.table.build_index(self.index_type)
        self.built = replace(self.built, auto_index=asked == "auto")
        self._follow()

    def _keep_up(self, prunes: bool) -> None:
        """Update the index if needed, because unindexed rows slow down every search."""
        if prunes:  # otherwise pruning would merge fragments in a separate version
            self.table.optimize()
        if self.index_type == FLAT and self.n >= INDEX_FROM and self.built.auto_index:
            self._index("auto")
        elif self.index_type != FLAT and self.table.unindexed() >= UNINDEXED:
            self.table.optimize()

    def duplicates_of(self, key_ids: Sequence[int]) -> Duplicates:
        """See :meth:`Change.duplicates_of`. Only neighbours of the keys and keys with the same digests are read."""
        asked = np.asarray(key_ids[:MOST_ASKED])
        retrieval = self.retrieval
        points = retrieval.points(torch.from_numpy(self.keys_of(asked).astype(np.float32)))
        near = retrieval.keys.nearest(points, NEIGHBOURS)
        rows = np.unique(near.rows[near.rows >= 0].numpy())
        digests = self.find(key_ids=key_ids)["digest"].drop_null().unique().to_pylist()
        same = self.table.of_ids("digest", digests, ["key_id"])["key_id"].to_numpy()
        some = np.unique(np.concatenate([self.described(rows, ["key_id"])["key_id"].to_numpy(), same, key_ids]))
        labels = self.find(key_ids=some.tolist()).sort_by("key_id")
        pairs = duplicates(self.keys_of(some), labels, np.flatnonzero(np.isin(some, asked)), budget=PAIRS)
        return pairs if len(asked) == len(key_ids) else replace(pairs, compared="digests")

    def commit(self, change: str) -> None:
        """Make this draft the current version of its store. ``change`` is a short description for the history.

        Raises the errors of :meth:`AnsweringIndex.check_answers` and :meth:`versions.TableWriter.commit`.
        """
        writer, prunes = self.writer, self.writer.prunes
        (self.solved or self).check_answers()
        self._keep_up(prunes)
        files = {"classes": writer.put("classes", self.classes.to_bytes(), len(self.class_names))}
        files |= {kind: writer.put_array(kind, array) for kind, array in _arrays(self)}
        table = Table(self.table.name, self.table.version, self.n)
        digests = writer.digests(table)
        self.manifest = manifest_of(self, writer.number, writer.parent, change, files, table=table, digests=digests)
        writer.commit(self.manifest)
        self.version = self.manifest.version
        with suppress(StoreError):  # the new version is committed, and a later commit deletes the rest
            self.store.forget_old(prunes)


def _arrays(draft: LanceDraft) -> Iterator[tuple[str, KeyArray]]:
    second, keys = draft.second, draft.n * draft.d * np.dtype(draft.dtype).itemsize
    if second is not None and second.nbytes * SUMS_FROM <= keys:
        yield "second", second
    if draft.prior is not None:
        yield "prior", draft.prior
    if draft.metric is not None:
        yield "metric", array_of(draft.metric)
    if draft.solved is not None:
        assert draft.solved.values is not None
        order = np.argsort(draft.solved.labels["key_id"].to_numpy())
        yield "values", draft.solved.values.cpu().numpy()[order]


def labelled_blocks(material: Material) -> Iterator[tuple[pa.Table, npt.NDArray[np.float32]]]:
    """Yield the labels and keys of a source in blocks. Shot numbers continue from block to block."""
    names = material.words.class_names
    following = np.zeros(len(names), dtype=np.int32)
    for block in material.blocks():
        ids, labels = material.ids[block.positions], material.labels(block.positions, block.digests)
        yield shots_after(labels, ids, following), block.features
        following += np.bincount(ids, minlength=len(names)).astype(np.int32)


def index_kind(factory: str, n: int = 0, c: int = 1) -> tuple[str, int | None]:
    """Return the index type for a requested ``factory``, and the number of keys per query to use with it.

    You can request ``auto``, ``Flat``, ``Classes`` or one of :data:`key_table.KINDS`. For ``n`` keys of ``c`` classes,
    ``auto`` selects ``Classes`` if a folder would use it (see :func:`vector_index.auto_factory`). Raises UsageError for
    any other type.
    """
    if factory == "auto":
        if n < INDEX_FROM:
            return FLAT, None
        chosen, k = auto_factory(n, c)
        return (CLASSES, k) if inner_factory(chosen) is not None else ("IvfFlat", None)
    if factory not in (FLAT, CLASSES, *KINDS):
        raise UsageError(f"index {factory!r}: give auto, {FLAT}, {CLASSES} or {', '.join(KINDS)} for a LanceDB store")
    return factory, None


def check_columns(columns: Iterable[pa.Field]) -> None:
    """Raise InputError if the name of an extra column is reserved or is not allowed."""
    for column in columns:
        if column.name in (VERSION, VECTOR, "") or column.name.startswith("_") or set(".`") & set(column.name):
            raise InputError(
                f"column {column.name!r}: a LanceDB store reserves {VERSION}, {VECTOR} and names that begin with _, "
                "and does not allow dots or backticks; rename or remove it"
            )
