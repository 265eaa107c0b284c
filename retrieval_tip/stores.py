"""Where an index is kept: in a folder, or in a LanceDB table with objects beside it. Both answer to one protocol."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip import cache_model, store, table_model
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.key_table import VERSION
from retrieval_tip.keys import KEY_BLOCK, index_over
from retrieval_tip.manifest import Manifest
from retrieval_tip.objects import Address
from retrieval_tip.segments import runs
from retrieval_tip.table_model import TableModel
from retrieval_tip.table_store import TableStore

Place = str | os.PathLike[str] | Address
"""A folder, or the address of a LanceDB store: ``lance://PATH``, ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``."""
Model = CacheModel | TableModel
SETTINGS = ("alpha", "beta", "logit_scale", "k", "tail", "temperature", "templates", "backbone")
"""What an index has beside its keys, labels and classes."""


@dataclass
class Change:
    """An index in the making: ``what`` is said of it in its history, and nothing is written where it stays empty."""

    cache: Model
    what: str = ""


class Store(Protocol):
    """The versions of one index, of which readers see one whole, and writers make the next one alone.

    Errors are StoreError: it is not there, is damaged, is being written, or cannot be written. What fails, or is killed
    at any moment, changes nothing.
    """

    def __str__(self) -> str:
        """The folder or address."""

    def exists(self) -> bool:
        """Whether there is an index (in whatever state)."""

    def manifest(self, version: int | None = None) -> Manifest:
        """The current version, or an earlier one."""

    def load(
        self, *, device: str = "auto", precision: str = "auto", verify: str = "full", version: int | None = None
    ) -> Model:
        """The current version, or an earlier one, opened."""

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""

    def change(self, verify: str = "full") -> AbstractContextManager[Change]:
        """The current version, alone, to become the next one, unless nothing is said of it."""

    def verify(self) -> Model:
        """Check every byte, or every row, of the current version, and that its parts fit together."""

    def history(self) -> pa.Table:
        """The versions that are kept, oldest first: a table of :data:`labels.VERSIONS_SCHEMA`."""

    def describe(self) -> dict[str, Any]:
        """What ``index info`` prints."""

    def query(self, sql: str, predictions: Path | None = None) -> pa.Table:
        """The answer of a SELECT over the label store (:func:`store.query`)."""

    def rollback(self, version: int | None = None) -> int:
        """Make an earlier version, by default the one before, the content of a new one; returns the current version."""

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Give up all versions but the last ``keep``: versions, bytes that are free now."""


@dataclass(frozen=True)
class FolderStore:
    """An index folder: see :mod:`store`."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        """Whether the folder holds an index."""
        return store.is_index(self.folder)

    def manifest(self, version: int | None = None) -> Manifest:
        """The current version, or an earlier one."""
        return store.read_manifest(self.folder) if version is None else store.read_version(self.folder, version)

    def load(
        self, *, device: str = "auto", precision: str = "auto", verify: str = "full", version: int | None = None
    ) -> CacheModel:
        """See :meth:`CacheModel.load`."""
        return CacheModel.load(self.folder, device=device, precision=precision, verify=verify, version=version)

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""
        return store.has_text(self.folder, manifest)

    @contextmanager
    def change(self, verify: str = "full") -> Iterator[Change]:
        """The current version, to become the next one. What is copied from it is checked in any case."""
        store.read_manifest(self.folder)  # where there is no index, nothing is made
        with store.write(self.folder) as writer:
            check = store.Check(self.folder, writer.parent, verify)
            cache = CacheModel.load(self.folder, device="cpu", precision="float32", check=check)
            change = Change(cache)
            yield change
            if change.what:
                cache.commit(writer, change.what)

    def verify(self) -> CacheModel:
        """Check every byte of every kept version, and that the parts of the current one fit together."""
        return cache_model.verify(self.folder)

    def history(self) -> pa.Table:
        """The versions that are kept, oldest first."""
        return store.history(self.folder)

    def describe(self) -> dict[str, Any]:
        """What ``index info`` prints."""
        return store.describe(self.folder)

    def query(self, sql: str, predictions: Path | None = None) -> pa.Table:
        """The answer of a SELECT over the label store."""
        return store.query(self.folder, sql, predictions)

    def rollback(self, version: int | None = None) -> int:
        """Make an earlier version the content of a new one."""
        place = self.folder
        store.read_manifest(place)
        with store.write(place) as writer:
            current = writer.parent
            assert current is not None
            wanted = version if version is not None else current.parent
            if wanted is None:
                raise StoreError(f"{place}: has no version before {current.version}")
            if wanted == current.version:
                return current.version
            old = store.read_version(place, wanted)
            store.Check(place, old).wait()
            found = dataclasses.replace(
                old,
                version=current.version + 1,
                parent=current.version,
                next_key_id=max(store.next_key_id(place, manifest) for manifest in (old, current)),
                change=f"rollback to version {wanted}",
                **store.stamp(),
            )
            writer.commit(found)
        return found.version

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Give up all versions but the last ``keep``."""
        return store.collect(self.folder, keep)


