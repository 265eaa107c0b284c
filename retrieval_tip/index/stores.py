"""Interface of a store: the versions of one index, in any kind of place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from retrieval_tip.errors import StoreError
from retrieval_tip.files import real
from retrieval_tip.settings import Dtype, MetricName, Precision, ValuesName, Verify
from retrieval_tip.store import history
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import TIMEOUT

if TYPE_CHECKING:  # reading a manifest needs no torch, which takes a second to import
    from retrieval_tip.answering import AnsweringIndex, EditableIndex
    from retrieval_tip.fit.closed_form import FormChoice
    from retrieval_tip.fit.search_hp import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.retrieval.duplicates import Duplicates


class VersionWriter(Protocol):
    """A writer of the next version of an index, which follows ``parent``."""

    parent: Manifest | None

    def commit(self, manifest: Manifest) -> None:
        """Make this the current version."""


class Change(ABC):
    """An index to edit, ``cache``. Without ``what``, a description for the history, nothing is written."""

    what = ""

    def __init__(self, cache: EditableIndex) -> None:
        self.cache = cache

    @abstractmethod
    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """Build the index again from its keys, with another type or dtype."""

    @abstractmethod
    def refit(self, beta: float) -> FormChoice:
        """Refit a fitted index for another beta (:func:`closed_form.refit`), including solved values."""

    @abstractmethod
    def duplicates_of(self, key_ids: Sequence[int]) -> Duplicates:
        """Return the keys among ``key_ids`` (at least one) whose image is also in another class."""


class Store(ABC):
    """The versions of one index. Readers see one whole version; one writer at a time makes the next.

    ``local`` is the folder on this machine, ``None`` in a bucket. ``look_every`` is the number of seconds after which a
    server looks for a new version. StoreError means that the store is missing, damaged, locked or not writable. An
    error, or a kill at any moment, changes nothing.
    """

    local: Path | None
    look_every: float = 0.0

    @abstractmethod
    def __str__(self) -> str:
        """Return the folder or address."""

    @property
    def resolved(self) -> str:
        """Text that is the same for the same place."""
        return str(self) if self.local is None else str(real(self.local))

    @property
    def name(self) -> str:
        """Last part of the folder or address."""
        return self.resolved.rpartition("/")[2] if self.local is None else Path(self.resolved).name

    @abstractmethod
    def exists(self) -> bool:
        """Return whether there is an index, in any state."""

    @abstractmethod
    def stamp(self) -> Hashable | None:
        """Return a value that changes with the current version, without asking a service; ``None`` without an index.

        In a store that must be asked, every value is new.
        """

    @abstractmethod
    def manifest(self, version: int | None = None) -> Manifest:
        """Return the manifest of the current version, or of an earlier one."""

    @abstractmethod
    def create(self, material: Material) -> AnsweringIndex:
        """Build the first or next version, and return it, opened."""

    @abstractmethod
    def copy_from(self, model: AnsweringIndex, what: str) -> int:
        """Write an opened index as the next version, and return its number; ``what`` goes into the history.

        Raises InputError for a part that this kind of store cannot hold.
        """

    @abstractmethod
    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> AnsweringIndex:
        """Open the current version, or an earlier one.

        ``precision`` applies to products with all keys. ``verify="full"`` checks every byte first; ``fast`` checks
        small files, and the size of others. The default depends on the kind of store. Raises UsageError for a precision
        that the store lacks.
        """

    @abstractmethod
    def change(self) -> AbstractContextManager[Change]:
        """Open the current version for exclusive editing. A change without a description writes nothing."""

    @abstractmethod
    def fit(
        self, metric: MetricName | None, values: ValuesName | None, queries: Callable[[AnsweringIndex], Queries] | None
    ) -> FormChoice:
        """Fit the current version (:func:`closed_form.fit`), and write the next one.

        ``queries`` makes validation queries from the opened index.
        """

    @abstractmethod
    def tuned(self, manifest: Manifest) -> Path | None:
        """Return the weights of a version's fine-tuned encoder, if it has one."""

    @abstractmethod
    def has_text(self, manifest: Manifest) -> bool:
        """Return whether a version has text weights that are not all zero."""

    @abstractmethod
    def write(self, wait: float | None = None) -> AbstractContextManager[VersionWriter]:
        """Write the next version exclusively. Other writers wait up to ``wait`` seconds."""

    @abstractmethod
    def verify(self) -> AnsweringIndex:
        """Check every byte or row of the current version, and that its parts fit together; return it."""

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Check that a version can become current again."""

    @abstractmethod
    def next_key_id(self, manifest: Manifest) -> int:
        """Return the first key id that no version up to this one has used."""

    @abstractmethod
    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store of a version."""

    @abstractmethod
    def history(self) -> pa.Table:
        """Return the kept versions, oldest first, as a table of :data:`labels.VERSIONS_SCHEMA`."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the facts that ``index info`` prints."""

    @abstractmethod
    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """Run a SELECT over the label store (:func:`folder.query`)."""

    @abstractmethod
    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Delete all versions except the last ``keep``. Returns their numbers and the freed bytes."""

    def rollback(self, version: int | None = None) -> int:
        """Copy an earlier version, by default the parent, into a new one; return the current version's number."""
        self.manifest()  # make nothing without an index
        with self.write() as writer:
            current = writer.parent or self.manifest()
            wanted = version if version is not None else current.parent
            if wanted is None:
                raise StoreError(f"{self}: no version before {current.version}; there is nothing to go back to")
            if wanted == current.version:
                return current.version
            old = self.manifest(wanted)
            self.check(old)
            following = max(self.next_key_id(manifest) for manifest in (old, current))
            writer.commit(history.renewed(old, current, following, history.stamp()))
            return current.version + 1
