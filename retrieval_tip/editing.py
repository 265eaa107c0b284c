"""Edits of an index. They keep labels, points, values, sums and the FAISS index consistent."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.answering import Answering
from retrieval_tip.backbones.base import side_by_side, text_side_by_side
from retrieval_tip.data.shots import spread
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.keys import Keys, auto_for, points_of
from retrieval_tip.retrieval.ridge import MOST_SOLVED, Ridge
from retrieval_tip.retrieval.rows import ArrayRows, Rows
from retrieval_tip.retrieval.vector_index import FLAT_FACTORY
from retrieval_tip.settings import Dtype, Fitted
from retrieval_tip.store.labels import label_table

ASKED = 16
"""Number of keys that are used as queries to check the logits before a version is written."""

MOST_EXPONENT = 80.0
"""Maximum exponent in the weight of a key. In float32, the exponential overflows just above 88."""


class Editing(Answering):
    """The edits of an index. If an edit raises an error, the index does not change."""

    def check_answers(self) -> None:
        """Classify a few keys as if they were queries, and raise InputError if their logits overflow."""
        keys, labels = self.rows.some(ASKED)
        order = np.argsort(labels["class_id"].to_numpy(), kind="stable")  # a table is not grouped by class
        values = None if self.values is None else self.values[spread(self.n, ASKED)]
        few = replace(self, rows=ArrayRows(keys[order], labels.take(pa.array(order)), values))
        few.logits(functional.normalize(torch.from_numpy(keys.astype(np.float32))), "all")

    def _check_lengths(self, keys: npt.NDArray[Any]) -> None:
        """Raise InputError if the weight of one of these keys or points could overflow for a query of unit norm."""
        longest = float(np.sqrt(np.einsum("ij,ij->i", keys, keys, dtype=np.float64).max()))
        if self.settings.beta * (longest - 1) > MOST_EXPONENT:
            raise InputError(
                f"beta {self.settings.beta:g}: exp(beta (affinity - 1)) overflows for a key of norm {longest:.4g}; "
                "scale the keys to norm 1 (norms unit)"
            )

    @property
    def _ridge(self) -> Ridge | None:
        """The solver of the values, or ``None`` if they were not solved."""
        fitted = self.fitted
        if fitted is None or fitted.ridge is None:
            return None
        c, beta, bonus = len(self.class_names), self.settings.beta, fitted.bonus
        return Ridge(c, beta, fitted.ridge, self.device, fitted.class_prior, bonus)

    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        """Append classes that have no keys yet.

        If the index has text weights, pass ``text_weights`` of shape ``[m, d]`` for the new classes. Raises InputError
        if a class already exists, or if the weights are missing or have the wrong shape.
        """
        names = inputs.names(names)
        if again := sorted(set(names) & set(self.class_names)):
            raise InputError(f"classes: {again[0]!r} already exists in the index")
        if text_weights is None and self.has_text:
            raise InputError(f"classes: {names[0]!r} has no text weight; pass one, because the index has text")
        weights = inputs.text_weights(text_weights, len(names), self.d)
        self.class_names = [*self.class_names, *names]
        self.text_weights = torch.cat([self.text_weights, weights.to(self.text_weights)])
        self.rows, self.scores = self.rows.widened(len(self.class_names)), None
        self._follow()

    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        """Replace the text weights of all classes, and the templates that the weights were made from."""
        self.templates, self.text_weights = list(templates), torch.from_numpy(weights).to(self.device)
        self.scores = None

    def add(
        self,
        keys: Features,
        labels: Labels,
        sources: Sequence[str] | pa.ChunkedArray | None = None,
        *,
        views: int | npt.NDArray[np.integer] = 1,
        digests: Sequence[str | None] | None = None,
        extra: pa.Table | None = None,
    ) -> list[int]:
        """Add keys to existing classes, and return their key ids.

        If the values were solved, they are solved again. In a large index, only the values of the new keys are solved
        (see :class:`ridge.Ridge`). If the values were trained, the new keys get one-hot rows.

        ``keys`` has the shape ``[m, d]``. ``views``, the SHA-256 ``digests`` of the images and the columns of ``extra``
        are written to the label store. Raises InputError if the keys have the wrong shape or a label is unknown.
        """
        matrix = inputs.matrix(keys, "keys")
        if matrix.shape[1] != self.d:
            raise InputError(f"keys: each key has {matrix.shape[1]} values; the index requires {self.d}")
        if np.abs(matrix).max() > np.finfo(self.dtype).max:
            raise InputError(f"keys: values are too large for the index's {self.dtype}")
        ids = inputs.ids_of(labels, self.class_names, len(matrix))
        assert self.next_key_id is not None
        key_ids = np.arange(self.next_key_id, self.next_key_id + len(matrix))
        added = label_table(self.class_names, ids, sources, key_ids=key_ids, views=views, digests=digests, extra=extra)
        matrix = np.asarray(matrix).astype(self.dtype)
        new = ArrayRows(matrix, added, points=points_of(self.metric, matrix, self.device))
        self._check_lengths(new.vectors)
        self._hold(self.rows.added(replace(new, values=self._values_of(new)), len(self.class_names)))
        self.next_key_id += len(matrix)
        return key_ids.tolist()

    def _values_of(self, new: ArrayRows) -> Tensor | None:
        if self.values is None:
            return None
        if self._ridge is None:
            return functional.one_hot(torch.from_numpy(new.class_ids), len(self.class_names)).to(self.values)
        assert isinstance(self._keys, Keys)
        return self._ridge.added(self._keys, new.vectors, new.class_ids)

    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by id. Classes that become empty are kept.

        Raises InputError if an id is unknown, or if no key would remain.
        """
        gone = self.rows.of(key_ids)
        if gone.n == self.n:
            raise InputError("remove: an index needs at least one key; delete the index instead")
        if gone.n:
            self._hold(self.rows.without(gone))

    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        """Move keys to other classes, given one label for all keys or one label per key.

        The keys become the last shots of their new class. Raises InputError if an id or a label is unknown, or if an id
        is repeated.
        """
        wanted = inputs.new_ids(key_ids, labels, self.class_names)
        part = self.rows.of(list(wanted))
        class_ids = np.array([wanted[key_id] for key_id in part.key_ids.tolist()], dtype=np.int64)
        changed = np.flatnonzero(part.class_ids != class_ids)
        part, class_ids, rows = part.take(changed), class_ids[changed], self.rows
        if not part.n:
            return
        if self._ridge is not None:
            assert isinstance(rows, ArrayRows)
            assert isinstance(self._keys, Keys)
            rows = self._ridge.relabelled(self._keys, rows, rows.rows_of(part.key_ids), class_ids)
        self._hold(rows.moved(part, class_ids, self.class_names))

    def rename(self, old: str, new: str) -> None:
        """Rename a class. The class keeps its keys and its text weight.

        If ``new`` already exists, the keys are merged into ``new``, which keeps its own text weight. The ids of all
        classes after ``old`` then decrease by one. Raises InputError if ``old`` does not exist, or if ``new`` is not a
        valid name.
        """
        class_id, names = inputs.renamed(self.class_names, old, new)
        if len(names) < len(self.class_names):
            self._merge(class_id, new)
            return
        self.class_names, self.rows = names, self.rows.renamed(class_id, new)
        self.groups = None if self.groups is None else self.groups.renamed(old, new)
        self._follow()

    def _merge(self, class_id: int, into: str) -> None:
        """Move the keys of a class to the class ``into``, and drop the class."""
        if isinstance(self.rows, ArrayRows) and self.values is not None:
            # The columns can be added, because solved values are linear in their targets.
            place, counts, values = self.class_names.index(into), self.counts, self.values.clone()
            with_keys = [own for own in (class_id, place) if counts[own]]
            values[:, place] = values[:, with_keys or [place]].sum(1)
            self.rows = replace(self.rows, values=values)
            self._follow()
        self.relabel(self.find([self.class_names[class_id]])["key_id"].to_pylist(), into)
        self._drop(np.array([class_id]))

    def drop_unanswerable(self) -> None:
        """Drop the classes that have neither keys nor text, because no query resembles them."""
        if not self.has_text:
            self._drop(np.flatnonzero(np.equal(self.counts, 0)))

    def _drop(self, class_ids: npt.NDArray[np.int64]) -> None:
        """Drop classes that have no keys."""
        if not len(class_ids):
            return
        left = np.delete(np.arange(len(self.class_names)), class_ids)
        self.rows, self.scores = self.rows.narrowed(class_ids, len(self.class_names)), None
        self.class_names, self.text_weights = [self.class_names[i] for i in left], self.text_weights[left]
        self._follow()

    def solve(self) -> None:
        """Recompute solved values for the current keys and beta. Does nothing if the values were not solved.

        If there are more than :data:`MOST_SOLVED` keys, raises InputError and leaves the index unchanged.
        """
        if self._ridge is None or not isinstance(self.rows, ArrayRows):
            return
        if self.n > MOST_SOLVED:
            raise InputError(
                f"values: cannot be solved for {self.n:,} keys, because the limit is {MOST_SOLVED:,}; "
                "fit the index instead (retrieval-tip fit)"
            )
        points = np.asarray(self.rows.vectors, dtype=np.float32)
        values = self._ridge.values(torch.from_numpy(points).to(self.device), self.class_ids)
        self.rows = replace(self.rows, values=values)
        self._follow()

    def rebuild(self, factory: str | None = None, dtype: Dtype | None = None) -> None:
        """Sort the keys, and recompute the points, the solved values and the FAISS index. The keys must be in memory.

        Args:
            factory: the new type of the index. If it is ``auto``, :func:`keys.auto_for` selects the type and ``k``.
                Defaults to the current type.
            dtype: the new type of the keys, float32 or float16. Defaults to the current type.

        Raises:
            UsageError: if the factory is invalid.
            InputError: if the keys are too large for the dtype.
        """
        rows, settings = self.rows.in_memory(), self.settings
        if factory == "auto":
            factory, k = auto_for(rows.keys.shape, dtype or self.dtype, len(self.class_names), self.device)
            settings = replace(settings, k=k)
        ordered = rows.take(rows.order())
        with np.errstate(over="ignore"):  # overflow becomes infinity, which raises an error below
            keys = ordered.keys.astype(dtype or self.dtype)
        if not np.isfinite(keys).all():
            raise InputError(f"keys: values too large for {keys.dtype}; use float32")
        ordered = replace(ordered, keys=keys, points=points_of(self.metric, keys, self.device), index=rows.index)
        self.rows, self.settings = ordered.indexed(len(self.class_names), factory, self.device), settings
        self._follow()
        if self.n <= MOST_SOLVED:
            self.solve()

    def set_fitted(
        self, metric: tip.Metric | None, values: Tensor | None, fitted: Fitted | None, factory: str | None = None
    ) -> None:
        """Set the metric and the values, and rebuild the FAISS index over the transformed keys.

        ``factory`` defaults to the current type. Raises UsageError if the factory is invalid.
        """
        changed = self.metric is not None or metric is not None
        self.metric, self.fitted, self.scores = metric, fitted, None
        self.rows = self.rows.fitted(metric, values, factory, self.device)
        if isinstance(self.rows, ArrayRows) and (changed or factory not in (None, self.index_type)):
            self.rows = self.rows.indexed(len(self.class_names), factory, self.device)
        self._follow()

    def keep_parts(self, kept: Sequence[int]) -> None:
        """Drop all encoders except those at the given positions. The metric and the values are dropped as well.

        The keys must be in memory. Raises InputError if they were fine-tuned.
        """
        if self.curve is not None:
            raise InputError("encoders: the keys of this index were fine-tuned; keep all encoders")
        rows, ends = self.rows.in_memory(), np.cumsum([part.width for part in self.parts])[:-1]
        keys, text = (np.split(np.asarray(part), ends, axis=1) for part in (rows.keys, self.text_weights.cpu()))
        unit = functional.normalize
        self.text_weights = torch.from_numpy(text_side_by_side([unit(torch.from_numpy(text[i])).numpy() for i in kept]))
        left = side_by_side([keys[i] * len(self.parts) ** 0.5 for i in kept]).astype(self.dtype)
        self.metric = self.fitted = self.prior = self.scores = None
        self.parts = tuple(self.parts[i] for i in kept)
        if [part.column for part in self.parts] == ["feature"]:
            self.backbone, self.parts = self.parts[0].identity, ()
        self.settings = self.settings.unfitted()
        self.set_rows(ArrayRows(left, rows.labels))

    def _hold(self, rows: Rows) -> None:
        """Replace the rows, solve the values again, and fill the FAISS index with the new keys."""
        if isinstance(rows, ArrayRows):
            rows = rows if self._ridge is None else self._ridge.solved(rows)
            rows = rows.refilled(self.rows.index, len(self.class_names), self.device)
        self.rows, self.scores = rows, None
        self._follow()

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return an index in memory that consists of the keys at the given rows of the labels. Rows may repeat.

        If there are too few keys for the type of the index, the new index is ``Flat``. Raises UsageError if there are
        too many keys.
        """
        class_ids = self.rows.class_ids[rows]
        part = self._on_device(self.rows.take(np.asarray(rows)[np.argsort(class_ids, kind="stable")]))
        part = part if self._ridge is None else self._ridge.solved(part)
        with suppress(UsageError):
            part = replace(part, index=self.rows.index).indexed(len(self.class_names), device=self.device)
        return replace(self, rows=part)

    def in_memory(self) -> Self:
        """Return this index with all keys in memory. Raises UsageError if there are too many."""
        if isinstance(self.rows, ArrayRows):
            return self
        same = replace(self, rows=self.rows.in_memory())
        same.scores = self.scores
        return same

    def set_rows(self, rows: Rows) -> None:
        """Replace the rows by rows with the same keys, in memory or in a table."""
        self.rows = rows
        self.__post_init__(FLAT_FACTORY)