class LanceStore(TableStore):
    """A LanceDB table with objects beside it: see :mod:`table_store`."""

    def load(
        self,
        *,
        device: str = "auto",
        precision: str = "auto",
        verify: str = "full",
        version: int | None = None,
    ) -> TableModel:
        """See :meth:`TableModel.load`; products are float32, and rows are checked by :meth:`verify` only."""
        del precision, verify
        return TableModel.load(self, device=device, version=version)

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""
        return bool(self.classes(manifest).text.any())

    @contextmanager
    def change(self, verify: str = "full") -> Iterator[Change]:
        """The current version, to become the next one."""
        del verify
        self.manifest()  # where there is no index, nothing is made
        with self.write() as writer:
            cache = TableModel.changing(writer)
            change = Change(cache)
            yield change
            if change.what:
                cache.commit(change.what)

    def verify(self) -> TableModel:
        """Check every row of the current version, and that its parts fit together."""
        return table_model.verify(self)


def at(place: Place) -> FolderStore | LanceStore:
    """The store at a folder or an address, whether there is an index or not. Raises UsageError for a wrong address."""
    if isinstance(place, Address):
        return LanceStore(place)
    address = Address.parse(place) if isinstance(place, str) else None
    return FolderStore(Path(place)) if address is None else LanceStore(address)


def copy(model: Model, target: FolderStore | LanceStore, what: str) -> int:
    """Write an opened index to a place that has none; returns its version. ``what`` is said of it in its history.

    Raises InputError for trained values or encoders, which a LanceDB store does not keep; StoreError as
    :func:`store.write`.
    """
    if isinstance(target, FolderStore):
        return _copy_to_folder(model, target.folder, what)
    if isinstance(model, CacheModel) and (model.values is not None or model.tuned is not None):
        raise InputError(
            f"{target}: a LanceDB store keeps no trained values and no trained encoder; keep this index in a folder"
        )
    with target.write() as writer:
        text = model.text_weights.cpu().numpy()
        found = TableModel.create(writer, _stored_blocks(model), model.class_names, text, model.dtype)
        for name in SETTINGS:
            setattr(found, name, getattr(model, name))
        found.provenance = {**model.provenance, "index": found.provenance["index"]}
        assert model.next_key_id is not None
        found.next_key_id = model.next_key_id
        found.commit(what)
    return writer.number


def _stored_blocks(model: Model) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
    """Labels, and keys as they are stored, some at a time."""
    if isinstance(model, TableModel):
        yield from ((labels.drop_columns([VERSION]), keys) for labels, keys in model.stored_blocks())
        return
    for part in runs(model.keys, KEY_BLOCK):
        yield model.labels.slice(part.start, part.stop - part.start), model.keys[part]


def _copy_to_folder(model: Model, folder: Path, what: str) -> int:
    if isinstance(model, TableModel):
        labels = model.labels.drop_columns([VERSION])
        with store.write(folder) as writer:
            order = np.lexsort((labels["key_id"].to_numpy(), labels["class_id"].to_numpy()))
            place = np.empty(len(order), dtype=np.int64)
            key_ids = labels["key_id"].to_numpy()
            by_id = np.argsort(key_ids)
            place[order] = np.arange(len(order))
            staged, array = writer.stage_array("keys", (model.n, model.d), model.dtype)
            for part, keys in model.stored_blocks():
                rows = by_id[np.searchsorted(key_ids[by_id], part["key_id"].to_numpy())]
                array[place[rows]] = keys
            array.flush()  # type: ignore[attr-defined]  # a memmap
            del array
            keys = np.load(writer.seal("keys", staged, model.n), mmap_mode="c")
            labels = labels.take(pa.array(order))
            ids = labels["class_id"].to_numpy().astype(np.int64)
            cache = CacheModel(
                keys=keys,
                labels=labels,
                class_names=model.class_names,
                text_weights=model.text_weights,
                index=index_over(keys, ids, len(model.class_names), "Flat", "cpu"),
                next_key_id=model.next_key_id,
                **{name: getattr(model, name) for name in (*SETTINGS, "provenance")},
            )
            cache.commit(writer, what)
            assert cache.version is not None
            return cache.version
    model.save(folder, what)
    assert model.version is not None
    return model.version
