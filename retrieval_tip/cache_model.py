"""The product: a cache of keys that answers and is edited in memory, and is kept in an index folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.answering import AnsweringIndex, EditableIndex, manifest_of, spread
from retrieval_tip.backbones.base import Identity, resolve_device
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.files import real
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.defaults import Statistics, measure
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.keys import (
    KEY_BLOCK,
    Keys,
    auto_for,
    beside,
    index_over,
    points_of,
)
from retrieval_tip.retrieval.labelled_keys import LabelledKeys
from retrieval_tip.retrieval.logits import IndexRetrieval, slices
from retrieval_tip.retrieval.ridge import MOST_SOLVED, Ridge
from retrieval_tip.retrieval.segments import KeyArray, Segments, joined, runs, segments_of
from retrieval_tip.retrieval.vector_index import VectorIndex
from retrieval_tip.settings import Built, Dtype, Fitted, Precision, Settings, Verify
from retrieval_tip.store.contents import Contents, Stored
from retrieval_tip.store.folder import Check, check_earlier, opened, read_manifest, read_version
from retrieval_tip.store.labels import label_table, labelled_digests, rows_with
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.writer import Writer, write

T = TypeVar("T", bound="CacheModel")

SUMS_FROM = 8
"""Sums are kept on disk where the keys take so many times their bytes: those of fewer are made again at once."""


class KeyEdits(EditableIndex):
    """The edits of keys in memory: keys, labels, points, values, sums and the index change together.

    ``keys`` ``[n, d]``, ``labels``, ``points`` and ``values`` are those of :class:`CacheModel`; ``sums``, if they are
    known, follow the keys through every edit. Edits are on disk after :meth:`CacheModel.save`.
    """

    keys: KeyArray | Segments
    points: KeyArray | Segments | None
    class_ids: Tensor
    index: VectorIndex
    sums: Sums | None
    precision: Precision
    _keys: Keys
    _stored: Stored | None

    @property
    def n(self) -> int:
        return int(self.keys.shape[0])

    @property
    def d(self) -> int:
        return int(self.keys.shape[1])

    @property
    def dtype(self) -> Dtype:
        return "float16" if self.keys.dtype == np.float16 else "float32"

    @property
    def met(self) -> KeyArray | Segments:
        """The keys as queries meet them: their points in the metric, or the keys themselves."""
        return self.keys if self.points is None else self.points

    def _with_points(self) -> KeyArray | Segments:
        """The points of all keys: those that are known, which are of the first segments, and the others anew."""
        known = [] if self.points is None else list(segments_of(self.points))
        late = [points_of(self.metric, part, self.device) for part in segments_of(self.keys)[len(known) :]]
        return joined([*known, *(part for part in late if part is not None)])

    @property
    def segments(self) -> int:
        """Number of segments of the keys; the index is over the first one."""
        return len(segments_of(self.keys))

    @property
    def _labelled(self) -> LabelledKeys:
        return LabelledKeys(self.keys, self.labels, self.values, self.points)

    @property
    def _ridge(self) -> Ridge | None:
        """The solver that keeps values right as keys come and go; ``None`` where values were not solved."""
        if self.fitted is None or self.fitted.ridge is None:
            return None
        return Ridge(len(self.class_names), self.settings.beta, self.fitted.ridge, self.device)

    def _index_over(self, keys: KeyArray | Segments, class_ids: npt.NDArray[np.int64]) -> VectorIndex:
        """An index like this one, as tuned as it is, over other keys."""
        index = index_over(keys, class_ids, len(self.class_names), self.index.factory, self.device)
        index.effort = self.index.effort
        return index

    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        names, weights = inputs.new_classes(names, self.class_names, text_weights, self.d, self.has_text)
        self.class_names = [*self.class_names, *names]
        self.text_weights = torch.cat([self.text_weights, weights.to(self.text_weights)])
        if self.values is not None:
            self.values = torch.nn.functional.pad(self.values, (0, len(names)))
        if self.sums is not None:
            self.sums = self.sums.widened(len(self.class_names))
        self._follow()

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
        """See :meth:`answering.EditableIndex.add`. The cost depends on what is added.

        The keys become a segment of their own, beside the index over the others. Segments that are not larger are
        joined with it, so there are few; once they hold as many keys as the index, it is built again (:meth:`compact`).
        A cache with values has one segment. Solved values are solved again, or, of very many keys, only those of the
        new ones (:class:`ridge.Ridge`); among trained values a new key gives 1 to its own class.
        """
        matrix, ids = inputs.keys_to_add(keys, labels, self.class_names, self.d, self.dtype)
        assert self.next_key_id is not None
        key_ids = np.arange(self.next_key_id, self.next_key_id + len(matrix))
        added = label_table(self.class_names, ids, sources, key_ids=key_ids, views=views, digests=digests, extra=extra)
        matrix = np.asarray(matrix).astype(self.dtype)
        points = points_of(self.metric, matrix, self.device)
        self.check_lengths(matrix if points is None else points)
        values = None
        if self.values is not None and self._ridge is not None:
            values = self._ridge.added(self._keys, self.values, matrix if points is None else points, ids)
        elif self.values is not None:
            values = functional.one_hot(torch.from_numpy(ids), len(self.class_names)).to(self.values)
        sums = None if self.sums is None else self.sums.added(matrix, ids)
        self._hold(self._labelled.with_added(LabelledKeys(matrix, added, values, points), len(self.class_names)), sums)
        self.next_key_id += len(matrix)
        return key_ids.tolist()

    def remove(self, key_ids: Sequence[int]) -> None:
        """See :meth:`answering.EditableIndex.remove`. What holds a key is written again."""
        labelled = self._labelled
        gone = labelled.rows_of(key_ids)
        if len(gone) == self.n:
            raise InputError("remove: an index needs at least one key; give up the folder instead")
        if len(gone):
            sums = None if self.sums is None else self.sums.removed(*labelled.of_rows(gone))
            if sums is not None and self.sums is not None and not sums.outweighs(self.sums):
                sums = None  # the next fit makes them anew
            self._hold(labelled.without(gone), sums)

    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        """See :meth:`answering.EditableIndex.relabel`. Solved values are solved again."""
        labelled, wanted = self._labelled, inputs.new_ids(key_ids, labels, self.class_names)
        rows = labelled.rows_of(list(wanted))
        class_ids = np.array([wanted[key_id] for key_id in labelled.key_ids[rows].tolist()], dtype=np.int64)
        moved = labelled.class_ids[rows] != class_ids
        rows, class_ids = rows[moved], class_ids[moved]
        if not len(rows):
            return
        sums = None if self.sums is None else self.sums.moved(*labelled.of_rows(rows), class_ids)
        if self._ridge is not None:
            labelled = self._ridge.relabelled(self._keys, labelled, rows, class_ids)
        self._hold(labelled.relabelled(rows, class_ids, self.class_names), sums)

    def rename(self, old: str, new: str) -> None:
        """See :meth:`answering.EditableIndex.rename`. The keys are not written again."""
        class_id, names = inputs.renamed(self.class_names, old, new)
        if len(names) < len(self.class_names):
            self._merge(class_id, new, names)
            return
        self.class_names = names
        own = pc.equal(self.labels["class_id"], class_id)
        column = pc.if_else(own, new, self.labels["label"])
        self.labels = self.labels.set_column(self.labels.column_names.index("label"), "label", column)
        self._stored = None if self._stored is None else replace(self._stored, named=False)
        self._follow()

    def _merge(self, class_id: int, into: str, names: list[str]) -> None:
        """Give the keys of a class to the class ``into``, and drop it; ``names`` are those of the other classes."""
        if self.values is not None:  # what keys give to the two adds up; solved values are linear in their targets
            self.values = self.values.clone()
            self.values[:, self.class_names.index(into)] += self.values[:, class_id]
        self.relabel(self.find([self.class_names[class_id]])["key_id"].to_pylist(), into)
        kept = np.delete(np.arange(len(self.class_names)), class_id)
        self.class_names, self.text_weights = names, self.text_weights[kept]
        self.values = None if self.values is None else self.values[:, kept]
        self.sums = None if self.sums is None else self.sums.without(class_id)
        ids = self.labels["class_id"].to_numpy()
        moved = pa.array(ids - (ids > class_id), self.labels.schema.field("class_id").type)
        self.labels = self.labels.set_column(self.labels.column_names.index("class_id"), "class_id", moved)
        self._stored = None if self._stored is None else replace(self._stored, named=False)
        first = segments_of(self.met)[0]
        if self.index.by_class:
            self.index = self._index_over(first, self._labelled.class_ids[: len(first)])
        self._follow()

    def solve(self) -> None:
        """Solve all values again, for the present keys and beta. Does nothing unless they were solved.

        Raises InputError, and changes nothing, for more than :data:`MOST_SOLVED` keys.
        """
        if self._ridge is None:
            return
        if self.n > MOST_SOLVED:
            raise InputError(
                f"values of {self.n:,} keys are too many to be solved again, at most {MOST_SOLVED:,}; "
                "fit the index instead (retrieval-tip fit)"
            )
        points = np.asarray(self.met, dtype=np.float32)
        self.values = self._ridge.values(torch.from_numpy(points).to(self.device), self.class_ids)

    def compact(self, factory: str | None = None, dtype: Dtype | None = None, *, again: bool = False) -> None:
        """Make all keys one segment, and build the index over them. On disk after :meth:`CacheModel.save`.

        ``factory`` is the type of the index (``auto`` by :func:`keys.auto_for`, which sets ``k`` too) and ``dtype``
        that of the keys, float32 or float16, if they are to change. With another dtype, or ``again``, points and
        solved values are made of the keys again, and the next fit makes the sums. Raises UsageError for a factory that
        cannot work, InputError if keys are too large for the dtype; then nothing was changed.
        """
        settings = self.settings
        if factory == "auto":
            factory, k = auto_for(self.keys.shape, dtype or self.dtype, len(self.class_names), self.device)
            settings = replace(settings, k=k)
        ordered = self._labelled.take(self._labelled.order())
        again = again or (dtype is not None and ordered.keys.dtype != dtype)
        if again:
            with np.errstate(over="ignore"):  # refused just below
                keys = np.asarray(ordered.keys).astype(dtype or self.dtype)
            if not np.isfinite(keys).all():
                raise InputError(f"keys: hold values too large for {keys.dtype}")
            ordered = replace(ordered, keys=keys, points=points_of(self.metric, keys, self.device))
        if factory is None or factory == self.index.factory:
            index = self._index_over(ordered.met, ordered.class_ids)
        else:
            index = index_over(ordered.met, ordered.class_ids, len(self.class_names), factory, self.device)
        self._take(ordered)
        self.index, self.settings, self.sums = index, settings, None if again else self.sums
        self._follow()
        if again and self.n <= MOST_SOLVED:
            self.solve()

    def set_fitted(
        self, metric: tip.Metric | None, values: Tensor | None, fitted: Fitted | None, factory: str | None = None
    ) -> None:
        """Take a metric, values ``[n, c]`` and how they were ``fitted``, with the index over the points then.

        All keys have to be one segment. ``factory`` is the type of the index, by default what it is. On disk after
        :meth:`CacheModel.save`. Raises UsageError for a factory that cannot work.
        """
        moved = self.metric is not None or metric is not None
        self.metric, self.values, self.fitted = metric, values, fitted
        self.points = None
        self.points = None if metric is None else self._with_points()
        class_ids = self.class_ids.cpu().numpy()
        if factory is not None and factory != self.index.factory:
            self.index = index_over(self.met, class_ids, len(self.class_names), factory, self.device)
        elif moved:
            self.index = self._index_over(self.met, class_ids)
        self._follow()

    def _take(self, labelled: LabelledKeys) -> None:
        self.keys, self.labels = labelled.keys, labelled.labels
        self.values, self.points = labelled.values, labelled.points

    def _hold(self, labelled: LabelledKeys, sums: Sums | None) -> None:
        """Take these keys and their sums: the index stays where its segment does, else it is built over the first."""
        labelled = labelled if self._ridge is None else self._ridge.solved(labelled)
        first, *late = segments_of(labelled.met)
        if first is not segments_of(self.met)[0]:
            self.index = self._index_over(first, labelled.class_ids[: len(first)])
        elif not late:
            self.index = self.index.bare()
        self._take(labelled)
        self.sums = sums
        self._follow()

    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        self.templates, self.text_weights = list(templates), torch.from_numpy(weights).to(self.device)

    def _follow(self) -> None:
        """Bring up to date what follows from the keys, their labels, the classes and the text weights."""
        class_ids = self.labels["class_id"].to_numpy().astype(np.int64)
        c, (base, *late) = len(self.class_names), segments_of(self.met)
        if not self.index.by_class and self.index.indexed != len(base):
            raise InputError(f"index: is over {self.index.indexed} vectors, the first segment has {len(base)} keys")
        if late or (self.index.by_class and self.index.indexed < c):
            counts = np.bincount(class_ids[: len(base)], minlength=c)
            self.index = beside(self.index, late, class_ids[len(base) :], counts)
        means = self.index.vectors if self.index.by_class and self.index.exact_affinity else None
        self._keys = Keys(self.met, class_ids, c, self.device, self.precision, means)
        self.class_ids = self._keys.class_ids
        if self.next_key_id is None:
            self.next_key_id = int(pc.max(self.labels["key_id"]).as_py()) + 1


@dataclass
class CacheModel(KeyEdits):
    """Tip-Adapter's cache as a searchable index: keys in memory, or mapped to it, that answer and are edited.

    Make one with :meth:`from_features` or :meth:`load`; :meth:`save` writes the next version of its folder.

    ``keys`` ``[n, d]`` float32 or float16, grouped by class, or segments that each are (keys that were added since the
    ``index`` was built over the first of them); ``labels`` describes them, row by row; ``text_weights`` ``[c, d]``
    float32. ``settings`` are those that calls answer by; ``precision`` is that of the products with all keys
    (:class:`keys.Keys`). ``class_ids`` ``[n]`` int64, on the device, repeats what ``labels`` say.

    What was ``fitted`` to the shots (:mod:`fit.closed_form`), or trained: a ``metric``, and the ``points`` ``phi(K)``
    that queries then meet in place of the keys, of their dtype and in their segments; ``values`` ``[n, c]`` float32, on
    the device, what each key gives to each class in place of 1 to its own (:class:`tip.Values`); ``tuned``, the
    safetensors file of the fine-tuned encoder that the features come from; ``curve``, the loss curve of the training, a
    row an epoch.

    ``sums`` are those that the metric is fitted from, where they are known: they follow the keys through every change
    that is made here, and a copy of other keys has none.

    ``folder`` and ``version`` say which version of which index folder this is, ``next_key_id`` from where on key ids
    were never given, ``built`` how it was built.

    Change ``values``, or ``keys`` and the ``index`` over them, of a copy, with ``dataclasses.replace``, never in
    their place; points that are not given follow from the keys. Raises InputError for values of another shape or a
    curve without rows.
    """

    keys: KeyArray | Segments
    labels: pa.Table
    class_names: list[str]
    text_weights: Tensor
    index: VectorIndex
    settings: Settings = field(default_factory=Settings)
    templates: list[str] = field(default_factory=list)
    backbone: Identity | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    version: int | None = None
    values: Tensor | None = None
    tuned: Path | None = None
    curve: pa.Table | None = None
    precision: Precision = "float32"
    folder: Path | None = None
    next_key_id: int | None = None
    metric: tip.Metric | None = None
    points: KeyArray | Segments | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)

    def __post_init__(self) -> None:
        self._stored: Stored | None = None
        self.sums: Sums | None = None
        self.text_weights = self.text_weights.to(self.device)
        if self.metric is not None:
            self.metric = self.metric.to(self.device)
            self.points = self._with_points()
        self._follow()
        if self.values is not None:
            inputs.check_shape("values", self.values.shape, (self.n, len(self.class_names)), "one row a key")
            self.values = self.values.detach().to(self.device, torch.float32)
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; give one an epoch, or None")

    __repr__ = AnsweringIndex.__repr__  # not the dataclass's

    @property
    def retrieval(self) -> IndexRetrieval:
        return IndexRetrieval(
            keys=self._keys,
            index=self.index,
            text_weights=self.text_weights,
            values=self.values,
            settings=self.settings,
            metric=self.metric,
        )

    @property
    def index_type(self) -> str:
        return self.index.factory

    @property
    def exact_search(self) -> bool:
        return self.index.exact_search

    @classmethod
    def from_features(
        cls,
        keys: Features,
        labels: Labels,
        class_names: Sequence[str],
        text_weights: Features | None = None,
        *,
        settings: Settings | None = None,
        index: str = "Flat",
        device: str = "auto",
        sources: Sequence[str] | None = None,
        values: Features | None = None,
        precision: Precision = "float32",
    ) -> Self:
        """A classifier from features that are already at hand.

        Args:
            keys: ``[n, d]`` floating-point features of the shots. They are not normalised here: give unit vectors,
                unless they were fine-tuned.
            labels: class of each key, as a name or as a position in ``class_names``.
            class_names: the ``c`` classes in order; a class may have no key.
            text_weights: ``[c, d]`` unit vectors; ``None`` leaves the decision to the cache alone.
            settings: what calls answer by; by default the paper's.
            index: FAISS factory string: ``Flat``, ``IVF256,Flat``, ``HNSW32``, ``SQfp16`` ...; ``Classes`` for whole
                classes; ``auto`` by :func:`keys.auto_for`, which sets ``k`` too.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sources: path or id of each key, for explanations.
            values: ``[n, c]`` what each key gives to each class, trained; ``None`` is 1 to its own class.
            precision: of the products with all keys: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (measured).

        Raises:
            InputError: shapes that do not fit, values that are not finite, labels that are no class.
            UsageError: alpha, beta, device, index or precision that cannot work.
        """
        matrix = inputs.matrix(keys, "keys")
        names = inputs.names(class_names)
        ids = inputs.ids_of(labels, names, len(matrix))
        device = resolve_device(device)
        if sources is not None and len(sources) != len(ids):
            raise InputError(f"sources: {len(sources)} for {len(ids)} keys")
        order = np.argsort(ids, kind="stable")
        table = label_table(names, ids[order], None if sources is None else [sources[i] for i in order], key_ids=order)
        ordered = np.ascontiguousarray(matrix[order])
        settings = Settings() if settings is None else settings
        factory = index
        if index == "auto":
            factory, k = auto_for(matrix.shape, matrix.dtype, len(names), device)
            settings = replace(settings, k=k)
        weights = inputs.text_weights(text_weights, len(names), matrix.shape[1])
        return cls(
            keys=ordered,
            labels=table,
            class_names=names,
            text_weights=weights,
            index=index_over(ordered, ids[order], len(names), factory, device),
            settings=settings,
            device=device,
            values=None if values is None else inputs.values_of(values, len(ids), len(names))[order],
            precision=precision,
        )

    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        return self.labels.select(list(columns)).take(pa.array(rows))

    def every_row(self) -> npt.NDArray[np.int64]:
        return np.arange(self.n)

    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        rows = spread(self.n, m)
        return np.asarray(self.keys[rows]), self.described(rows, ["key_id", "class_id"])

    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], KeyArray]]:
        every = self.labels["class_id"].to_numpy().astype(np.int64)
        rows = np.flatnonzero(np.isin(every, class_ids))
        for part in slices(len(rows), KEY_BLOCK):
            yield every[rows[part]], np.asarray(self.keys[rows[part]])

    def stored_blocks(self) -> Iterator[tuple[pa.Table, KeyArray]]:
        for part in runs(self.keys, KEY_BLOCK):
            yield self.labels.slice(part.start, part.stop - part.start), self.keys[part]

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        return rows_with(self.labels, labels, source, key_ids)

    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        return labelled_digests(self.labels, digests)

    def statistics(self) -> Statistics | None:
        return measure(self.met, self.class_ids.cpu().numpy())

    def exact_logits(self, features: Features) -> Tensor:
        """Return logits ``[q, c]`` in float64 over all keys, with solved or trained values.

        Such values cancel each other, so in float32 the last digits depend on which queries share a batch. Errors as
        for :meth:`AnsweringIndex.logits`.
        """
        terms = self.retrieval.double().terms(self._queries(features).double())
        self._check(terms)
        return terms.logits(self.settings)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """The ``k`` nearest keys of queries ``[q, d]`` on the device: affinities and rows, ``[q, k]`` each.

        Affinities are to the keys themselves, also where the index holds a compressed copy; an empty slot has row -1.
        """
        retrieval = self.retrieval
        near = retrieval.nearest(retrieval.points(features), k)
        return near.affinity, near.rows.cpu().numpy()

    def whole(self) -> Self:
        """The same classifier with all keys in one segment; itself, where they are."""
        return self if self.segments == 1 else self.take(self._labelled.order())

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """A classifier over some of the keys, by row (a row may repeat); everything else is this one's.

        So few that the index's type cannot hold them are compared with every query (``Flat``).
        """
        grouped = np.asarray(rows)[np.argsort(self._labelled.class_ids[rows], kind="stable")]
        part = self._labelled.take(grouped)
        part = part if self._ridge is None else self._ridge.solved(part)
        try:
            index = self._index_over(part.met, part.class_ids)
        except UsageError:
            index = index_over(part.met, part.class_ids, len(self.class_names), "Flat", self.device)
        return replace(
            self,
            keys=part.keys,
            labels=part.labels,
            values=part.values,
            points=part.points,
            index=index,
            version=None,
            folder=None,
        )

    @property
    def place(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    @property
    def manifest(self) -> Manifest | None:
        return None if self._stored is None else self._stored.manifest

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify = "full",
        check: Check | None = None,
        version: int | None = None,
    ) -> Self:
        """Open the current version of an index folder, or an earlier ``version``; its files are checked first.

        ``precision`` is that of the products with all keys, by default the fastest that is accurate enough here
        (:meth:`keys.Keys.products`); ``float32`` answers alike everywhere, to its rounding. ``verify`` ``full``
        compares every file with its digest, ``fast`` large ones with their size only; ``check`` is that check where it
        was begun before, and its version is opened. Keys and values stay on disk, memory-mapped. Where a writer gives
        up the version meanwhile, the one that is current then is opened. Raises StoreError naming the file that is
        missing, damaged, does not fit the manifest, or is of a newer format.
        """
        place, device = Path(folder), resolve_device(device)
        if version is None:
            cache, check = opened(
                place, lambda manifest: _opened(cls, place, manifest, device, precision), verify=verify, check=check
            )
        else:
            check = Check(place, read_version(place, version), verify)
            check.wait()
            cache = _opened(cls, place, check.manifest, device, precision)
        cache._stored = Stored.of(check, _contents(cache))
        return cache

    def in_memory(self) -> Self:
        return self

    def on(self, device: str, precision: Precision) -> Self:
        """Return this saved version on another device, with products of another precision. No file is hashed again."""
        assert self._stored is not None
        if device == self.device:
            self.precision = precision
            self._follow()
            return self
        return type(self).load(self._stored.check.folder, device=device, precision=precision, check=self._stored.check)

    def reload(self) -> Self:
        """The current version of the folder that this was loaded from or saved to; itself, where this is that.

        Files that both versions share are not hashed again. Settings that were changed here, but not saved, are not
        taken over. Raises StoreError as :meth:`load`, UsageError where there is no folder.
        """
        if self.folder is None or self._stored is None:
            raise UsageError("reload: this classifier was neither loaded from a folder nor saved to one")
        manifest, before = read_manifest(self.folder), self._stored
        if manifest == before.manifest:
            return self
        check = Check(self.folder, manifest, before.check.verify, set(before.manifest.data_files))
        return type(self).load(self.folder, device=self.device, precision=self.precision, check=check)

    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write a new version of an index folder (the first one, where there is none). See :func:`writer.write`.

        Files of the version that this was loaded from are shared, not written again. ``change`` is what its history
        says of it. Raises StoreError where the folder cannot be written, has changed since this was loaded from it, or
        ``tuned`` is no safetensors file; InputError for what a version cannot hold. After either nothing was changed.
        """
        with write(Path(folder)) as writer:
            own = self.folder is not None and real(self.folder) == real(writer.folder)
            if writer.parent is not None and own and self.version is not None:
                _check_current(self, writer)
            self.commit(writer, change)

    def save_settings(self, folder: str | os.PathLike[str], change: str = "change settings") -> None:
        """Write the settings and their provenance as a new version of the folder this was loaded from.

        No data file is written again: all are that version's. Raises StoreError where the index has changed since it
        was loaded.
        """
        with write(Path(folder)) as writer:
            _check_current(self, writer)
            writer.keep_all()
            check = _commit(self, writer, change)
            self._stored = Stored(
                check, None if self._stored is None else self._stored.contents
            )  # which files still hold

    def commit(self, writer: Writer, change: str) -> None:
        """Write what the version before does not have, and make this the current version.

        ``change`` says in a few words what it is. Keys that the writer has already are not written again; ``tuned`` is
        copied, by content, and is the copy from then on. Errors as for :meth:`save`.
        """
        contents = _contents(self).write(writer, self._stored)
        self.tuned = contents.weights
        self._stored = Stored.of(_commit(self, writer, change), contents)


