"""The stores of indexes, which are folders or the addresses of another kind of store."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrieval_tip import hooks
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.settings import Dtype, Verify
from retrieval_tip.store.address import parse
from retrieval_tip.store.labels import LabelChanges
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.versions import Check, ConflictError, Versions, changed_meanwhile
from retrieval_tip.wording import show

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import FormChoice
    from retrieval_tip.index.items import BuildInputs
    from retrieval_tip.model import Index
    from retrieval_tip.retrieval.duplicates import Duplicates

Place = str | os.PathLike[str]
"""A folder, or the address of another kind of store (see :mod:`store.address`)."""


TRIES = 3
"""Number of times that an edit is tried in a bucket, if another process writes a version at the same time."""


@dataclass(frozen=True)
class Changed:
    """A change of an index, before and after it is written.

    If the number of keys has grown by an eighth since the last fit, or if other classes than before have no photos, the
    index is fitted again. Some indexes are not fitted by a change, because they are too large, or because a fit to
    their shots did not choose their settings.

    Attributes:
        index: the new index.
        what: a description for the history. If it is empty, nothing has changed, and no version is written.
        key_ids: the ids of the affected keys.
        labels: the labels of these keys before and after. For a labelling session, since the version before.
        classes: the new classes.
        known: the number of images that the index already had.
        duplicates: the new keys whose image is also in another class.
        alike: maps a new class to an earlier class whose name only differs in case, ``_``, ``-`` or spaces.
        merged: whether a renamed class was merged into an existing class.
        fit: the fit, if the index was fitted.
        fit_due: whether the index has doubled, or other classes have no photos, but it was not fitted.
            :func:`changes.fit_index` would make it more accurate.
        replaces: whether the version takes the place of the version before it.
    """

    index: Index = dataclasses.field(repr=False, compare=False)
    what: str
    _: dataclasses.KW_ONLY
    key_ids: list[int] = dataclasses.field(default_factory=list)
    labels: LabelChanges = dataclasses.field(default_factory=dict)
    classes: list[str] = dataclasses.field(default_factory=list)
    known: int = 0
    duplicates: Duplicates | None = None
    alike: dict[str, str] = dataclasses.field(default_factory=dict)
    merged: bool = False
    fit: FormChoice | None = None
    fit_due: bool = False
    replaces: bool = False

    @property
    def version(self) -> int:
        """The number of the current version."""
        assert self.index.version is not None
        return self.index.version


class Store(Versions):
    """A store that keeps the versions of one index, in a folder unless a subclass says otherwise.

    ``look_every`` is the number of seconds after which a server checks for a new version.
    """

    look_every = 0.0

    def create(self, material: BuildInputs) -> Index:
        """Build the first or the next version, and return the opened index."""
        from retrieval_tip.index.items import create

        return create(self, material)

    def copy_from(self, index: Index, what: str) -> Index:
        """Write an opened index as the next version, and return it as it is stored here.

        ``what`` describes the change in the history. Raises InputError if the store does not support a part of the
        index.
        """
        return copy.copy(index).save(self.folder, what)

    def load(
        self, *, device: str = "auto", verify: Verify | None = None, version: int | None = None
    ) -> Index:
        """Open the current version, or an earlier version.

        With ``verify="full"``, every byte is checked first. With ``"fast"``, small files are checked completely and
        larger files only by their size. The default depends on the kind of store.
        """
        verify = verify or "full"
        check = None if version is not None else Check(self.files, self.manifest(), verify)
        from retrieval_tip.model import (
            Index,
        )  # the files are hashed in the background during this import

        return Index.load(self.folder, device=device, verify=verify, check=check, version=version)

    def change(
        self,
        revise: Callable[[Index], Changed],
        *,
        base: Index | None = None,
        expect: int | None = None,
        tries: int = 1,
    ) -> Changed:
        """Change the current version, and return the change with the index as it is stored.

        Args:
            revise: takes the current index, and returns the change to write. It may be called again.
            base: an open index, which saves loading the current version if it is the same.
            expect: the version that must be current.
            tries: the number of attempts in a bucket, where another process may write a version at the same time.

        Raises the errors of ``revise`` and of :meth:`Versions.write`. If an error occurs, nothing changes.
        """
        if not self.exists():
            self.manifest()  # before a writer creates a folder
        try:
            with self.write() as writer:
                if expect not in (None, writer.parent.version):
                    raise changed_meanwhile(self)
                changed = revise(self.current(writer, base))
                writer.replaces = changed.replaces
                if changed.what:
                    changed = replace(
                        changed, index=self.commit(writer, changed.index, changed.what)
                    )
                return changed
        except ConflictError:
            if tries == 1 or self.local is not None:
                raise
        return self.change(revise, base=base, expect=expect, tries=tries - 1)

    def current(self, writer: Any, base: Index | None) -> Index:
        """Return the parent of the version that is being written, to be changed on the CPU."""
        from retrieval_tip.model import Index

        if base is not None and base.manifest == writer.parent:
            return base.on("cpu")
        check = Check(self.files, writer.parent, "fast")  # copied files are hashed anyway
        return Index.load(self.folder, device="cpu", check=check)

    def commit(self, writer: Any, index: Index, what: str) -> Index:
        """Make ``index`` the current version, and return it as it is stored."""
        return index.committed(writer, what)

    def rebuilt(self, index: Index, factory: str | None, dtype: Dtype | None) -> Index:
        """Rebuild an index from its keys. ``None`` keeps the current index type or dtype."""
        return index.rebuilt(factory, dtype)

    def restore(self, version: int | None = None, expect: int | None = None) -> Index:
        """Restore an earlier version (see :meth:`Versions.rollback`), and return it."""
        return self.load(device="cpu", verify="fast", version=self.rollback(version, expect))

    def verify(self) -> Index:
        """Check every byte or row of the current version, check that its parts are consistent, and return it."""
        from retrieval_tip.model import verify

        return verify(self.folder)


def at(place: Place) -> Store:
    """Return the store at a folder or an address, even if it contains no index. Raises UsageError if it is invalid."""
    address = parse(place) if isinstance(place, str) else None
    if address is None:
        return Store(place)
    return cast("Store", hooks.find("stores", address.scheme)(address))


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
