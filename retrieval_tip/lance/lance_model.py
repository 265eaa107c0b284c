"""Open a classifier whose keys are stored in a LanceDB table, on disk or in a bucket. The keys may not fit in memory.

The tail is computed from per-class statistics, and search results already include the keys and class ids. If a query
uses all keys, they are read block by block. Only an index with few keys can have solved values, because all of its keys
are then read into memory. The answers are the same as those of an index in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Identity, resolve_device
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.shots import spread
from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.lance.key_table import CLASSES, FLAT, POINT, RESTORE, ROW, VECTOR, VERSION, IntArray, KeyTable
from retrieval_tip.lance.lance_keys import LanceKeys
from retrieval_tip.lance.versions import Classes, LanceVersions
from retrieval_tip.retrieval.arrays import KeyArray
from retrieval_tip.retrieval.defaults import SAMPLE, Statistics, measure
from retrieval_tip.retrieval.keys import index_over, points_of
from retrieval_tip.retrieval.logits import Retrieval
from retrieval_tip.settings import Built, Dtype, Fitted, Settings
from retrieval_tip.store.contents import metric_of
from retrieval_tip.store.labels import rows_with
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.sums import LEAST, Along, Sums
from retrieval_tip.store.writer import write

MOST_TAKEN = 1 << 29
"""Maximum size in bytes of the keys that are copied from a table into an index in memory."""
MOVED = {"float32": 1e-4, "float16": 4e-3}
"""Tolerance for the difference between a stored and a computed point, by dtype."""
MOST_ORDERED = 1 << 26
"""Maximum number of keys to sample in the same order as in a folder. This reads up to 2 GiB of ids."""
IN_ORDER = [("class_id", "ascending"), ("key_id", "ascending")]
"""The order in which a folder stores its keys."""


@dataclass(repr=False, kw_only=True)
class LanceModel(AnsweringIndex):
    """A version of an index in LanceDB, opened read-only. Use :func:`load` to open a version.

    ``second`` is the sum of the keys' outer products, a float64 array of shape ``[d, d]``, or ``None`` if it is not
    known. ``prior`` is the scatter of other photos, if the index was fitted with one.
    """

    store: LanceVersions
    table: KeyTable
    classes: Classes
    dtype: Dtype = "float32"
    next_key_id: int = 0
    index_type: str = FLAT
    settings: Settings = field(default_factory=Settings)
    templates: list[str] = field(default_factory=list)
    backbone: Identity | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    built: Built = field(default_factory=Built)
    device: str = "cpu"
    manifest: Manifest | None = None
    version: int | None = None
    metric: tip.Metric | None = None
    fitted: Fitted | None = None
    second: npt.NDArray[np.float64] | None = None
    prior: npt.NDArray[np.float32] | None = None
    values: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.metric = None if self.metric is None else self.metric.to(self.device)
        self._follow()

    def _follow(self) -> None:
        self.__dict__.pop("labels", None)
        self.class_names = self.classes.names
        self.text_weights = torch.from_numpy(self.classes.text).to(self.device)
        self._keys = LanceKeys(self.table, self.classes, self.index_type, self.device)

    @classmethod
    def of(cls, place: LanceVersions, manifest: Manifest, table: KeyTable, device: str, **more: Any) -> Self:
        """Open a version without its values. ``table`` is the version of its table."""
        metric = place.array(manifest, "metric")
        return cls(
            store=place, table=table, classes=place.classes(manifest), dtype=manifest.dtype,
            next_key_id=manifest.next_key_id, index_type=manifest.index, settings=manifest.settings,
            templates=manifest.templates, backbone=Identity.from_dict(manifest.backbone) if manifest.backbone else None,
            provenance=manifest.provenance, built=manifest.built, device=device, manifest=manifest,
            version=manifest.version, metric=None if metric is None else metric_of(metric), fitted=manifest.fitted,
            second=place.array(manifest, "second"), prior=place.array(manifest, "prior"), **more,
        )  # fmt: skip

    def in_memory(self) -> CacheModel:
        self._check_taken(self.n)
        return self.keys_in_memory()

    @property
    def sums(self) -> Sums | None:
        """The sums for fitting a metric, or ``None`` if they are not known."""
        return None if self.second is None else Sums(self.classes.counts, self.classes.sums, self.second)

    def keys_in_memory(self) -> CacheModel:
        """Return an exact classifier with all keys in memory, in the same order as in a folder, but without values."""
        labels, keys = zip(*self.stored_blocks(), strict=True)
        table = pa.concat_tables(labels)
        class_ids = self.table.class_ids(table["class_id"], len(self.class_names))
        order = np.lexsort((table["key_id"].to_numpy(), class_ids))
        return self._in_memory(np.concatenate(keys)[order], table.take(pa.array(order)))

    @property
    def n(self) -> int:
        return self._keys.n

    @property
    def d(self) -> int:
        return self._keys.d

    @property
    def place(self) -> str:
        return str(self.store)

    @property
    def exact_search(self) -> bool:
        return self.index_type == FLAT

    @property
    def retrieval(self) -> Retrieval:
        return Retrieval(keys=self._keys, text_weights=self.text_weights, settings=self.settings, metric=self.metric)

    @cached_property
    def labels(self) -> pa.Table:
        """The label store as a table in memory, which takes about 150 bytes per key."""
        return self.table.read(self.table.label_columns)

    def reload(self) -> AnsweringIndex:
        return self if self.store.manifest() == self.manifest else load(self.store, self.device)

    def described(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        return self.table.take(rows, columns)

    def every_row(self) -> IntArray:
        rows: IntArray = torch.cat([rows for _, _, rows in self._keys.numbered_blocks()]).cpu().numpy()
        return rows

    def rows_of(self, key_ids: Sequence[int]) -> tuple[IntArray, IntArray]:
        found = list(self.table.scan_of("key_id", key_ids, ["class_id"], with_rows=True))
        none = np.empty(0, dtype=np.int64)
        rows, ids = (np.concatenate([none, *(batch[name].to_numpy() for batch in found)]) for name in (ROW, "class_id"))
        return rows.astype(np.int64), ids.astype(np.int64)

    def some(self, m: int) -> tuple[KeyArray, pa.Table]:
        some = self.table.offsets(spread(self.n, m), ["key_id", "class_id", VECTOR])
        return self.table.matrix(some[VECTOR]), some.select(["key_id", "class_id"])

    def of_classes(self, class_ids: IntArray) -> Iterator[tuple[IntArray, KeyArray]]:
        for batch in self.table.scan_of("class_id", class_ids.tolist(), ["class_id", VECTOR]):
            yield batch["class_id"].to_numpy().astype(np.int64), self.table.matrix(batch[VECTOR])

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        columns = self.table.label_columns
        if key_ids:
            rows = self.table.of_ids("key_id", list(dict.fromkeys(key_ids)), columns)
        elif labels:
            rows = self.table.of_ids("label", list(dict.fromkeys(labels)), columns)
        else:
            rows = self.table.read(columns)
        return rows_with(rows, labels, source) if labels or source else rows

    def having(self, column: Literal["digest", "source"], values: Iterable[str | None]) -> pa.Table:
        wanted = list(dict.fromkeys(value for value in values if value is not None))
        return self.table.of_ids(column, wanted, self.table.label_columns)

    def statistics(self) -> Statistics | None:
        """See :meth:`AnsweringIndex.statistics`. Small tables use the same sample as a folder."""
        chosen = np.arange(self.n)
        if self.n > SAMPLE:
            chosen = np.random.default_rng(0).choice(self.n, SAMPLE, replace=False)
            if self.n <= MOST_ORDERED:
                ids = self.table.read(["key_id", "class_id"])
                chosen = np.lexsort((ids["key_id"].to_numpy(), ids["class_id"].to_numpy()))[chosen]
            chosen = np.sort(chosen)
        some = self.table.offsets(chosen, ["class_id", self.table.met])
        sampled = measure(self.table.matrix(some[self.table.met]), some["class_id"].to_numpy().astype(np.int64))
        return None if sampled is None else replace(sampled, shots=self.n / int((self.classes.counts > 0).sum()))

    def take(self, rows: IntArray) -> CacheModel:
        self._check_taken(len(rows))
        labels = self.labels.take(pa.array(rows)).drop_columns([VERSION]).sort_by(IN_ORDER)
        return self._in_memory(self.keys_of(labels["key_id"].to_numpy()), labels)

    def _check_taken(self, n: int) -> None:
        if n * self.d * 4 > MOST_TAKEN:
            raise UsageError(
                f"{self.store}: {n:,} keys are too many to load into memory; choose fewer (--where), or copy the "
                f"index into a folder: retrieval-tip index clone {self.store} DIR"
            )

    def keys_of(self, key_ids: IntArray) -> KeyArray:
        some = self.table.of_ids("key_id", key_ids.tolist(), ["key_id", VECTOR])
        found = some["key_id"].to_numpy()
        order = np.argsort(found)
        keys: KeyArray = self.table.matrix(some[VECTOR])[order[np.searchsorted(found, key_ids, sorter=order)]]
        return keys

    def stored_blocks(self) -> Iterator[tuple[pa.Table, KeyArray]]:
        return self.blocks_of([name for name in self.table.label_columns if name != VERSION])

    def blocks_of(self, columns: Sequence[str]) -> Iterator[tuple[pa.Table, KeyArray]]:
        """Yield the given columns and the keys of all rows in blocks, in table order."""
        for batch in self.table.scan([*columns, VECTOR]):
            yield pa.Table.from_batches([batch]).drop_columns([VECTOR]), self.table.matrix(batch[VECTOR])

    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """See :meth:`AnsweringIndex.save`. The index in the folder has the type ``Flat``."""
        labels = self.labels.drop_columns([VERSION]).sort_by(IN_ORDER)
        places = np.argsort(labels["key_id"].to_numpy())
        key_ids = labels["key_id"].to_numpy()[places]
        with write(Path(folder)) as writer:
            staged, array = writer.stage_array("keys", (self.n, self.d), self.dtype)
            for part, keys in self.stored_blocks():
                array[places[np.searchsorted(key_ids, part["key_id"].to_numpy())]] = keys
            array.flush()  # type: ignore[attr-defined]  # a memmap
            del array
            keys = np.load(writer.seal("keys", staged, self.n), mmap_mode="c")
            self._in_memory(keys, labels).commit(writer, change)

    def _in_memory(self, keys: KeyArray, labels: pa.Table) -> CacheModel:
        ids, points = labels["class_id"].to_numpy().astype(np.int64), points_of(self.metric, keys, self.device)
        return CacheModel(
            keys=keys, labels=labels, class_names=self.class_names, text_weights=self.text_weights,
            index=index_over(keys if points is None else points, ids, len(self.class_names), FLAT, self.device),
            settings=self.settings, templates=self.templates, backbone=self.backbone, provenance=self.provenance,
            device=self.device, next_key_id=self.next_key_id, metric=self.metric, points=points, fitted=self.fitted,
            built=self.built,
        )  # fmt: skip


@dataclass(frozen=True)
class LanceOrigin:
    """The version of a store that an index in memory was read from."""

    store: LanceVersions
    manifest: Manifest

    @property
    def place(self) -> str:
        """The address of the store."""
        return str(self.store)

    def reload(self, index: AnsweringIndex) -> AnsweringIndex:
        """See :meth:`AnsweringIndex.reload`."""
        return index if self.store.manifest() == self.manifest else load(self.store, index.device)


def load(place: LanceVersions, device: str = "auto", version: int | None = None) -> AnsweringIndex:
    """Open the current version of a store, or an earlier version.

    If the values were solved, all keys are read into memory. This verifies the small files and the size of the table.
    Raises StoreError naming the part that is missing or damaged.
    """
    device = resolve_device(device)
    return place.opened(lambda manifest: _opened(place, manifest, device), version)


def _opened(place: LanceVersions, manifest: Manifest, device: str) -> AnsweringIndex:
    model = LanceModel.of(place, manifest, place.table(manifest), device)
    values = place.array(manifest, "values")
    return model if values is None else solved(model, values)


def solved(model: LanceModel, values: npt.NDArray[np.float32]) -> CacheModel:
    """Read all keys of a version into memory. ``values`` are their solved values, of shape ``[n, c]``, by key id."""
    assert model.manifest is not None
    cache = model.keys_in_memory()
    places = np.argsort(np.argsort(cache.labels["key_id"].to_numpy()))
    factory = CLASSES if model.index_type == CLASSES else FLAT
    index = index_over(cache.met, cache.class_ids.cpu().numpy(), len(cache.class_names), factory, model.device)
    cache = replace(cache, values=torch.from_numpy(values[places]), index=index, version=model.version)
    cache.sums, cache.prior, cache.origin = model.sums, model.prior, LanceOrigin(model.store, model.manifest)
    return cache


def verify(place: LanceVersions) -> AnsweringIndex:
    """Check every row of the current version and the files of all versions, and return the opened current version.

    In a bucket, only the objects of earlier versions are checked, not their rows. Raises StoreError naming the part
    that is damaged or inconsistent.
    """
    seen: set[tuple[str, str]] = set()
    index = place.opened(lambda manifest: check(place, manifest, seen))
    assert index.manifest is not None
    for old in place.earlier(index.manifest):
        try:
            place.check_objects(old)
            place.check_files(old, seen)
            place.table(old)
        except StoreError:
            if place.keeps(old):
                raise
    return index


def check(place: LanceVersions, manifest: Manifest, seen: set[tuple[str, str]]) -> AnsweringIndex:
    """Check every row and object of a version, check that they are consistent, and return the opened version.

    Files in ``seen`` are skipped, and all other files are added to ``seen``. Raises StoreError naming the part that is
    damaged or inconsistent.
    """
    place.check_files(manifest, seen)
    _check_rows(LanceModel.of(place, manifest, place.table(manifest), "cpu"))
    return _opened(place, manifest, "cpu")


def _check_rows(model: LanceModel) -> None:
    place, classes, c = model.store, model.classes, len(model.class_names)
    of_keys, of_points = Along(c, model.d, LEAST), Along(c, model.d, LEAST)
    for batch in model.table.scan(model.table.schema.names):
        ids, keys = model.table.class_ids(batch["class_id"], c), model.table.matrix(batch[VECTOR])
        of_keys.count(keys, ids)
        if model.table.has_points:
            points, expected = model.table.matrix(batch[POINT]), points_of(model.metric, keys, "cpu")
            if expected is None or not np.allclose(points, expected, atol=MOVED[model.dtype]):
                raise StoreError(f"{place}: points do not match their keys; run index rebuild")
            of_points.count(points, ids)
    fit = of_keys.has(classes.counts, classes.sums)
    if not fit or (classes.points is not None and not of_points.has(classes.counts, classes.points)):
        raise StoreError(f"{place}: keys do not match the sums of their classes; {RESTORE}")
    if model.second is not None and not of_keys.has_second(model.second):
        raise StoreError(f"{place}: keys do not match the sum of their products; fit the index again")