def _opened(cls: type[T], place: Path, manifest: Manifest, device: str, precision: Precision) -> T:
    """Return the classifier that a version of a folder holds."""
    contents, files, c = Contents.read(place, manifest), manifest.files, len(manifest.class_names)
    path, half = place / files["index"].name, manifest.dtype == "float16"
    index = VectorIndex.load(path, manifest.index, device, half)
    if index.d != manifest.d or not (index.indexed <= c if index.by_class else index.indexed == files["keys"].rows):
        raise StoreError(f"{path}: does not fit the manifest; build the index again")
    cache = cls(
        keys=joined(contents.segments),
        labels=contents.labels,
        class_names=manifest.class_names,
        text_weights=torch.from_numpy(contents.text),
        index=index,
        settings=manifest.settings,
        templates=manifest.templates,
        backbone=Identity.from_dict(manifest.backbone) if manifest.backbone else None,
        provenance=manifest.provenance,
        device=device,
        version=manifest.version,
        values=None if contents.values is None else torch.from_numpy(contents.values),
        tuned=contents.weights,
        curve=contents.curve,
        precision=precision,
        folder=place,
        next_key_id=manifest.next_key_id,
        metric=contents.metric,
        points=contents.points,
        fitted=manifest.fitted,
        built=manifest.built,
    )
    cache.sums = contents.sums
    return cache


