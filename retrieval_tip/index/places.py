"""The places of an index: a folder, or a LanceDB table with objects beside it. Both answer to one protocol."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from retrieval_tip.errors import InputError, StoreError, show
from retrieval_tip.files import real
from retrieval_tip.lance.address import Address
from retrieval_tip.lance.versions import LanceVersions
from retrieval_tip.settings import Dtype, Precision, Verify
from retrieval_tip.store import folder as store
from retrieval_tip.store import history
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import TIMEOUT
from retrieval_tip.store.writer import Writer, collect, write

if TYPE_CHECKING:  # what is asked of a manifest has no need of torch, which takes a second
    from retrieval_tip.cache_model import CacheModel
    from retrieval_tip.lance.draft import LanceDraft
    from retrieval_tip.lance.lance_model import LanceModel

    Model = CacheModel | LanceModel
    Draft = CacheModel | LanceDraft

Place = str | os.PathLike[str] | Address
"""A folder, or the address of a LanceDB store: ``lance://PATH``, ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``."""


@dataclass
class Change:
    """An index in the making: ``what`` is said of it in its history, and nothing is written where it stays empty."""

    cache: Draft
    what: str = ""


class Store(Protocol):
    """The versions of one index, of which readers see one whole, and writers make the next one alone.

    ``local`` is the folder on this machine that it lies in, ``None`` in a bucket; ``look_every`` the seconds between
    two looks of a server for another version. Errors are StoreError: it is not there, is damaged, is being written, or
    cannot be written. What fails, or is killed at any moment, changes nothing.
    """

    local: Path | None
    look_every: float

    def __str__(self) -> str:
        """The folder or address."""

    @property
    def resolved(self) -> str:
        """A text that is the same for the same place."""
        return str(self) if self.local is None else str(real(self.local))

    @property
    def name(self) -> str:
        """The last part of the folder or address."""
        return self.resolved.rpartition("/")[2] if self.local is None else Path(self.resolved).name

    def exists(self) -> bool:
        """Whether there is an index (in whatever state)."""

    def stamp(self) -> Hashable | None:
        """A value that changes with the current version, found without asking a service; ``None``: there is none.

        Where only asking tells, it changes always.
        """

    def manifest(self, version: int | None = None) -> Manifest:
        """The current version, or an earlier one."""

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify = "full",
        version: int | None = None,
    ) -> Model:
        """The current version, or an earlier one, opened."""

    def load_whole(self) -> CacheModel:
        """The current version, opened as one array of keys on the CPU. Raises UsageError where they are too many."""

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""

    def write(self, wait: float | None = None) -> AbstractContextManager[Any]:
        """The next version, to be made alone: another writer waits its turn, ``wait`` seconds."""

    def change(self, verify: Verify = "full") -> AbstractContextManager[Change]:
        """The current version, alone, to become the next one, unless nothing is said of it."""

    def rebuild(self, cache: Any, index: str | None, dtype: Dtype | None) -> None:
        """Build what is to become the next version anew from its keys, as another type or dtype."""

    def verify(self) -> Model:
        """Check every byte, or every row, of the current version, and that its parts fit together."""

    def check(self, manifest: Manifest) -> None:
        """Check that a version can be made current again."""

    def next_key_id(self, manifest: Manifest) -> int:
        """The first key id that was not given up to a version."""
        return manifest.next_key_id or 0

    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store of a version."""

    def history(self) -> pa.Table:
        """The versions that are kept, oldest first: a table of :data:`labels.VERSIONS_SCHEMA`."""

    def describe(self) -> dict[str, Any]:
        """The facts that ``index info`` prints."""

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """The answer of a SELECT over the label store (:func:`folder.query`)."""

    def rollback(self, version: int | None = None) -> int:
        """Make an earlier version, by default the one before, the content of a new one; returns the current version."""
        self.manifest()  # where there is no index, nothing is made
        with self.write() as writer:
            current = writer.parent or self.manifest()
            wanted = version if version is not None else current.parent
            if wanted is None:
                raise StoreError(f"{self}: has no version before {current.version}")
            if wanted == current.version:
                return current.version
            old = self.manifest(wanted)
            self.check(old)
            following = max(self.next_key_id(manifest) for manifest in (old, current))
            writer.commit(history.renewed(old, current, following, history.stamp()))
            return current.version + 1

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Give up all versions but the last ``keep``: versions, bytes that are free now."""


