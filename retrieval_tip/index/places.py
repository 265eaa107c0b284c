"""Where an index is kept: in a folder, or in a LanceDB table with objects beside it. Both answer to one protocol."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from retrieval_tip.errors import StoreError
from retrieval_tip.lance.objects import Address
from retrieval_tip.lance.versions import TableStore
from retrieval_tip.store import folder as store
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import TIMEOUT

if TYPE_CHECKING:  # what is asked of a manifest has no need of torch, which takes a second
    from retrieval_tip.cache_model import CacheModel
    from retrieval_tip.lance.lance_model import TableModel

    Model = CacheModel | TableModel

Place = str | os.PathLike[str] | Address
"""A folder, or the address of a LanceDB store: ``lance://PATH``, ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``."""


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

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
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
        from retrieval_tip.cache_model import CacheModel

        return CacheModel.load(self.folder, device=device, precision=precision, verify=verify, version=version)

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""
        return store.has_text(self.folder, manifest)

    @contextmanager
    def change(self, verify: str = "full") -> Iterator[Change]:
        """The current version, to become the next one. What is copied from it is checked in any case."""
        from retrieval_tip.cache_model import CacheModel

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
        from retrieval_tip.cache_model import verify

        return verify(self.folder)

    def history(self) -> pa.Table:
        """The versions that are kept, oldest first."""
        return store.history(self.folder)

    def describe(self) -> dict[str, Any]:
        """What ``index info`` prints."""
        return store.describe(self.folder)

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """The answer of a SELECT over the label store."""
        return store.query(self.folder, sql, predictions, timeout)

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
        from retrieval_tip.lance.lance_model import TableModel

        del precision, verify
        return TableModel.load(self, device=device, version=version)

    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""
        return bool(self.classes(manifest).text.any())

    @contextmanager
    def change(self, verify: str = "full") -> Iterator[Change]:
        """The current version, to become the next one."""
        from retrieval_tip.lance.lance_model import TableModel

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
        from retrieval_tip.lance.lance_model import verify

        return verify(self)


def at(place: Place) -> FolderStore | LanceStore:
    """The store at a folder or an address, whether there is an index or not. Raises UsageError for a wrong address."""
    if isinstance(place, Address):
        return LanceStore(place)
    address = Address.parse(place) if isinstance(place, str) else None
    return FolderStore(Path(place)) if address is None else LanceStore(address)
