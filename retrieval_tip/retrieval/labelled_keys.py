"""Keys and their labels as an immutable object. Each edit returns a new object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip.errors import InputError, first_line
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.store.labels import LABEL_SCHEMA, shots_after, shots_of

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledKeys:
    """Keys and their labels, grouped by class.

    Attributes:
        keys: the keys, of shape ``[n, d]``.
        labels: the label store, which has one row per key.
        values: the solved or trained values, of shape ``[n, c]``, or ``None``.
        points: the transformed keys, or ``None`` if there is no metric.
    """

    keys: KeyArray
    labels: pa.Table
    values: Tensor | None = None
    points: KeyArray | None = None

    @property
    def met(self) -> KeyArray:
        """The keys that queries are compared with. These are the points if there is a metric."""
        return self.keys if self.points is None else self.points

    @property
    def class_ids(self) -> IntArray:
        """The class ids as an int64 array."""
        return np.asarray(self.labels["class_id"].to_numpy(), dtype=np.int64)

    @property
    def key_ids(self) -> IntArray:
        """The key ids as an int64 array."""
        return np.asarray(self.labels["key_id"].to_numpy(), dtype=np.int64)

    def rows_of(self, key_ids: Sequence[int]) -> IntArray:
        """Return the rows of ``key_ids`` in ascending order. Raises InputError if an id is unknown."""
        present, wanted = self.key_ids, np.asarray(list(key_ids), dtype=np.int64)
        missing = np.setdiff1d(wanted, present)
        if missing.size:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        return np.flatnonzero(np.isin(present, wanted))

    def of_rows(self, rows: IntArray) -> tuple[KeyArray, IntArray]:
        """Return the keys at ``rows``, and their class ids."""
        return np.asarray(self.keys[rows]), self.class_ids[rows]

    def order(self) -> IntArray:
        """Return the rows sorted by class and key id. This is the order of a newly built index."""
        return np.lexsort((self.key_ids, self.class_ids))

    def take(self, rows: IntArray) -> LabelledKeys:
        """Return the keys at ``rows``, in the given order."""
        values = None if self.values is None else self.values[rows]
        points = None if self.points is None else np.asarray(self.points[rows])
        return LabelledKeys(np.asarray(self.keys[rows]), self.labels.take(pa.array(rows)), values, points)

    def with_added(self, new: LabelledKeys, n_classes: int) -> LabelledKeys:
        """Insert new keys after the other keys of their classes, and continue the shot numbers of these classes.

        Raises InputError if the columns of the labels do not match.
        """
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
        return LabelledKeys(inserted(self.keys, new.keys), labels.take(pa.array(rows)), values, points)

    def without(self, rows: IntArray) -> LabelledKeys:
        """Remove the keys at ``rows``."""
        return self.take(np.delete(np.arange(len(self.labels)), rows))

    def relabelled(self, rows: IntArray, class_ids: IntArray, class_names: Sequence[str]) -> LabelledKeys:
        """Move the keys at ``rows`` to other classes, where they become the last shots. Values do not change."""
        order = np.argsort(self.key_ids[rows])
        rows, class_ids = rows[order], class_ids[order]
        ids, names = self.class_ids.copy(), self.labels["label"].to_numpy().copy()
        shots = self.labels["shot"].to_numpy().copy()
        following = self._next_shots(len(class_names))
        shots[rows] = following[class_ids] + shots_of(class_ids)
        ids[rows], names[rows] = class_ids, [class_names[class_id] for class_id in class_ids]
        labels = self.labels
        for name, column in (("class_id", ids), ("label", names), ("shot", shots)):
            place = labels.column_names.index(name)
            labels = labels.set_column(place, name, pa.array(column, LABEL_SCHEMA.field(name).type))
        moved = replace(self, labels=labels)
        return moved.take(moved.order())

    def _next_shots(self, n_classes: int) -> npt.NDArray[np.int32]:
        following = np.zeros(n_classes, dtype=np.int32)
        np.maximum.at(following, self.class_ids, self.labels["shot"].to_numpy() + 1)
        return following
