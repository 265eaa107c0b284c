"""Rename, duplicate and delete index folders as a whole. A killed process leaves at most a hidden temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import real, remove_leftovers, sync, temporary
from retrieval_tip.index import changes, places
from retrieval_tip.index.added_photos import holds_photos, remove_unused
from retrieval_tip.store.files import locked
from retrieval_tip.wording import show


def rename(folder: places.Place, name: str) -> Path:
    """Rename an index folder, and return its new path.

    Raises InputError unless the index has a folder of its own, which is no link and holds no photos of another index.
    Raises StoreError if the name is in use, or if the folder is locked or cannot be renamed.
    """
    place = _own(folder)
    target = _free(place.with_name(name))
    with _writing(place), locked(place, place):
        place.rename(target)
    return target


def duplicate(folder: places.Place, name: str) -> Path:
    """Copy the current version of an index to a new folder next to it, and return its path.

    Raises the same errors as :func:`rename` and :func:`changes.clone`.
    """
    place = _movable(folder)
    target = _free(place.with_name(name))
    with _writing(place), temporary(target, folder=True) as copy:
        try:
            changes.clone(place, copy)
        except StoreError as error:
            raise StoreError(str(error).replace(str(copy), show(target))) from error
        copy.rename(target)
    return target


def delete(folder: places.Place) -> None:
    """Delete an index folder, and the photos added over HTTP that no other index next to it uses.

    Raises the same errors as :func:`rename`.
    """
    place = _own(folder)
    with _writing(place), temporary(place, folder=True) as aside, locked(place, place):
        place.rename(
            aside
        )  # from here on the index is gone, and the rest is removed later if this process is killed
    remove_unused(places.at(place))


def _movable(folder: places.Place) -> Path:
    store = places.at(folder)
    if store.in_table:
        raise InputError(
            f"{store}: only index folders can be renamed, duplicated or deleted; use index clone"
        )
    store.manifest()
    if store.folder.is_symlink():
        raise InputError(
            f"{show(store.folder)}: is a link; rename, duplicate or delete the folder it points to"
        )
    return real(store.folder)


def _own(folder: places.Place) -> Path:
    place = _movable(folder)
    if holds_photos(place):
        raise InputError(
            f"{show(place)}: also contains photos of another index; duplicate it under another name"
        )
    return place


def _free(target: Path) -> Path:
    if target.exists():
        raise StoreError(f"{show(target)}: already exists; choose another name")
    return target


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Remove what killed processes left next to an index, and raise StoreError if the disk refuses a change."""
    try:
        remove_leftovers(place.parent)
        yield
        sync(place.parent)
    except OSError as error:
        raise StoreError(f"{show(place)}: cannot be changed: {error.strerror or error}") from error
