"""The contract of a store: the versions of one index, in whatever kind of place."""

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

if TYPE_CHECKING:  # a question about a manifest needs no torch, whose import takes a second
    from retrieval_tip.answering import AnsweringIndex, EditableIndex
    from retrieval_tip.fit.closed_form import FormChoice
    from retrieval_tip.fit.search_hp import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.retrieval.duplicates import Duplicates


class VersionWriter(Protocol):
    """The next version of an index in the making, after its ``parent``."""

    parent: Manifest | None

    def commit(self, manifest: Manifest) -> None:
        """Make this the current version."""


class Change(ABC):
    """An index in the making: ``what`` is said of it in its history, and nothing is written where it stays empty."""

    what = ""

    @property
    @abstractmethod
    def cache(self) -> EditableIndex:
        """The index, to be edited."""

    @abstractmethod
    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """Build the index anew from its keys, as another type or dtype."""

    @abstractmethod
    def refit(self, beta: float) -> FormChoice:
        """Fit what depends on beta for another one, in a fitted index: :func:`closed_form.refit`, and solved values."""

    @abstractmethod
    def duplicates_of(self, key_ids: Sequence[int]) -> Duplicates:
        """Return those of some new keys, at least one, whose image is in another class too."""


class Store(ABC):
    """The versions of one index, of which readers see one whole, and writers make the next one alone.

    ``local`` is the folder on this machine that it lies in, ``None`` in a bucket; ``look_every`` the seconds between
    two looks of a server for another version. Errors are StoreError: it is not there, is damaged, is being written, or
    cannot be written. What fails, or is killed at any moment, changes nothing.
    """

    local: Path | None
    look_every: float = 0.0

    @abstractmethod
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

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is an index (in whatever state)."""

    @abstractmethod
    def stamp(self) -> Hashable | None:
        """Return a value that changes with the current version, without asking a service; ``None``: there is none.

        Where only asking tells, it changes always.
        """

    @abstractmethod
    def manifest(self, version: int | None = None) -> Manifest:
        """Return the current version, or an earlier one."""

    @abstractmethod
    def create(self, material: Material) -> AnsweringIndex:
        """Build the next version, the first one where there is none, and return it, opened."""

    @abstractmethod
    def copy_from(self, model: AnsweringIndex, what: str) -> int:
        """Write an opened index as the next version, and return that; ``what`` is said of it in its history.

        Raises InputError for a part that this kind of store does not keep.
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

        ``precision`` is that of the products with all keys. ``verify`` ``full`` checks every byte first, ``fast`` only
        small files, and others by their size; the default is what this kind of store does soon. Raises UsageError for
        a precision that it does not have.
        """

    @abstractmethod
    def change(self) -> AbstractContextManager[Change]:
        """Open the current version, alone, to become the next one, unless nothing is said of it."""

    @abstractmethod
    def fit(
        self, metric: MetricName | None, values: ValuesName | None, queries: Callable[[AnsweringIndex], Queries] | None
    ) -> FormChoice:
        """Fit the current version (:func:`closed_form.fit`), and write the next one.

        ``queries`` makes validation queries of the opened index.
        """

    @abstractmethod
    def tuned(self, manifest: Manifest) -> Path | None:
        """Return the weights of the fine-tuned encoder of a version, if it has one."""

    @abstractmethod
    def has_text(self, manifest: Manifest) -> bool:
        """Whether a version has text weights that are not all zero."""

    @abstractmethod
    def write(self, wait: float | None = None) -> AbstractContextManager[VersionWriter]:
        """Write the next version, alone: another writer waits its turn, ``wait`` seconds."""

    @abstractmethod
    def verify(self) -> AnsweringIndex:
        """Check every byte, or every row, of the current version, and that its parts fit together; return it."""

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Check that a version can be made current again."""

    @abstractmethod
    def next_key_id(self, manifest: Manifest) -> int:
        """Return the first key id that was never given up to a version."""

    @abstractmethod
    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store of a version."""

    @abstractmethod
    def history(self) -> pa.Table:
        """Return the versions that are kept, oldest first: a table of :data:`labels.VERSIONS_SCHEMA`."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """Return the facts that ``index info`` prints."""

    @abstractmethod
    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        """Return the answer of a SELECT over the label store (:func:`folder.query`)."""

    @abstractmethod
    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        """Give up all versions but the last ``keep``: versions, bytes that are free now."""

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