class FolderStore(Store):
    """An index folder: see :mod:`store.folder`."""

    look_every = 0.0

    def __init__(self, folder: Path) -> None:
        self.folder = self.local = folder

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        return store.is_index(self.folder)

    def stamp(self) -> Hashable | None:
        try:
            status = (self.folder / "manifest.json").stat()  # which each version replaces
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def manifest(self, version: int | None = None) -> Manifest:
        return store.read_manifest(self.folder) if version is None else store.read_version(self.folder, version)

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify = "full",
        version: int | None = None,
    ) -> CacheModel:
        check = store.Check(self.folder, verify=verify) if version is None else None  # while torch is imported
        from retrieval_tip.cache_model import CacheModel

        how: dict[str, Any] = {"precision": precision, "verify": verify, "check": check, "version": version}
        return CacheModel.load(self.folder, device=device, **how)

    def load_whole(self) -> CacheModel:
        return self.load(device="cpu", precision="float32")

    def has_text(self, manifest: Manifest) -> bool:
        return store.has_text(self.folder, manifest)

    def write(self, wait: float | None = None) -> AbstractContextManager[Writer]:
        return write(self.folder, wait)

    @contextmanager
    def change(self, verify: Verify = "full") -> Iterator[Change]:
        """The current version, to become the next one. What is copied from it is checked in any case."""
        from retrieval_tip.cache_model import CacheModel

        store.read_manifest(self.folder)  # where there is no index, nothing is made
        with write(self.folder) as writer:
            check = store.Check(self.folder, writer.parent, verify)
            cache = CacheModel.load(self.folder, device="cpu", precision="float32", check=check)
            change = Change(cache)
            yield change
            if change.what:
                cache.commit(writer, change.what)

    def rebuild(self, cache: Any, index: str | None, dtype: Dtype | None) -> None:
        cache.compact(index, dtype, again=True)

    def verify(self) -> CacheModel:
        """Check every byte of every kept version, and that the parts of the current one fit together."""
        from retrieval_tip.cache_model import verify

        return verify(self.folder)

    def check(self, manifest: Manifest) -> None:
        store.Check(self.folder, manifest).wait()

    def next_key_id(self, manifest: Manifest) -> int:
        return store.next_key_id(self.folder, manifest)

    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        return store.read_labels(self.folder, manifest).select(list(columns))

    def history(self) -> pa.Table:
        return store.history(self.folder)

    def describe(self) -> dict[str, Any]:
        return store.describe(self.folder)

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        return store.query(self.folder, sql, predictions, timeout)

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        return collect(self.folder, keep)


class LanceStore(LanceVersions, Store):
    """A LanceDB table with objects beside it: see :mod:`lance.versions`."""

    look_every = 2.0

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self.local = address.local

    def stamp(self) -> Hashable:
        return time.monotonic_ns()

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify = "full",
        version: int | None = None,
    ) -> LanceModel:
        """See :meth:`LanceModel.load`; products are float32, and rows are checked by :meth:`verify` only."""
        from retrieval_tip.lance.lance_model import LanceModel

        del precision, verify
        return LanceModel.load(self, device=device, version=version)

    def load_whole(self) -> CacheModel:
        model = self.load(device="cpu")
        return model.take(np.arange(model.n))

    def has_text(self, manifest: Manifest) -> bool:
        return bool(self.classes(manifest).text.any())

    @contextmanager
    def change(self, verify: Verify = "full") -> Iterator[Change]:
        from retrieval_tip.lance.draft import LanceDraft

        del verify
        self.manifest()  # where there is no index, nothing is made
        with self.write() as writer:
            cache = LanceDraft.changing(writer)
            change = Change(cache)
            yield change
            if change.what:
                cache.commit(change.what)

    def rebuild(self, cache: Any, index: str | None, dtype: Dtype | None) -> None:
        cache.rewrite(index, dtype)

    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        return self.table(manifest).read(columns)

    def verify(self) -> LanceModel:
        """Check every row of the current version, that its parts fit together, and the objects of earlier ones."""
        from retrieval_tip.lance.lance_model import verify

        return verify(self)

    def check(self, manifest: Manifest) -> None:
        from retrieval_tip.lance.lance_model import check

        check(self, manifest, set())


def listed(folder: Path) -> list[tuple[str, Manifest]]:
    """The index folders directly in a folder, in name order: path and current version of each.

    What is no index, or a damaged one, is left out. Raises InputError where there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{show(folder)}: no such folder; give the one that holds indexes")
    found = []
    for place in sorted(folder.iterdir()):
        with suppress(StoreError):
            if store.is_index(place):
                found.append((show(place), store.read_manifest(place)))
    return found


def at(place: Place) -> FolderStore | LanceStore:
    """The store at a folder or an address, whether there is an index or not. Raises UsageError for a wrong address."""
    if isinstance(place, os.PathLike):
        return FolderStore(Path(place))
    address = Address.parse(str(place))
    return FolderStore(Path(str(place))) if address is None else LanceStore(address)