def _contents(cache: CacheModel) -> Contents:
    sums = cache.sums
    return Contents(
        segments=segments_of(cache.keys),
        labels=cache.labels,
        text=cache.text_weights,
        values=cache.values,
        curve=cache.curve,
        weights=cache.tuned,
        index=cache.index,
        metric=cache.metric,
        points=None if cache.points is None else segments_of(cache.points)[0],
        sums=sums if sums is not None and sums.nbytes * SUMS_FROM <= cache.keys.nbytes else None,
    )


def _check_current(cache: CacheModel, writer: Writer) -> None:
    """Raise StoreError unless the current version is the one that the cache was loaded from."""
    current = writer.parent.version if writer.parent else None
    if current is None or current != cache.version:
        raise StoreError(
            f"{writer.folder}: is at version {current}, not at {cache.version} as when it was opened; try again"
        )


def _commit(cache: CacheModel, writer: Writer, change: str) -> Check:
    """Write the manifest that makes this the current version. Returns a check that has nothing left to look at.

    Raises as :meth:`answering.AnsweringIndex.check_answers`.
    """
    cache.check_answers()
    number = writer.parent.version + 1 if writer.parent else 1
    manifest = manifest_of(cache, number, writer.parent, change, writer.files, later=writer.later)
    writer.commit(manifest)
    cache.version, cache.folder = manifest.version, writer.folder
    return Check(writer.folder, manifest, known=manifest.data_files)


