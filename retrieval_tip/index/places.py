"""The stores of indexes, which are folders or the addresses of another kind of store."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrieval_tip.errors import InputError, StoreError, show
from retrieval_tip.settings import Dtype, Verify
from retrieval_tip.store.address import parse
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.versions import Check, Versions, Writer

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.model import Index

Place = str | os.PathLike[str]
"""A folder, or the address of another kind of store (see :mod:`store.address`)."""


GROWN, REFITTED, DUE = 1.125, 4096, 2.0
"""Factor of growth after which a change fits the index again, and maximum number of keys for this.

A fit of that many keys takes a few seconds. The last constant is the factor of growth after which a fit is suggested,
if it is not automatic.
"""


class Change:
    """A change of an index. Edit ``index``, and set ``what`` to a description for the history.

    If ``what`` is empty, no version is written. ``bare_before`` lists the classes that had no keys before the change.
    ``choice`` is the fit that the change has made, and ``fit_due`` whether one is due (see :class:`changes.Changed`).
    """

    what = ""
    choice: FormChoice | None = None
    fit_due = False

    def __init__(self, index: Index, writer: Writer) -> None:
        self.index, self.writer = index, writer
        self.bare_before = index.bare

    @property
    def outcome(self) -> dict[str, Any]:
        """The current version and the fit, as fields of :class:`changes.Changed`."""
        return {"version": self.index.version, "fit": self.choice, "fit_due": self.fit_due}

    def keep_fitted(self) -> None:
        """Fit the index again if the change has outdated its fit."""
        index = self.index
        if index.fitted is None or not self.what:
            return
        automatic = index.n <= REFITTED and index.fitted.automatic
        grown = index.n >= (GROWN if automatic else DUE) * index.fitted.keys
        bare_before = [name for name in self.bare_before if name in index.class_names]
        if not grown and (not index.has_text or index.bare == bare_before):
            return
        if not automatic:
            self.fit_due = True
        elif grown:
            from retrieval_tip.fit.closed_form import Fit

            self.fit(Fit(class_prior=index.fitted.class_prior))
        else:
            self.refit(index.settings.beta)

    def commit(self) -> None:
        """Write the next version."""
        self.index.commit(self.writer, self.what)

    def rebuild(self, index: str | None, dtype: Dtype | None) -> None:
        """Rebuild the index from its keys. ``None`` keeps the current index type or dtype."""
        self.index.rebuild(index, dtype)

    def refit(self, beta: float) -> None:
        """Refit a fitted index for a new beta with :func:`closed_form.refit`, including its solved values."""
        from retrieval_tip.fit import closed_form

        self.choice = closed_form.refit(self.index, beta)

    def fit(self, asked: Fit, validation: Queries | None = None) -> FormChoice:
        """Fit the index with :func:`closed_form.fit`."""
        from retrieval_tip.fit import closed_form

        self.choice = closed_form.fit(self.index, asked, validation=validation)
        return self.choice


class Store(Versions):
    """A store that keeps the versions of one index, in a folder unless a subclass says otherwise.

    ``look_every`` is the number of seconds after which a server checks for a new version.
    """

    look_every = 0.0

    def create(self, material: Material) -> Index:
        """Build the first or the next version, and return the opened index."""
        from retrieval_tip.index.items import create

        return create(self, material)

    def copy_from(self, index: Index, what: str) -> int:
        """Write an opened index as the next version, and return the version number.

        ``what`` describes the change in the history. Raises InputError if the store does not support a part of the
        index.
        """
        index.save(self.folder, what)
        return self.manifest().version

    def load(self, *, device: str = "auto", verify: Verify | None = None, version: int | None = None) -> Index:
        """Open the current version, or an earlier version.

        With ``verify="full"``, every byte is checked first. With ``"fast"``, small files are checked completely and
        larger files only by their size. The default depends on the kind of store.
        """
        verify = verify or "full"
        check = None if version is not None else Check(self.files, self.manifest(), verify)
        from retrieval_tip.model import Index  # the files are hashed in the background during this import

        return Index.load(self.folder, device=device, verify=verify, check=check, version=version)

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Open the current version for exclusive editing, and write the next version when the context ends."""
        self.manifest()  # before a writer creates a folder
        with self.write() as writer:
            change = self.changed_by(writer)
            yield change
            if change.what:
                change.commit()

    def changed_by(self, writer: Any) -> Change:
        """Open the parent of the version that is being written, to be changed."""
        from retrieval_tip.model import Index

        check = Check(self.files, writer.parent, "fast")  # copied files are hashed anyway
        return Change(Index.load(self.folder, device="cpu", check=check), writer)

    def verify(self) -> Index:
        """Check every byte or row of the current version, check that its parts are consistent, and return it."""
        from retrieval_tip.model import verify

        return verify(self.folder)


def at(place: Place) -> Store:
    """Return the store at a folder or an address, even if it contains no index. Raises UsageError if it is invalid."""
    address = parse(place) if isinstance(place, str) else None
    if address is None:
        return Store(place)
    # imported by name, because this layer is below the package
    return cast("Store", importlib.import_module("retrieval_tip.lance.lance_store").LanceStore(address))


def found(folder: Path) -> Store:
    """Return the store in a folder, whether or not it has a table."""
    return at(f"lance://{folder}" if (folder / "keys.lance").is_dir() else folder)


def listed(folder: Path) -> list[tuple[str, Manifest]]:
    """Return the path and the current manifest of each valid index folder inside a folder, sorted by name.

    Raises InputError if the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{show(folder)}: no such folder; give the folder that holds indexes")
    found = []
    for place in sorted(folder.iterdir()):
        with suppress(StoreError):
            if (own := Versions(place)).exists():
                found.append((show(place), own.manifest()))
    return found
