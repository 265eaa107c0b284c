"""An index that holds its keys in memory. You can classify with it, edit it, and save it to an index folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.answering import AnsweringIndex, EditableIndex, manifest_of
from retrieval_tip.backbones.base import Identity, present, resolve_device
from retrieval_tip.data.shots import spread
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.files import real
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.retrieval.defaults import Statistics, measure
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys, auto_for, index_over, points_of
from retrieval_tip.retrieval.labelled_keys import LabelledKeys
from retrieval_tip.retrieval.logits import Retrieval, slices
from retrieval_tip.retrieval.ridge import MOST_SOLVED, Ridge
from retrieval_tip.retrieval.vector_index import FLAT_FACTORY, VectorIndex
from retrieval_tip.settings import Built, Dtype, Fitted, Precision, Settings, Verify
from retrieval_tip.store.contents import Contents, Stored
from retrieval_tip.store.folder import Check, check_earlier, opened, read_manifest, read_version
from retrieval_tip.store.labels import label_table, rows_with
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.writer import Writer, write

T = TypeVar("T", bound="CacheModel")

SUMS_FROM = 8
"""The sums are only saved if they are at most an eighth of the size of the keys. Otherwise, a fit recomputes them."""


class KeyEdits(EditableIndex):
    """Methods that edit keys in memory, and keep labels, points, values, sums and the FAISS index consistent.

    See :class:`CacheModel` for the attributes.
    """

    keys: KeyArray
    points: KeyArray | None
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
    def met(self) -> KeyArray:
        """The transformed keys if there is a metric, or the keys themselves."""
        return self.keys if self.points is None else self.points

    @property
    def _labelled(self) -> LabelledKeys:
        return LabelledKeys(self.keys, self.labels, self.values, self.points)

    @property
    def _ridge(self) -> Ridge | None:
        """The solver of the values, or ``None`` if they were not solved."""
        fitted = self.fitted
        if fitted is None or fitted.ridge is None:
            return None
        c, beta, bonus = len(self.class_names), self.settings.beta, fitted.bonus
        return Ridge(c, beta, fitted.ridge, self.device, fitted.class_prior, bonus)

    def _index_over(self, keys: KeyArray, class_ids: npt.NDArray[np.int64], factory: str | None = None) -> VectorIndex:
        """Build a FAISS index over other keys, with the current type and search effort by default."""
        wanted = self.index.factory if factory is None else factory
        index = index_over(keys, class_ids, len(self.class_names), wanted, self.device)
        if wanted == self.index.factory:
            index.effort = self.index.effort
        return index

    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        names, weights = inputs.new_classes(names, self.class_names, text_weights, self.d, self.has_text)
        self.class_names = [*self.class_names, *names]
        self.text_weights = torch.cat([self.text_weights, weights.to(self.text_weights)])
        if self.values is not None:
            self.values = functional.pad(self.values, (0, len(names)))
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
        """Add keys (see :meth:`answering.EditableIndex.add`).

        If the values were solved, they are solved again. In a large index, only the values of the new keys are solved
        (see :class:`ridge.Ridge`). If the values were trained, the new keys get one-hot rows.
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
        labelled = self._labelled
        gone = labelled.rows_of(key_ids)
        if len(gone) == self.n:
            raise InputError("remove: an index needs at least one key; delete the folder instead")
        if len(gone):
            sums = None if self.sums is None else self.sums.removed(*labelled.of_rows(gone))
            if sums is not None and self.sums is not None and not sums.outweighs(self.sums):
                sums = None  # rounding errors have become too large, so the next fit recomputes the sums
            self._hold(labelled.without(gone), sums)

    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
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
        class_id, names = inputs.renamed(self.class_names, old, new)
        if len(names) < len(self.class_names):
            self._merge(class_id, new)
            return
        self.class_names = names
        own = pc.equal(self.labels["class_id"], class_id)
        column = pc.if_else(own, new, self.labels["label"])
        self.labels = self.labels.set_column(self.labels.column_names.index("label"), "label", column)
        self._follow()

    def _merge(self, class_id: int, into: str) -> None:
        """Move the keys of a class to the class ``into``, and drop the class."""
        if self.values is not None:  # the columns can be added, because solved values are linear in their targets
            place, counts, self.values = self.class_names.index(into), self.counts, self.values.clone()
            with_keys = [own for own in (class_id, place) if counts[own]]
            self.values[:, place] = self.values[:, with_keys or [place]].sum(1)
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
        kept = np.delete(np.arange(len(self.class_names)), class_ids)
        self.class_names, self.text_weights = [self.class_names[i] for i in kept], self.text_weights[kept]
        self.values = None if self.values is None else self.values[:, kept]
        self.sums = None if self.sums is None else self.sums.without(class_ids)
        ids = np.searchsorted(kept, self.labels["class_id"].to_numpy())
        moved = pa.array(ids, self.labels.schema.field("class_id").type)
        self.labels = self.labels.set_column(self.labels.column_names.index("class_id"), "class_id", moved)
        if self.index.by_class:
            self.index = self._index_over(self.met, self._labelled.class_ids)
        self._follow()

    def solve(self) -> None:
        """Recompute solved values for the current keys and beta. Does nothing if the values were not solved.

        If there are more than :data:`MOST_SOLVED` keys, raises InputError and leaves the index unchanged.
        """
        if self._ridge is None:
            return
        if self.n > MOST_SOLVED:
            raise InputError(
                f"values: cannot be solved for {self.n:,} keys, because the limit is {MOST_SOLVED:,}; "
                "fit the index instead (retrieval-tip fit)"
            )
        points = np.asarray(self.met, dtype=np.float32)
        self.values = self._ridge.values(torch.from_numpy(points).to(self.device), self.class_ids)

    def rebuild(self, factory: str | None = None, dtype: Dtype | None = None) -> None:
        """Sort the keys, and recompute the points, the solved values and the FAISS index.

        Args:
            factory: the new type of the index. If it is ``auto``, :func:`keys.auto_for` selects the type and ``k``.
                Defaults to the current type.
            dtype: the new type of the keys, float32 or float16. Defaults to the current type.

        Raises:
            UsageError: if the factory is invalid.
            InputError: if the keys are too large for the dtype.
        """
        settings = self.settings
        if factory == "auto":
            factory, k = auto_for(self.keys.shape, dtype or self.dtype, len(self.class_names), self.device)
            settings = replace(settings, k=k)
        ordered = self._labelled.take(self._labelled.order())
        with np.errstate(over="ignore"):  # overflow becomes infinity, which raises an error below
            keys = ordered.keys.astype(dtype or self.dtype)
        if not np.isfinite(keys).all():
            raise InputError(f"keys: values too large for {keys.dtype}; use float32")
        ordered = replace(ordered, keys=keys, points=points_of(self.metric, keys, self.device))
        index = self._index_over(ordered.met, ordered.class_ids, factory)
        self._take(ordered)
        self.index, self.settings, self.sums = index, settings, None
        self._follow()
        if self.n <= MOST_SOLVED:
            self.solve()

    def set_fitted(
        self, metric: tip.Metric | None, values: Tensor | None, fitted: Fitted | None, factory: str | None = None
    ) -> None:
        """Set the metric and the values, and rebuild the FAISS index over the transformed keys.

        ``factory`` defaults to the current type. Raises UsageError if the factory is invalid.
        """
        moved = self.metric is not None or metric is not None
        self.metric, self.values, self.fitted = metric, values, fitted
        self.points = points_of(metric, self.keys, self.device)
        if moved or factory not in (None, self.index.factory):
            self.index = self._index_over(self.met, self.class_ids.cpu().numpy(), factory)
        self._follow()

    def _take(self, labelled: LabelledKeys) -> None:
        self.keys, self.labels = labelled.keys, labelled.labels
        self.values, self.points = labelled.values, labelled.points

    def _hold(self, labelled: LabelledKeys, sums: Sums | None) -> None:
        """Replace the keys and their sums, and fill the FAISS index with the new keys.

        The index is only trained again once the number of keys has doubled.
        """
        labelled = labelled if self._ridge is None else self._ridge.solved(labelled)
        if self.index.by_class or len(labelled.keys) >= 2 * self.index.trained:
            self.index = self._index_over(labelled.met, labelled.class_ids)
        else:
            self.index = self.index.refilled(labelled.met)
        self._take(labelled)
        self.sums = sums
        self._follow()

    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        self.templates, self.text_weights = list(templates), torch.from_numpy(weights).to(self.device)

    def _follow(self) -> None:
        class_ids = self.labels["class_id"].to_numpy().astype(np.int64)
        c = len(self.class_names)
        if self.index.by_class and self.index.n < c:
            self.index = self._index_over(self.met, class_ids)
        self._keys = Keys(self.met, class_ids, c, self.device, self.precision, self.index)
        self.class_ids = self._keys.class_ids
        if self.next_key_id is None:
            self.next_key_id = int(pc.max(self.labels["key_id"]).as_py()) + 1


