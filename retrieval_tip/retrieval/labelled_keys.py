"""Keys and their labels as an immutable object. Each edit returns a new object."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip.errors import InputError, first_line
from retrieval_tip.retrieval.segments import KeyArray, Segments, joined, segments_of
from retrieval_tip.store.labels import LABEL_SCHEMA, shots_after, shots_of

SMALL = 4096
"""Maximum number of keys in a small segment. Small segments are merged when keys are added."""

IntArray = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledKeys:
    """Keys and their labels. Each segment of the keys is grouped by class.

    The FAISS index covers the first segment. An edit that does not affect the first segment shares it with the result.

    Attributes:
        keys: the keys, of shape ``[n, d]``.
        labels: the label store, which has one row per key.
        values: the solved or trained values, of shape ``[n, c]``. If there are values, the keys are a single segment.
        points: the transformed keys, in the same segments as ``keys``, or ``None`` if there is no metric.
    """

    keys: KeyArray | Segments
    labels: pa.Table
    values: Tensor | None = None
    points: KeyArray | Segments | None = None

    @property
    def met(self) -> KeyArray | Segments:
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
        """Return the keys at ``rows`` as a single segment, in the given order."""
        values = None if self.values is None else self.values[rows]
        points = None if self.points is None else np.asarray(self.points[rows])
        return LabelledKeys(np.asarray(self.keys[rows]), self.labels.take(pa.array(rows)), values, points)

    def with_added(self, new: LabelledKeys, n_classes: int) -> LabelledKeys:
        """Append new keys as a segment, and continue the shot numbers of their classes.

        Earlier segments that are small, or not larger than the new segment, are merged into it. Raises InputError if
        the columns of the labels do not match.
        """
        added = new.labels
        ids = added["class_id"].to_numpy().astype(np.int64)
        added = shots_after(added, ids, self._next_shots(n_classes))
        try:
            labels = pa.concat_tables([self.labels, added], promote_options="default")
        except pa.ArrowException as error:
            raise InputError(f"labels: columns do not match the columns of the index ({first_line(error)})") from None
        values = None
        if self.values is not None and new.values is not None:
            values = torch.cat([self.values, new.values.to(self.values)])
        parts = [*segments_of(self.keys), np.asarray(new.keys).astype(self.keys.dtype)]
        first = len(parts) - 1
        while first and (len(parts[first - 1]) <= max(SMALL, sum(map(len, parts[first:]))) or values is not None):
            first -= 1
        start = sum(map(len, parts[:first]))
        points: list[KeyArray] = []
        if self.points is not None and new.points is not None:
            points = [*segments_of(self.points), np.asarray(new.points).astype(self.keys.dtype)]
        merged_points = np.concatenate(points[first:]) if points else None
        late = LabelledKeys(np.concatenate(parts[first:]), labels.slice(start), values, merged_points)
        late = late.take(late.order())
        if not first:
            return late
        labels = pa.concat_tables([labels.slice(0, start), late.labels])
        all_points = joined([*points[:first], np.asarray(late.points)]) if points else None
        return LabelledKeys(joined([*parts[:first], np.asarray(late.keys)]), labels, None, all_points)

    def without(self, rows: IntArray) -> LabelledKeys:
        """Remove the keys at ``rows``."""
        gone = np.zeros(len(self.labels), dtype=bool)
        gone[rows] = True
        return self._rearranged(gone, ~gone)

    def relabelled(self, rows: IntArray, class_ids: IntArray, class_names: Sequence[str]) -> LabelledKeys:
        """Move the keys at ``rows`` to other classes, where they become the last shots. Values do not change."""
        order = np.argsort(self.key_ids[rows])  # the rows of a segment are not always sorted by key id
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
        touched = np.zeros(len(ids), dtype=bool)
        touched[rows] = True
        return replace(self, labels=labels)._rearranged(touched, np.ones(len(ids), dtype=bool))

    def _next_shots(self, n_classes: int) -> npt.NDArray[np.int32]:
        following = np.zeros(n_classes, dtype=np.int32)
        np.maximum.at(following, self.class_ids, self.labels["shot"].to_numpy() + 1)
        return following

    def _rearranged(self, touched: Bools, keep: Bools) -> LabelledKeys:
        """Return the keys to ``keep``. If the first segment is ``touched``, merge all segments."""
        parts = segments_of(self.keys)
        points = None if self.points is None else segments_of(self.points)
        if touched[: len(parts[0])].any():
            rows = np.flatnonzero(keep)
            return self.take(rows[np.lexsort((self.key_ids[rows], self.class_ids[rows]))])
        kept, orders = [parts[0]], [np.arange(len(parts[0]))]
        kept_points = [] if points is None else [points[0]]
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        for number, (start, stop) in enumerate(itertools.pairwise(starts[1:]), 1):
            part = parts[number]
            own = np.flatnonzero(keep[start:stop])
            if changed := bool(touched[start:stop].any()):
                own = own[np.lexsort((self.key_ids[start:stop][own], self.class_ids[start:stop][own]))]
            if len(own):
                kept.append(part[own] if changed else part)
                if points is not None:
                    kept_points.append(points[number][own] if changed else points[number])
                orders.append(own + start)
        labels = self.labels.take(pa.array(np.concatenate(orders)))
        return LabelledKeys(joined(kept), labels, None, joined(kept_points) if kept_points else None)
