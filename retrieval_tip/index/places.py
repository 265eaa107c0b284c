"""Open the store of an index, given a folder or the address of another kind of store."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from retrieval_tip.errors import InputError, StoreError, show
from retrieval_tip.files import real
from retrieval_tip.index.stores import Change, Store
from retrieval_tip.settings import Precision, Verify
from retrieval_tip.store.address import parse
from retrieval_tip.store.folder import FolderVersions
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.versions import Check

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.model import Index

Place = str | os.PathLike[str]
"""A folder, or the address of another kind of store (see :mod:`store.address`)."""


class FolderStore(FolderVersions, Store):
    """A store that keeps the versions of an index in a folder. See :mod:`store.folder` for details."""

    def movable(self) -> Path:
        self.check_there()
        if self.folder.is_symlink():
            raise InputError(f"{show(self.folder)}: is a link; rename, duplicate or delete the folder it points to")
        return real(self.folder)

    def create(self, material: Material) -> Index:
        from retrieval_tip.index import folders

        return folders.create(self, material)

    def copy_from(self, index: Index, what: str) -> int:
        index.save(self.folder, what)
        return self.current().version

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> Index:
        verify = verify or "full"
        check = None if version is not None else Check(self.files, self.current(), verify)
        from retrieval_tip.model import Index  # the files are hashed in the background during this import

        return Index.load(self.folder, device=device, precision=precision, verify=verify, check=check, version=version)

    @contextmanager
    def change(self) -> Iterator[Change]:
        from retrieval_tip.model import Index

        self.check_there()
        with self.write() as writer:
            assert writer.parent is not None
            check = Check(self.files, writer.parent, "fast")  # copied files are hashed anyway
            change = Change(Index.load(self.folder, device="cpu", check=check), writer)
            yield change
            if change.what:
                change.index.commit(writer, change.what)

    def fit(self, asked: Fit, queries: Callable[[Index], Queries] | None) -> FormChoice:
        from retrieval_tip.fit import closed_form

        index = self.load(device="cpu")
        choice = closed_form.fit(index, asked, validation=None if queries is None else queries(index))
        index.save(self.folder, "fit")
        return choice

    def verify(self) -> Index:
        from retrieval_tip.model import verify

        return verify(self.folder)


def at(place: Place) -> Store:
    """Return the store at a folder or an address, even if it contains no index. Raises UsageError if it is invalid."""
    address = parse(place) if isinstance(place, str) else None
    if address is None:
        return FolderStore(place)
    # imported by name, because this layer is below the package
    return cast("Store", importlib.import_module("retrieval_tip.lance.lance_store").LanceStore(address))


def listed(folder: Path) -> list[tuple[str, Manifest]]:
    """Return the path and the current manifest of each valid index folder inside a folder, sorted by name.

    Raises InputError if the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{show(folder)}: no such folder; give the folder that holds indexes")
    found = []
    for place in sorted(folder.iterdir()):
        with suppress(StoreError):
            if (own := FolderVersions(place)).exists():
                found.append((show(place), own.current()))
    return found