class SourceVersion(Protocol):
    """The version of another kind of store that an index in memory was read from."""

    @property
    def place(self) -> str:
        """The address of the store."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the version."""

    def reload(self, index: AnsweringIndex) -> AnsweringIndex:
        """See :meth:`answering.AnsweringIndex.reload`."""


@dataclass
class CacheModel(KeyEdits):
    """The cache of Tip-Adapter as an index that you can search and edit. The keys are in memory or memory-mapped.

    Create an index with :meth:`from_features` or :meth:`load`. To change the contents, use the methods, or call
    ``dataclasses.replace``. Do not modify the arrays in place.

    Attributes:
        keys: the keys as a float32 or float16 array of shape ``[n, d]``, grouped by class.
        labels: the label store, which has one row per key.
        class_names: the names of the ``c`` classes, in order.
        text_weights: the text weights as a float32 tensor of shape ``[c, d]``. If the index has no text, they are zero.
        index: the FAISS index over the keys or, if there is a metric, over the points.
        settings: the defaults for every call.
        values: the solved or trained values as a float32 tensor of shape ``[n, c]`` on the device (see
            :class:`tip.Values`), or ``None`` if values are one-hot.
        metric: the fitted metric, or ``None``.
        points: the transformed keys ``phi(K)``, in the same dtype as ``keys``. If you do not pass them, they are
            computed.
        fitted: a description of how the metric and the values were fitted (see :mod:`fit.closed_form`), or ``None``.
        curve: the loss curve of the training, which has one row per epoch.
        precision: the dtype that is used to multiply queries with all keys (see :class:`keys.Keys`).
        class_ids: the class ids as an int64 tensor of shape ``[n]`` on the device, derived from ``labels``.
        sums: the sums that are needed to fit a metric, if known. Edits keep them up to date.
        prior: the scatter of other photos, of shape ``[d, d]``, if the index was fitted with one.
        folder: the index folder that this index was loaded from or saved to.
        version: the version number of this index in that folder.
        next_key_id: the smallest key id that has never been used.
        built: the options that the index was built with.

    Raises InputError if the values have the wrong shape, or if the curve has no rows.
    """

    keys: KeyArray
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
    curve: pa.Table | None = None
    precision: Precision = "float32"
    folder: Path | None = None
    next_key_id: int | None = None
    metric: tip.Metric | None = None
    points: KeyArray | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)

    def __post_init__(self) -> None:
        self._stored: Stored | None = None
        self.origin: SourceVersion | None = None
        self.sums: Sums | None = None
        self.prior: npt.NDArray[np.float32] | None = None
        self.text_weights = self.text_weights.to(self.device)
        if self.metric is not None:
            self.metric = self.metric.to(self.device)
            self.points = points_of(self.metric, self.keys, self.device) if self.points is None else self.points
        self._follow()
        if self.values is not None:
            inputs.check_shape("values", self.values.shape, (self.n, len(self.class_names)), "one row per key")
            self.values = self.values.detach().to(self.device, torch.float32)
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; pass one row per epoch, or None")

    __repr__ = AnsweringIndex.__repr__  # replaces the one that dataclass generates

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return the arrays without the folder, and without the sums, which the next fit computes again."""
        state = {own.name: getattr(self, own.name) for own in fields(self)}
        index = None if self.exact_search else self.index.to_array()  # an exact index is quick to build
        return state | {
            "keys": _in_memory(self.keys), "points": None if self.points is None else _in_memory(self.points),
            "text_weights": self.text_weights.cpu(), "values": None if self.values is None else self.values.cpu(),
            "metric": None if self.metric is None else self.metric.to("cpu"), "index": (self.index.factory, index),
            "prior": None if self.prior is None else np.array(self.prior), "folder": None, "version": None,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        (factory, stored), prior, device = state.pop("index"), state.pop("prior"), present(state.pop("device"))
        state |= {name: _writable(state[name]) for name in ("keys", "points") if state[name] is not None}
        met = state["keys"] if state["points"] is None else state["points"]
        if stored is None:
            index = VectorIndex.build(met, factory, device)
        else:
            index = VectorIndex.of_array(stored, factory, device, met.dtype == np.float16)
        self.__init__(**state, index=index, device=device)  # type: ignore[misc]
        self.prior = prior

    @property
    def retrieval(self) -> Retrieval:
        return Retrieval(
            keys=self._keys,
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
        """Create an index from precomputed features.

        Args:
            keys: the features of the shots, as a floating-point array of shape ``[n, d]``. They are not normalised, so
                make sure that they are unit vectors.
            labels: the class of each key, given by its name or by its position in ``class_names``.
            class_names: the names of the ``c`` classes, in order. A class may have no keys.
            text_weights: the text weights, as unit vectors of shape ``[c, d]``. If ``None``, only the cache is used.
            settings: the defaults for every call. By default, these are the settings of the paper.
            index: the FAISS factory string, for example ``Flat``, ``IVF256,Flat``, ``HNSW32`` or ``SQfp16``. You can
                also pass ``Classes`` for an index over class means, or ``auto`` to let :func:`keys.auto_for` select the
                type and ``k``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sources: the path or id of each key, which is shown with predictions.
            values: the trained values, of shape ``[n, c]``. Defaults to one-hot labels.
            precision: the dtype that is used to multiply queries with all keys (see :class:`keys.Keys`).

        Raises:
            InputError: if shapes do not match, if values are not finite, or if a label is not a class.
            UsageError: if alpha, beta, the device, the index or the precision is invalid.
        """
        matrix = inputs.matrix(keys, "keys")
        names = inputs.names(class_names)
        ids = inputs.ids_of(labels, names, len(matrix))
        device = resolve_device(device)
        if sources is not None and len(sources) != len(ids):
            raise InputError(f"sources: there are {len(sources)} sources for {len(ids)} keys; pass one source per key")
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
            keys=ordered, labels=table, class_names=names, text_weights=weights, settings=settings, device=device,
            index=index_over(ordered, ids[order], len(names), factory, device), precision=precision,
            values=None if values is None else inputs.values_of(values, len(ids), len(names))[order],
        )  # fmt: skip

    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        return self.labels.select(list(columns)).take(pa.array(rows))

    def every_row(self) -> npt.NDArray[np.int64]:
        return np.arange(self.n)

    def rows_of(self, key_ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows = np.flatnonzero(np.isin(self.labels["key_id"].to_numpy(), key_ids))
        return rows, self._labelled.class_ids[rows]

    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        rows = spread(self.n, m)
        return np.asarray(self.keys[rows]), self.described(rows, ["key_id", "class_id"])

    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], KeyArray]]:
        every = self.labels["class_id"].to_numpy().astype(np.int64)
        rows = np.flatnonzero(np.isin(every, class_ids))
        for part in slices(len(rows), KEY_BLOCK):
            yield every[rows[part]], np.asarray(self.keys[rows[part]])

    def stored_blocks(self) -> Iterator[tuple[pa.Table, KeyArray]]:
        for part in slices(self.n, KEY_BLOCK):
            yield self.labels.slice(part.start, KEY_BLOCK), self.keys[part]

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        return rows_with(self.labels, labels, source, key_ids)

    def having(self, column: Literal["digest", "source"], values: Iterable[str | None]) -> pa.Table:
        wanted = pa.array(set(values) - {None}, pa.string())
        return self.labels.filter(pc.is_in(self.labels[column], value_set=wanted))

    def keys_of(self, key_ids: npt.NDArray[np.int64]) -> KeyArray:
        own = self.labels["key_id"].to_numpy()
        order = np.argsort(own)
        return np.asarray(self.keys[order[np.searchsorted(own, key_ids, sorter=order)]])

    def statistics(self) -> Statistics | None:
        return measure(self.met, self.class_ids.cpu().numpy())

    def exact_logits(self, features: Features) -> Tensor:
        """Return logits over all keys, computed in float64. This is useful for solved or trained values.

        The contributions of such values partly cancel, so in float32 the rounding error depends on the batch.
        """
        terms = self.retrieval.double().terms(self._queries(features).double())
        return self._blended(terms)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Return the affinities and rows of the ``k`` nearest keys of each query, both of shape ``[q, k]``.

        The affinities are exact even if the index is compressed. Empty slots have row -1.
        """
        retrieval = self.retrieval
        near = retrieval.keys.nearest(retrieval.points(features), k)
        return near.affinity, near.rows.cpu().numpy()

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return an index that consists of the keys at the given rows. Rows may repeat.

        If there are too few keys for the type of the index, the new index is ``Flat``.
        """
        grouped = np.asarray(rows)[np.argsort(self._labelled.class_ids[rows], kind="stable")]
        part = self._labelled.take(grouped)
        part = part if self._ridge is None else self._ridge.solved(part)
        try:
            index = self._index_over(part.met, part.class_ids)
        except UsageError:
            index = self._index_over(part.met, part.class_ids, "Flat")
        return replace(
            self, keys=part.keys, labels=part.labels, values=part.values, points=part.points, index=index,
            version=None, folder=None,
        )  # fmt: skip

    @property
    def place(self) -> str | None:
        if self.origin is not None:
            return self.origin.place
        return None if self.folder is None else str(self.folder)

    @property
    def manifest(self) -> Manifest | None:
        stored = self.origin or self._stored
        return None if stored is None else stored.manifest

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
        """Open the current version of an index folder, or an earlier version.

        Keys and values are memory-mapped.

        Args:
            folder: the index folder.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: the dtype that is used to multiply queries with all keys (see :class:`keys.Keys`).
            verify: ``full`` to compare every file with its digest, or ``fast`` to compare only the size of large files.
            check: a check that has already been started. If it is given, the version under check is opened.
            version: the version number to open. Defaults to the current version.

        Raises StoreError if a file is missing or damaged, has a newer format, or does not match the manifest.
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
        """Return this version of the index on another device and in another precision.

        The index must have been saved.
        """
        assert self._stored is not None
        if device == self.device:
            self.precision = precision
            self._follow()
            return self
        return type(self).load(self._stored.check.folder, device=device, precision=precision, check=self._stored.check)

    def reload(self) -> AnsweringIndex:
        """Return the current version of the folder, or the index itself if it is up to date.

        Unsaved changes to the settings are lost. Raises UsageError if the index has no folder.
        """
        if self.origin is not None:
            return self.origin.reload(self)
        if self.folder is None or self._stored is None:
            raise UsageError("reload: the index has no folder; save it first")
        manifest, before = read_manifest(self.folder), self._stored
        if manifest == before.manifest:
            return self
        check = Check(self.folder, manifest, before.check.verify, set(before.manifest.data_files))
        return type(self).load(self.folder, device=self.device, precision=self.precision, check=check)

    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write the next version of an index folder, or the first version of a new folder (see :func:`writer.write`).

        Unchanged files are shared with the previous version. ``change`` describes the new version in the history.

        Raises:
            StoreError: if the folder cannot be written, or if it has changed since it was loaded.
            InputError: if the contents cannot be stored.
        """
        with write(Path(folder)) as writer:
            own = self.folder is not None and real(self.folder) == real(writer.folder)
            if writer.parent is not None and own and self.version is not None:
                _check_current(self, writer)
            self.commit(writer, change)

    def save_settings(self, folder: str | os.PathLike[str], change: str = "change settings") -> None:
        """Write only the settings and the provenance, as a new version that shares all data files.

        Later changes of the keys keep these settings (see :class:`settings.Fitted`). Raises StoreError if the folder
        has changed since it was loaded.
        """
        with write(Path(folder)) as writer:
            _check_current(self, writer)
            self.fitted = None if self.fitted is None else replace(self.fitted, automatic=False)
            if writer.parent is not None and writer.parent.later:
                self.commit(writer, change)
                return
            writer.keep_all()
            check = _commit(self, writer, change)
            self._stored = Stored(check, None if self._stored is None else self._stored.contents)

    def commit(self, writer: Writer, change: str) -> None:
        """Write the files that have changed, and make this index the current version."""
        contents = _contents(self)
        contents.write(writer, self._stored)
        self._stored = Stored.of(_commit(self, writer, change), contents)


def _in_memory(array: KeyArray) -> KeyArray:
    """Return an array that is not memory-mapped."""
    return np.array(array) if isinstance(array, np.memmap) else array


def _writable(array: KeyArray) -> KeyArray:
    """Return an array that torch accepts. In a process of joblib, it is mapped from a file that is read-only."""
    return np.require(array, requirements="W")


def _opened(cls: type[T], place: Path, manifest: Manifest, device: str, precision: Precision) -> T:
    contents = Contents.read(place, manifest)
    points = points_of(contents.metric, contents.keys, device) if contents.points is None else contents.points
    met = contents.keys if points is None else points
    index = _read_index(place, manifest, contents, met, device)
    cache = cls(
        keys=contents.keys, labels=contents.labels, class_names=manifest.class_names,
        text_weights=torch.from_numpy(contents.text), settings=manifest.settings,
        index=index,
        templates=manifest.templates, provenance=manifest.provenance, device=device, version=manifest.version,
        backbone=Identity.from_dict(manifest.backbone) if manifest.backbone else None,
        values=None if contents.values is None else torch.from_numpy(contents.values),
        curve=contents.curve, precision=precision, folder=place, next_key_id=manifest.next_key_id,
        metric=contents.metric, points=points, fitted=manifest.fitted, built=manifest.built,
    )  # fmt: skip
    cache.sums, cache.prior = contents.sums, contents.prior
    return cache


def _read_index(place: Path, manifest: Manifest, contents: Contents, met: KeyArray, device: str) -> VectorIndex:
    if manifest.index == FLAT_FACTORY:
        return VectorIndex.build(met, FLAT_FACTORY, device)
    file, c = manifest.files["index"], len(manifest.class_names)
    path, half = place / file.name, manifest.dtype == "float16"
    index = VectorIndex.load(path, manifest.index, device, half, file.rows)
    matches = index.n <= c if index.by_class else index.n == manifest.files["keys"].rows
    if index.d != manifest.d or not matches:
        raise StoreError(f"{path}: does not match the manifest; build the index again")
    if not manifest.later:
        return index
    if index.by_class:
        return index_over(met, contents.labels["class_id"].to_numpy().astype(np.int64), c, manifest.index, device)
    return index.refilled(met)


def _contents(cache: CacheModel) -> Contents:
    sums = cache.sums
    return Contents(
        keys=cache.keys,
        labels=cache.labels,
        text=cache.text_weights,
        values=cache.values,
        curve=cache.curve,
        index=None if cache.exact_search else cache.index,
        metric=cache.metric,
        points=cache.points,
        sums=sums if sums is not None and sums.nbytes * SUMS_FROM <= cache.keys.nbytes else None,
        prior=cache.prior,
    )


def _check_current(cache: CacheModel, writer: Writer) -> None:
    current = writer.parent.version if writer.parent else None
    if current is None or current != cache.version:
        raise StoreError(
            f"{writer.folder}: changed from version {cache.version} to {current} since it was opened; try again"
        )


def _commit(cache: CacheModel, writer: Writer, change: str) -> Check:
    """Write the manifest of this version, and return a check that is already complete."""
    cache.check_answers()
    number = writer.parent.version + 1 if writer.parent else 1
    manifest = manifest_of(cache, number, writer.parent, change, writer.files)
    writer.commit(manifest)
    cache.version, cache.folder = manifest.version, writer.folder
    return Check(writer.folder, manifest, known=manifest.data_files)


def verify(folder: str | os.PathLike[str]) -> CacheModel:
    """Verify every byte in all versions of an index folder, and check that the files are consistent.

    Returns the opened index. Raises StoreError if a file is damaged or does not match the others.
    """
    place = Path(folder)
    cache = CacheModel.load(place, device="cpu")
    check_earlier(place)
    if not torch.isfinite(cache.text_weights).all():
        raise StoreError(f"{place}: text weights are not finite; build the index again")
    if cache.values is not None and not torch.isfinite(cache.values).all():
        raise StoreError(f"{place}: values are not finite; fit again, or roll back to the previous version")
    blocks = ((cache.keys[part], cache.class_ids.numpy()[part]) for part in slices(cache.n, KEY_BLOCK))
    if cache.sums is not None and not cache.sums.are_of(blocks):
        raise StoreError(f"{place}: sums do not match the keys; run index rebuild, then fit")
    vectors = cache.met
    if cache.index.by_class:  # the means are recomputed, because those in the index may be damaged
        vectors = Keys(cache.met, cache.class_ids.numpy(), len(cache.class_names)).means.numpy()
    sample = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 256)).astype(int))
    queries = np.ascontiguousarray(vectors[sample], dtype=np.float32)
    if not np.isfinite(queries).all():
        raise StoreError(f"{place}: keys are not finite; build the index again")
    if not cache.exact_search:
        affinity, rows = cache.index.search(queries, 1)
    if not cache.exact_search and cache.index.exact_affinity:
        own = np.einsum("qd,qd->q", queries, vectors[np.maximum(rows[:, 0], 0)], dtype=np.float64)
        if not np.allclose(affinity[:, 0], own, rtol=1e-3, atol=1e-3):
            raise StoreError(f"{place}: the FAISS index does not match the keys; build the index again")
    return cache
