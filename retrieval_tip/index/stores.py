"""Define the interface of a store, which keeps the versions of one index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import real
from retrieval_tip.settings import Dtype, Precision, Verify
from retrieval_tip.store import history
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import TIMEOUT

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.model import Index


class VersionWriter(Protocol):
    """A writer of the next version of an index. ``parent`` is the manifest of the version before it."""

    parent: Manifest | None

    def commit(self, manifest: Manifest) -> None:
        """Make the new version the current version."""


class Change:
    """A change of an index. Edit ``index``, and set ``what`` to a description for the history.

    If ``what`` is empty, no version is written. ``bare_before`` lists the classes that had no keys before the change.
    """

    what = ""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.bare_before = self.bare()

    def bare(self) -> list[str]:
        """Return the classes that have no keys now."""
        return [name for name, number in zip(self.index.class_names, self.index.counts, strict=True) if not number]

    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """Rebuild the index from its keys. ``None`` keeps the current index type or dtype."""
        self.index.rebuild(index, dtype)

    def refit(self, beta: float) -> FormChoice:
        """Refit a fitted index for a new beta with :func:`closed_form.refit`, including its solved values."""
        from retrieval_tip.fit import closed_form

        choice = closed_form.refit(self.index, beta)
        self.index.solve()
        return choice

    def fit(self, asked: Fit, validation: Queries | None = None) -> FormChoice:
        """Fit the index with :func:`closed_form.fit`."""
        from retrieval_tip.fit import closed_form

        return closed_form.fit(self.index, asked, validation=validation)


class Store(ABC):
    """A store that keeps the versions of one index. Readers see complete versions, and writers wait for each other.

    ``local`` is the folder on this machine, or ``None`` if the index is in a bucket. ``look_every`` is the number of
    seconds after which a server checks for a new version. Methods raise StoreError if the store is missing, damaged,
    locked or not writable. If an error occurs, the current version stays unchanged.
    """

    local: Path | None
    look_every: float = 0.0

    @abstractmethod
    def __str__(self) -> str:
        """Return the folder or the address of the store."""

    @property
    def resolved(self) -> str:
        """The folder or address in a canonical form, which is the same for every spelling."""
        return str(self) if self.local is None else str(real(self.local))

    @property
    def name(self) -> str:
        """Last component of the folder or address."""
        return self.resolved.rpartition("/")[2] if self.local is None else Path(self.resolved).name

    def movable(self) -> Path:
        """Return the real folder of an index that can be renamed, duplicated and deleted as a whole.

        Raises InputError for stores that are not index folders, and for links.
        """
        raise InputError(f"{self}: only index folders can be renamed, duplicated or deleted; use index clone")

    @abstractmethod
    def exists(self) -> bool:
        """Return whether the store contains an index, even a damaged one."""

    @abstractmethod
    def stamp(self) -> Hashable | None:
        """Return a value that changes with the current version, or ``None`` if there is no index.

        This never sends a request. If the store needs a request to detect changes, every call returns a new value.
        """

    @abstractmethod
    def manifest(self, version: int | None = None) -> Manifest:
        """Return the manifest of the current version, or of an earlier version."""

    @abstractmethod
    def create(self, material: Material) -> Index:
        """Build the first or the next version, and return the opened index."""

    @abstractmethod
    def copy_from(self, index: Index, what: str) -> int:
        """Write an opened index as the next version, and return the version number.

        ``what`` describes the change in the history. Raises InputError if the store does not support a part of the
        index.
        """

    @abstractmethod
    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> Index:
        """Open the current version, or an earlier version.

        ``precision`` is the precision of the matrix products with all keys. With ``verify="full"``, every byte is
        checked first. With ``"fast"``, small files are checked completely and larger files only by their size. The
        default depends on the kind of store. Raises UsageError if the store does not support the precision.
        """

    @abstractmethod
    def change(self) -> AbstractContextManager[Change]:
        """Open the current version for exclusive editing, and write the next version when the context ends."""

    @abstractmethod
    def fit(self, asked: Fit, queries: Callable[[Index], Queries] | None) -> FormChoice:
        """Fit the current version with :func:`closed_form.fit`, and write the next version.

        ``queries`` returns validation queries for the opened index.
        """

    @abstractmethod
    def has_text(self, manifest: Manifest) -> bool:
        """Return whether a version has any text weight that is not zero."""

    @abstractmethod
    def write(self, wait: float | None = None) -> AbstractContextManager[VersionWriter]:
        """Lock the store and return a writer of the next version. Waits up to ``wait`` seconds for other writers."""

    @abstractmethod
    def verify(self) -> Index:
        """Check every byte or row of the current version, check that its parts are consistent, and return it."""

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Raise StoreError if a version is damaged and therefore cannot be restored."""

    @abstractmethod
    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        """Return the given columns of a version's label store."""

    @abstractmethod
    def history(self) -> pa.Table:
        """Return the kept versions as a table with the columns of :data:`labels.VERSIONS_SCHEMA`, oldest first."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the facts that ``index info`` prints."""

    @abstractmethod
    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """Run a SELECT query over the label store. See :func:`folder.query` for details."""

    @abstractmethod
    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Delete all versions except the last ``keep``. Return the deleted versions and the number of freed bytes."""

    def rollback(self, version: int | None = None) -> int:
        """Copy an earlier version, by default the parent, into a new version, and return the new number."""
        self.manifest()  # do not create a store if there is no index
        with self.write() as writer:
            current = writer.parent or self.manifest()
            wanted = version if version is not None else current.parent
            if wanted is None:
                raise StoreError(f"{self}: no version before {current.version}; there is nothing to go back to")
            if wanted == current.version:
                return current.version
            old = self.manifest(wanted)
            self.check(old)
            following = max(old.next_key_id, current.next_key_id)
            self.restore(writer, old, history.renewed(old, current, following, history.stamp()))
            return current.version + 1

    def restore(self, writer: VersionWriter, old: Manifest, new: Manifest) -> None:
        """Commit the version ``new``, which has the same files as the version ``old``."""
        writer.commit(new)
