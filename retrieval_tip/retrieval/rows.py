"""The keys of an index and their labels. Each edit returns new rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.arrays import IntArray, KeyArray, slices
from retrieval_tip.data.source import spread
from retrieval_tip.errors import InputError
from retrieval_tip.retrieval.defaults import Statistics, measure
from retrieval_tip.retrieval.duplicates import Duplicates, duplicates
from retrieval_tip.retrieval.inputs import KeysInPlace
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys, KeyStream, transformed
from retrieval_tip.retrieval.vector_index import BY_CLASS, FLAT_FACTORY, VectorIndex
from retrieval_tip.settings import Dtype
from retrieval_tip.store.labels import labels_in, shots_after, with_column
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Writer
from retrieval_tip.wording import first_line

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
    def where(
        self, column: str, values: Sequence[int | str], columns: Sequence[str] = ()
    ) -> pa.Table:
        """Return the labels of the rows whose ``column`` has one of the values, or some ``columns`` of the labels."""

    @abstractmethod
    def blocks(
        self, columns: Sequence[str] = (), class_ids: IntArray | None = None
    ) -> Iterator[tuple[pa.Table, KeyArray]]:
        """Yield the labels, or some ``columns`` of them, and the stored keys, one block at a time.

        The keys are those of the given classes, by default all.
        """

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
    def replaced(self, gone: ArrayRows | None, new: ArrayRows | None) -> Rows:
        """Remove keys, and add others to their classes.

        Raises InputError if the columns of the labels do not match.
        """

    def added(self, new: ArrayRows) -> Rows:
        """Add keys, and continue the shot numbers of their classes. Raises the errors of :meth:`replaced`."""
        ids = new.class_ids
        return self.replaced(
            None, replace(new, labels=shots_after(new.labels, ids, self._next_shots(ids)))
        )

    def moved(self, rows: ArrayRows, class_ids: IntArray, class_names: Sequence[str]) -> Rows:
        """Move keys to other classes, where they become the last shots. Values do not change."""
        labels = labels_in(rows.labels, class_names, class_ids)
        return self.replaced(
            rows, replace(rows, labels=shots_after(labels, class_ids, self._next_shots(class_ids)))
        )

    def _next_shots(self, class_ids: IntArray) -> npt.NDArray[np.int32]:
        """Return the next shot number of each class, or 0 for classes that are not in ``class_ids``."""
        following = np.zeros(class_ids.max() + 1, dtype=np.int32)
        there = self.where("class_id", np.unique(class_ids).tolist(), ("class_id", "shot"))
        np.maximum.at(following, there["class_id"].to_numpy(), there["shot"].to_numpy() + 1)
        return following

    @abstractmethod
    def fitted(
        self, metric: tip.Metric | None, values: Tensor | None, factory: str | None, device: str
    ) -> Rows:
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

    ``points`` are the transformed keys, or ``None`` if there is no metric. ``kept_in`` are the same rows in a table
    before the ``pending`` edits, which are made there at the next commit. See :class:`Rows` for the other attributes.
    """

    keys: KeyArray
    labels: pa.Table
    values: Tensor | None = None
    points: KeyArray | None = None
    sums: Sums | None = None
    index: VectorIndex | None = None
    kept_in: Rows | None = None
    pending: tuple[Callable[[Rows], Rows], ...] = ()

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
        return Keys(
            self.vectors, self.class_ids, n_classes, device, self.index, metric, self.values
        )

    def indexed(self, n_classes: int, factory: str | None = None, device: str = "cpu") -> ArrayRows:
        """Build the FAISS index over these vectors, or over the class means for ``Classes``, by default as before.

        Raises UsageError if the factory is invalid.
        """
        factory = factory or (FLAT_FACTORY if self.index is None else self.index.factory)
        if factory == FLAT_FACTORY:
            return replace(self, index=None)
        vectors = self.vectors
        if factory == BY_CLASS:
            vectors = Keys(vectors, self.class_ids, n_classes).means.numpy()
        return replace(self, index=VectorIndex.build(vectors, factory, device))

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

    def where(
        self, column: str, values: Sequence[int | str], columns: Sequence[str] = ()
    ) -> pa.Table:
        wanted = pa.array(values, self.labels.schema.field(column).type)
        labels = self.labels.select([*columns]) if columns else self.labels
        return labels.filter(pc.is_in(self.labels[column], value_set=wanted))

    def blocks(
        self, columns: Sequence[str] = (), class_ids: IntArray | None = None
    ) -> Iterator[tuple[pa.Table, KeyArray]]:
        rows = (
            np.arange(self.n)
            if class_ids is None
            else np.flatnonzero(np.isin(self.class_ids, class_ids))
        )
        for block in slices(len(rows), KEY_BLOCK):
            yield (
                self.described(rows[block], columns or self.labels.column_names),
                np.asarray(self.keys[rows[block]]),
            )

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
        return ArrayRows(
            np.asarray(self.keys[rows]), self.labels.take(pa.array(rows)), values, points
        )

    def replaced(self, gone: ArrayRows | None, new: ArrayRows | None) -> ArrayRows:
        """The rows stay sorted by class and key id."""
        rows = np.arange(self.n)
        sums = self.sums
        more = new or self.take(np.arange(0))
        if gone is not None:
            rows = np.delete(rows, self.rows_of(gone.key_ids))
            sums = None if sums is None else sums.added(gone.keys, gone.class_ids, -1)
        sums = None if sums is None else sums.added(more.keys, more.class_ids)
        if sums is not None and self.sums is not None and not sums.outweighs(self.sums):
            sums = None  # rounding errors have become too large, so the next fit recomputes them
        try:
            # A column that one of them lacks becomes null. Other types of a column are an error.
            labels = pa.concat_tables([self.labels, more.labels], promote_options="default")
        except pa.ArrowException as error:
            raise InputError(
                f"labels: columns do not match the columns of the index ({first_line(error)})"
            ) from None
        rows = np.append(rows, np.arange(self.n, len(labels)))
        rows = rows[np.lexsort([labels[name].to_numpy()[rows] for name in ("key_id", "class_id")])]
        values = self.values
        points = self.points
        if values is not None and more.values is not None:
            values = torch.cat([values, more.values.to(values)])[rows]
        if points is not None and more.points is not None:
            points = _picked(points, more.points, rows)
        keys = _picked(self.keys, more.keys, rows)
        labels = labels.take(pa.array(rows))
        pending = self._with_pending(lambda table: table.replaced(gone, new))
        return ArrayRows(keys, labels, values, points, sums, kept_in=self.kept_in, pending=pending)

    def _with_pending(self, edit: Callable[[Rows], Rows]) -> tuple[Callable[[Rows], Rows], ...]:
        return () if self.kept_in is None else (*self.pending, edit)

    def fitted(
        self, metric: tip.Metric | None, values: Tensor | None, factory: str | None, device: str
    ) -> ArrayRows:
        return replace(self, points=transformed(metric, self.keys, device), values=values)

    def renamed(self, class_id: int, name: str) -> ArrayRows:
        column = pc.if_else(pc.equal(self.labels["class_id"], class_id), name, self.labels["label"])
        pending = self._with_pending(lambda table: table.renamed(class_id, name))
        return replace(self, labels=with_column(self.labels, "label", column), pending=pending)

    def widened(self, n_classes: int) -> ArrayRows:
        values = self.values
        sums = self.sums
        if values is not None:
            values = functional.pad(values, (0, n_classes - values.shape[1]))
        pending = self._with_pending(lambda table: table.widened(n_classes))
        return replace(
            self,
            values=values,
            sums=None if sums is None else sums.widened(n_classes),
            pending=pending,
        )

    def narrowed(self, class_ids: IntArray, n_classes: int) -> ArrayRows:
        left = np.delete(np.arange(n_classes), class_ids)
        ids = pa.array(
            np.searchsorted(left, self.class_ids), self.labels.schema.field("class_id").type
        )
        return replace(
            self,
            labels=with_column(self.labels, "class_id", ids),
            values=None if self.values is None else self.values[:, left],
            sums=None if self.sums is None else self.sums.without(class_ids),
            pending=self._with_pending(lambda table: table.narrowed(class_ids, n_classes)),
        )


def _picked(old: KeyArray, new: KeyArray, rows: IntArray) -> KeyArray:
    """Return rows of one array followed by another, with a single copy of a large array."""
    # Rows of the new array get a placeholder, because concatenating would copy the old array twice.
    picked: KeyArray = np.take(old, np.minimum(rows, len(old) - 1), axis=0)
    fresh = np.flatnonzero(rows >= len(old))
    picked[fresh] = new[rows[fresh] - len(old)]
    return picked
