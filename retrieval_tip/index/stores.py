"""Define the interface of a store, which keeps the versions of one index."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_tip.errors import InputError
from retrieval_tip.settings import Dtype, Precision, Verify
from retrieval_tip.store.versions import Versions, Writer

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.model import Index


class Change:
    """A change of an index. Edit ``index``, and set ``what`` to a description for the history.

    If ``what`` is empty, no version is written. ``bare_before`` lists the classes that had no keys before the change.
    """

    what = ""

    def __init__(self, index: Index, writer: Writer) -> None:
        self.index, self.writer = index, writer
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


class Store(Versions[Any]):
    """A store that keeps the versions of one index.

    ``look_every`` is the number of seconds after which a server checks for a new version.
    """

    look_every: float = 0.0

    def movable(self) -> Path:
        """Return the real folder of an index that can be renamed, duplicated and deleted as a whole.

        Raises InputError for stores that are not index folders, and for links.
        """
        raise InputError(f"{self}: only index folders can be renamed, duplicated or deleted; use index clone")

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
    def verify(self) -> Index:
        """Check every byte or row of the current version, check that its parts are consistent, and return it."""
