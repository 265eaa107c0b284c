"""Manage the photos that were added to an index over HTTP.

The photos of an index ``DIR`` are stored next to it as ``DIR-shots/CLASS/HEX.EXT``, where ``HEX`` is the beginning of
the SHA-256.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.data.remote import absolute
from retrieval_tip.errors import StoreError
from retrieval_tip.files import (
    common_folders,
    locked_folder,
    make_folders,
    real,
    remove_leftovers,
    sha256_of,
)
from retrieval_tip.index import places
from retrieval_tip.index.places import Place, Store
from retrieval_tip.store import files
from retrieval_tip.wording import command_line, show

log = logging.getLogger(__name__)

SUFFIX, DROPPED = "-shots", "-dropped"
"""Endings of the names of folders of photos, and of photos that were dropped on a labelling session.

No index should have such a name.
"""

HEX = 16
"""Number of hexadecimal digits of the SHA-256 in the file name of a photo."""

LISTED, FOLDERS = 1 << 18, 16
"""Maximum number of photos whose folders are compared, and maximum number of folders in a command."""

_NAME = re.compile(rf"([0-9a-f]{{{HEX}}})\.\w{{1,8}}")
_IN_SOURCE = rf"(?:^|[/\\])(?P<digits>[0-9a-f]{{{HEX}}})\.\w{{1,8}}$"


def folder_of(store: Store) -> Path | None:
    """Return the folder ``DIR-shots`` of an index, or ``None`` if the index is in a bucket."""
    return None if store.local is None else real(store.local).with_name(store.name + SUFFIX)


def command(name: str, index: Place, paths: Sequence[str], *options: str) -> str | None:
    """Return a command for an index and the folders of photos.

    If these are class folders of one folder that does not contain the index, that folder is given. Returns ``None`` if
    no folder is on this machine, or if there are more than :data:`FOLDERS`.
    """
    place, parents = absolute(os.fspath(index)), {os.path.dirname(path) for path in paths}  # noqa: PTH120 - much faster
    folders = sorted(
        {folder for parent in parents if (folder := Path(absolute(parent or "."))).is_dir()}
    )
    if not folders:
        return None
    common = Path(common_folders(folders)[0])
    if not Path(place).is_relative_to(common) and all(
        common in (folder, folder.parent) for folder in folders
    ):
        folders = [common]
    return show(command_line(name, place, *folders, *options)) if len(folders) <= FOLDERS else None


def is_reserved(name: str) -> bool:
    """Return whether a folder of this name may hold the photos of an index, also if the case is ignored."""
    return name.casefold().endswith((SUFFIX, DROPPED))


def holds_photos(folder: Path) -> bool:
    """Return whether a folder holds photos that were added to an index, even if it is an index itself."""
    return is_reserved(folder.name) and bool(_photos(folder))


@contextmanager
def adding(folder: Path) -> Iterator[None]:
    """Block :func:`remove_unused` inside the context, because new photos are not yet part of a version."""
    make_folders(folder)
    with locked_folder(folder, alone=False, wait=files.LOCK_WAIT):
        yield


def remove_unused(store: Store) -> tuple[int, int]:
    """Remove the photos in ``DIR-shots`` that no kept version uses. Return their number and the freed bytes.

    A version uses a photo if a key has the digest of the photo, or if the source of a key ends with the file name of
    the photo. Index folders next to ``DIR`` count as well, because a renamed or copied index keeps its photos. Links
    and files that are not named by their own SHA-256 are kept. If photos are being added, or if a version cannot be
    read, nothing is removed and a warning is logged.
    """
    folder = folder_of(store)
    if folder is None or folder.is_symlink() or not folder.is_dir():
        return 0, 0
    with locked_folder(folder, alone=True, wait=files.LOCK_WAIT) as held:
        if not held:
            log.warning(
                "%s: photos are being added, so no photo was removed; run index gc again",
                show(folder),
            )
            return 0, 0
        try:
            photos = _photos(folder)
            names = {match[1] for path in photos if (match := _NAME.fullmatch(path.name))}
            used = set().union(*(_used(one, names) for one in _users(store, folder)))
        except (OSError, StoreError) as error:
            log.warning("%s: no photo was removed: %s", show(folder), error)
            return 0, 0
        return _remove(folder, [path for path in photos if path.name[:HEX] not in used])


def _photos(folder: Path) -> list[Path]:
    classes = [
        Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)
    ]
    entries = [
        entry
        for place in classes
        for entry in os.scandir(place)
        if entry.is_file(follow_symlinks=False)
    ]
    return [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]


def _users(store: Store, folder: Path) -> list[Store]:
    """Return the indexes that may use the photos: the store itself, if it still exists, and the folders next to it."""
    paths = [path for path in folder.parent.iterdir() if not path.name.startswith(".")]
    return [
        *{one.resolved: one for one in (store, *map(places.found, paths)) if one.exists()}.values()
    ]


def _used(store: Store, names: set[str]) -> set[str]:
    """Return the ``names``, without file extensions, that a kept version uses."""
    used: set[str] = set()
    wanted = pa.array(names, pa.string())
    for version in store.history()["version"].to_pylist() if names else ():
        labels = store.read_labels(store.manifest(version), ["digest", "source"])
        sources = pc.struct_field(pc.extract_regex(labels["source"], _IN_SOURCE), "digits")
        for column in (pc.utf8_slice_codeunits(labels["digest"], 0, HEX), sources):
            used |= set(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
    return used


def _remove(folder: Path, photos: list[Path]) -> tuple[int, int]:
    """Remove photos that are named by their own SHA-256, and empty class folders."""
    number = freed = 0
    for path in photos:
        with suppress(OSError):
            if sha256_of(path).startswith(path.name[:HEX]):
                size = path.stat().st_size
                path.unlink()
                number = number + 1
                freed = freed + size
    for place in list(folder.iterdir()):
        if place.is_dir() and not place.is_symlink():
            freed += remove_leftovers(place)
            with suppress(OSError):  # fails unless the folder is empty
                place.rmdir()
    return number, freed