def verify(folder: str | os.PathLike[str]) -> CacheModel:
    """Check an index folder thoroughly: every byte of every kept version, and that its parts fit together.

    Raises StoreError naming the file that is damaged or does not fit. Returns the opened index.
    """
    place = Path(folder)
    cache = CacheModel.load(place, device="cpu")
    check_earlier(place)
    if not torch.isfinite(cache.text_weights).all():
        raise StoreError(f"{place}: text weights that are not finite; build the index again")
    if cache.values is not None and not torch.isfinite(cache.values).all():
        raise StoreError(f"{place}: values that are not finite; fit again, or go back to the version before")
    blocks = ((cache.keys[part], cache.class_ids.numpy()[part]) for part in runs(cache.keys, KEY_BLOCK))
    if cache.sums is not None and not cache.sums.are_of(blocks):
        raise StoreError(f"{place}: sums that are not of these keys; index rebuild leaves them out, and fit makes them")
    vectors = cache.met
    if cache.index.by_class:  # not those that the index itself holds
        vectors = Keys(cache.met, cache.class_ids.numpy(), len(cache.class_names)).means.numpy()
    sample = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 256)).astype(int))
    queries = np.ascontiguousarray(vectors[sample], dtype=np.float32)
    if not np.isfinite(queries).all():
        raise StoreError(f"{place}: keys that are not finite; build the index again")
    affinity, rows = cache.index.search(queries, 1)
    if cache.index.exact_affinity:
        own = np.einsum("qd,qd->q", queries, vectors[np.maximum(rows[:, 0], 0)], dtype=np.float64)
        if not np.allclose(affinity[:, 0], own, rtol=1e-3, atol=1e-3):
            raise StoreError(f"{place}: the FAISS index is not over these keys; build the index again")
    return cache
