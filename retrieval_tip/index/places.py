"""Open the store of an index, given a folder or the address of another kind of store."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from retrieval_tip.errors import InputError, StoreError, show
from retrieval_tip.files import real
from retrieval_tip.index.addresses import plug_of
from retrieval_tip.index.stores import Change, Store
from retrieval_tip.settings import Precision, Verify
from retrieval_tip.store import folder as index_folder
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import TIMEOUT
from retrieval_tip.store.writer import Writer, collect, write

if TYPE_CHECKING:  # importing torch takes a second, and manifests do not need it
    from retrieval_tip.fit.closed_form import Fit, FormChoice
    from retrieval_tip.fit.folds import Queries
    from retrieval_tip.index.items import Material
    from retrieval_tip.model import Index

Place = str | os.PathLike[str]
"""A folder, or the address of another kind of store (see :mod:`index.addresses`)."""


class FolderStore(Store):
    """A store that keeps the versions of an index in a folder. See :mod:`store.folder` for details."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.local = folder

    def __str__(self) -> str:
        return str(self.folder)

    def exists(self) -> bool:
        return index_folder.is_index(self.folder)

    def movable(self) -> Path:
        index_folder.check_there(self.folder)
        if self.folder.is_symlink():
            raise InputError(f"{show(self.folder)}: is a link; rename, duplicate or delete the folder it points to")
        return real(self.folder)

    def stamp(self) -> Hashable | None:
        try:
            status = (self.folder / "manifest.json").stat()  # each version replaces this file
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def manifest(self, version: int | None = None) -> Manifest:
        if version is None:
            return index_folder.read_manifest(self.folder)
        return index_folder.read_version(self.folder, version)

    def create(self, material: Material) -> Index:
        from retrieval_tip.index import folders

        return folders.create(self.folder, material)

    def copy_from(self, index: Index, what: str) -> int:
        index.save(self.folder, what)
        return self.manifest().version

    def load(
        self,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        verify: Verify | None = None,
        version: int | None = None,
    ) -> Index:
        verify = verify or "full"
        check = None if version is not None else index_folder.Check(self.folder, verify=verify)
        from retrieval_tip.model import Index  # the files are hashed in the background during this import

        return Index.load(self.folder, device=device, precision=precision, verify=verify, check=check, version=version)

    def write(self, wait: float | None = None) -> AbstractContextManager[Writer]:
        return write(self.folder, wait)

    @contextmanager
    def change(self) -> Iterator[Change]:
        from retrieval_tip.model import Index

        index_folder.check_there(self.folder)  # do not create a folder if there is no index
        with write(self.folder) as writer:
            check = index_folder.Check(self.folder, writer.parent, "fast")  # copied files are hashed anyway
            change = Change(Index.load(self.folder, device="cpu", check=check))
            yield change
            if change.what:
                change.index.commit(writer, change.what)

    def fit(self, asked: Fit, queries: Callable[[Index], Queries] | None) -> FormChoice:
        from retrieval_tip.index import folders

        return folders.fit(self.folder, asked, queries)

    def has_text(self, manifest: Manifest) -> bool:
        return index_folder.has_text(self.folder, manifest)

    def verify(self) -> Index:
        from retrieval_tip.model import verify

        return verify(self.folder)

    def check(self, manifest: Manifest) -> None:
        index_folder.Check(self.folder, manifest).wait()

    def read_labels(self, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
        return index_folder.read_labels(self.folder, manifest).select(list(columns))

    def history(self) -> pa.Table:
        return index_folder.history(self.folder)

    def describe(self) -> dict[str, object]:
        return index_folder.describe(self.folder)

    def query(self, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
        return index_folder.query(self.folder, sql, predictions, timeout)

    def collect(self, keep: int = 1) -> tuple[list[int], int]:
        return collect(self.folder, keep)


def at(place: Place) -> Store:
    """Return the store at a folder or an address, even if it contains no index. Raises UsageError if it is invalid."""
    plug = plug_of(place) if isinstance(place, str) else None
    return FolderStore(Path(place)) if plug is None else plug.store_at(str(place))


def listed(folder: Path) -> list[tuple[str, Manifest]]:
    """Return the path and the current manifest of each valid index folder inside a folder, sorted by name.

    Raises InputError if the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"{show(folder)}: no such folder; give the folder that holds indexes")
    found = []
    for place in sorted(folder.iterdir()):
        with suppress(StoreError):
            if index_folder.is_index(place):
                found.append((show(place), index_folder.read_manifest(place)))
    return found
