"""The keys of an index and their labels. Each edit returns new rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.data.source import spread
from retrieval_tip.errors import InputError, first_line
from retrieval_tip.retrieval.defaults import Statistics, measure
from retrieval_tip.retrieval.duplicates import Duplicates, duplicates
from retrieval_tip.retrieval.inputs import IntArray, KeyArray, KeysInPlace
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys, KeyStream, index_over, points_of
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.retrieval.vector_index import FLAT_FACTORY, VectorIndex
from retrieval_tip.settings import Dtype
from retrieval_tip.store.labels import LABEL_SCHEMA, shots_after, shots_of, with_column
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Writer

FRESH_PAIRS = 1 << 26
"""Maximum number of affinities to compute when new keys are checked for duplicates."""


class Rows(ABC):
    """The keys of an index and their labels, grouped by class. They are in memory or in a table.

    Attributes:
        keys: the keys, of shape ``[n, d]``, in the order of the labels.
        labels: the label store, which has one row per key.
        values: the solved or trained values, of shape ``[n, c]``, or ``None`` if values are one-hot.
        sums: the sums that are needed to fit a metric, or ``None`` if they are not known. Edits keep them up to date.
        index: the FAISS index over the vectors. It is ``None`` if a search compares all keys, or in a table, which has
            its own index.
    """

    keys: KeyArray | KeysInPlace
    labels: pa.Table
    values: Tensor | None = None
    sums: Sums | None
    index: VectorIndex | None = None

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self.keys.shape[0])

    @property
    def d(self) -> int:
        """Length of a key."""
        return int(self.keys.shape[1])

    @property
    @abstractmethod
    def dtype(self) -> Dtype:
        """Type of the stored keys: float32 or float16."""

    @property
    @abstractmethod
    def vectors(self) -> KeyArray | KeysInPlace:
        """The keys that queries are compared with. These are the points if there is a metric."""

    @property
    @abstractmethod
    def class_ids(self) -> IntArray:
        """The class ids as an int64 array."""

    @abstractmethod
    def with_sums(self, sums: Sums | None) -> Rows:
        """Return the same rows, whose sums are known."""

    @abstractmethod
    def stream(self, n_classes: int, device: str, metric: tip.Metric | None) -> KeyStream:
        """Return the keys as a query meets them. The points of the ``metric`` are known already."""

    @abstractmethod
    def columns(self, *names: str) -> pa.Table:
        """Return columns of the label store."""

    @abstractmethod
    def described(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store for the row numbers that a search returned."""

    @abstractmethod
    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        """Return at most ``m`` evenly spaced stored keys, and their ``key_id`` and ``class_id``."""

    @abstractmethod
    def where(self, column: str, values: Sequence[int | str]) -> pa.Table:
        """Return the labels of the rows whose ``column`` has one of the values."""

    @abstractmethod
    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[IntArray, KeyArray]]:
        """Yield the class ids and the stored keys of the given classes, one block at a time."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[pa.Table, KeyArray]]:
        """Yield the labels and the stored keys, one block at a time."""

    @abstractmethod
    def of(self, key_ids: Sequence[int]) -> ArrayRows:
        """Return the rows of the given keys in memory, sorted by id. Raises InputError if an id is unknown."""

    @abstractmethod
    def take(self, rows: IntArray) -> ArrayRows:
        """Return the rows at the given positions of the labels, in memory and without sums.

        Positions may repeat. Raises UsageError if there are too many.
        """

    @abstractmethod
    def in_memory(self) -> ArrayRows:
        """Return the rows with all keys in memory. Raises UsageError if there are too many."""

    def written(self, writer: Writer) -> ArrayRows:
        """Return the rows with their keys in a file of the version that is being written, if they do not have one."""
        return self.in_memory()

    @abstractmethod
    def duplicates_of(self, key_ids: Sequence[int], keys: KeyStream) -> Duplicates:
        """Return the keys among ``key_ids`` whose image is also in another class."""

    @abstractmethod
    def added(self, new: ArrayRows, n_classes: int) -> Rows:
        """Add keys after the other keys of their classes, and continue the shot numbers of these classes.

        Raises InputError if the columns of the labels do not match.
        """

    @abstractmethod
    def without(self, gone: ArrayRows) -> Rows:
        """Remove keys."""

    @abstractmethod
    def moved(self, part: ArrayRows, class_ids: IntArray, class_names: Sequence[str]) -> Rows:
        """Move keys to other classes, where they become the last shots. Values do not change."""

    @abstractmethod
    def fitted(self, metric: tip.Metric | None, values: Tensor | None, factory: str | None, device: str) -> Rows:
        """Replace the points and the values. ``factory`` is the new type of the index of a table."""

    @abstractmethod
    def renamed(self, class_id: int, name: str) -> Rows:
        """Change the label of the keys of a class."""

    @abstractmethod
    def widened(self, n_classes: int) -> Rows:
        """Append classes that have no keys."""

    @abstractmethod
    def narrowed(self, class_ids: IntArray, n_classes: int) -> Rows:
        """Remove classes that have no keys. ``n_classes`` is the number of classes before."""

    def statistics(self) -> Statistics | None:
        """Measure the affinities between the transformed keys (see :func:`defaults.measure`)."""
        return measure(self.vectors, self.class_ids)


@dataclass(frozen=True, eq=False)
class ArrayRows(Rows):
    """Keys that are in memory or memory-mapped.

    ``points`` are the transformed keys, or ``None`` if there is no metric. See :class:`Rows` for the other attributes.
    """

    keys: KeyArray
    labels: pa.Table
    values: Tensor | None = None
    points: KeyArray | None = None
    sums: Sums | None = None
    index: VectorIndex | None = None

    @property
    def dtype(self) -> Dtype:
        return "float16" if self.keys.dtype == np.float16 else "float32"

    @property
    def vectors(self) -> KeyArray:
        return self.keys if self.points is None else self.points

    @property
    def class_ids(self) -> IntArray:
        return np.asarray(self.labels["class_id"].to_numpy(), dtype=np.int64)

    @property
    def key_ids(self) -> IntArray:
        """The key ids as an int64 array."""
        return np.asarray(self.labels["key_id"].to_numpy(), dtype=np.int64)

    def with_sums(self, sums: Sums | None) -> ArrayRows:
        return replace(self, sums=sums)

    def stream(self, n_classes: int, device: str, metric: tip.Metric | None) -> Keys:
        return Keys(self.vectors, self.class_ids, n_classes, device, self.index, metric, self.values)

    def indexed(self, n_classes: int, factory: str | None = None, device: str = "cpu") -> ArrayRows:
        """Build the FAISS index over these vectors, by default of the same type.

        Raises UsageError if the factory is invalid.
        """
        factory, index = factory or (FLAT_FACTORY if self.index is None else self.index.factory), None
        if factory != FLAT_FACTORY:
            index = index_over(self.vectors, self.class_ids, n_classes, factory, device)
        return replace(self, index=index)

    def refilled(self, index: VectorIndex | None, n_classes: int, device: str) -> ArrayRows:
        """Fill a FAISS index with these vectors. It is only trained again once the number of keys has doubled."""
        if index is None:
            return self
        if index.by_class or self.n >= 2 * index.trained:
            return replace(self, index=index).indexed(n_classes, device=device)
        return replace(self, index=index.refilled(self.vectors))

    def columns(self, *names: str) -> pa.Table:
        return self.labels.select(names)

    def described(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        return self.labels.select(list(columns)).take(pa.array(rows))

    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        rows = spread(self.n, m)
        return np.asarray(self.keys[rows]), self.described(rows, ["key_id", "class_id"])

    def where(self, column: str, values: Sequence[int | str]) -> pa.Table:
        wanted = pa.array(values, self.labels.schema.field(column).type)
        return self.labels.filter(pc.is_in(self.labels[column], value_set=wanted))

    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[IntArray, KeyArray]]:
        every = self.class_ids
        rows = np.flatnonzero(np.isin(every, class_ids))
        for part in slices(len(rows), KEY_BLOCK):
            yield every[rows[part]], np.asarray(self.keys[rows[part]])

    def blocks(self) -> Iterator[tuple[pa.Table, KeyArray]]:
        for part in slices(self.n, KEY_BLOCK):
            yield self.labels.slice(part.start, KEY_BLOCK), self.keys[part]

    def rows_of(self, key_ids: IntArray) -> IntArray:
        """Return the row numbers of keys, in the order of their ids. Raises InputError if an id is unknown."""
        present = self.key_ids
        missing = np.setdiff1d(key_ids, present)
        if missing.size:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        order = np.argsort(present)
        return order[np.searchsorted(present, key_ids, sorter=order)]

    def of(self, key_ids: Sequence[int]) -> ArrayRows:
        return self.take(self.rows_of(np.unique(np.asarray(key_ids, dtype=np.int64))))

    def in_memory(self) -> ArrayRows:
        return self

    def duplicates_of(self, key_ids: Sequence[int], keys: KeyStream) -> Duplicates:
        fresh = np.flatnonzero(np.isin(self.key_ids, key_ids))
        return duplicates(self.keys, self.labels, fresh, budget=FRESH_PAIRS)

    def order(self) -> IntArray:
        """Return the row numbers sorted by class and key id. This is the order of a newly built index."""
        return np.lexsort((self.key_ids, self.class_ids))

    def take(self, rows: IntArray) -> ArrayRows:
        values = None if self.values is None else self.values[rows]
        points = None if self.points is None else np.asarray(self.points[rows])
        return ArrayRows(np.asarray(self.keys[rows]), self.labels.take(pa.array(rows)), values, points)

    def added(self, new: ArrayRows, n_classes: int) -> ArrayRows:
        ids = new.class_ids
        added = shots_after(new.labels, ids, self._next_shots(n_classes))
        try:
            labels = pa.concat_tables([self.labels, added], promote_options="default")
        except pa.ArrowException as error:
            raise InputError(f"labels: columns do not match the columns of the index ({first_line(error)})") from None
        order = np.argsort(ids, kind="stable")
        places = np.searchsorted(self.class_ids, ids[order], side="right")

        def inserted(old: KeyArray, more: KeyArray) -> KeyArray:
            return np.insert(np.asarray(old), places, more[order].astype(old.dtype), axis=0)

        rows, values, points = np.insert(np.arange(len(self.labels)), places, len(self.labels) + order), None, None
        if self.values is not None and new.values is not None:
            values = torch.cat([self.values, new.values.to(self.values)])[rows]
        if self.points is not None and new.points is not None:
            points = inserted(self.points, new.points)
        sums = None if self.sums is None else self.sums.added(new.keys, ids)
        return ArrayRows(inserted(self.keys, new.keys), labels.take(pa.array(rows)), values, points, sums)

    def without(self, gone: ArrayRows) -> ArrayRows:
        sums = None if self.sums is None else self.sums.added(gone.keys, gone.class_ids, -1)
        if sums is not None and self.sums is not None and not sums.outweighs(self.sums):
            sums = None  # rounding errors have become too large, so the next fit recomputes the sums
        left = np.delete(np.arange(self.n), self.rows_of(gone.key_ids))
        return replace(self.take(left), sums=sums)

    def moved(self, part: ArrayRows, class_ids: IntArray, class_names: Sequence[str]) -> ArrayRows:
        rows, labels = self.rows_of(part.key_ids), self.labels
        ids, names, shots = self.class_ids.copy(), labels["label"].to_numpy().copy(), labels["shot"].to_numpy().copy()
        shots[rows] = self._next_shots(len(class_names))[class_ids] + shots_of(class_ids)
        ids[rows], names[rows] = class_ids, [class_names[class_id] for class_id in class_ids]
        for name, column in (("class_id", ids), ("label", names), ("shot", shots)):
            labels = with_column(labels, name, pa.array(column, LABEL_SCHEMA.field(name).type))
        sums = None if self.sums is None else self.sums.moved(part.keys, part.class_ids, class_ids)
        moved = replace(self, labels=labels)
        return replace(moved.take(moved.order()), sums=sums)

    def fitted(self, metric: tip.Metric | None, values: Tensor | None, factory: str | None, device: str) -> ArrayRows:
        return replace(self, points=points_of(metric, self.keys, device), values=values)

    def renamed(self, class_id: int, name: str) -> ArrayRows:
        column = pc.if_else(pc.equal(self.labels["class_id"], class_id), name, self.labels["label"])
        return replace(self, labels=with_column(self.labels, "label", column))

    def widened(self, n_classes: int) -> ArrayRows:
        values, sums = self.values, self.sums
        if values is not None:
            values = functional.pad(values, (0, n_classes - values.shape[1]))
        return replace(self, values=values, sums=None if sums is None else sums.widened(n_classes))

    def narrowed(self, class_ids: IntArray, n_classes: int) -> ArrayRows:
        left = np.delete(np.arange(n_classes), class_ids)
        ids = pa.array(np.searchsorted(left, self.class_ids), self.labels.schema.field("class_id").type)
        return replace(
            self,
            labels=with_column(self.labels, "class_id", ids),
            values=None if self.values is None else self.values[:, left],
            sums=None if self.sums is None else self.sums.without(class_ids),
        )

    def _next_shots(self, n_classes: int) -> npt.NDArray[np.int32]:
        following = np.zeros(n_classes, dtype=np.int32)
        np.maximum.at(following, self.class_ids, self.labels["shot"].to_numpy() + 1)
        return following
