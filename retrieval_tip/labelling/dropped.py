"""Keep the photos that were dropped on a labelling session as ``FOLDER/NUMBER/NAME``.

A photo keeps its name, and its number also after a restart, so that an open page never labels another photo.
"""

from __future__ import annotations

import re
from pathlib import Path

from retrieval_tip import files
from retrieval_tip.data import images
from retrieval_tip.errors import InputError
from retrieval_tip.labelling.placing import safe_name, write

MOST_DROPPED = 100_000
"""Maximum number of dropped photos."""
_NUMBER = re.compile(r"[0-9]{5}")


def dropped_in(folder: Path) -> dict[int, Path | None]:
    """Return the dropped photos by number. The photo of a number may be gone, because it was moved to its class."""
    entries = images.subfolders(folder) if folder.is_dir() else []
    places = [Path(entry.path) for entry in entries if _NUMBER.fullmatch(entry.name)]
    return {int(place.name): next(images.find(place), None) for place in places}


def keep(folder: Path, number: int, name: str, data: bytes) -> Path:
    """Write a photo, and return its path. It is complete and on the disk as soon as it has its name.

    Raises InputError if there are too many photos, and OSError if the photo cannot be written.
    """
    if number >= MOST_DROPPED:
        raise InputError(f"{name}: {MOST_DROPPED:,} photos were dropped already; put it into the folder of the photos")
    name, place = safe_name(name), folder / f"{number:05}"
    if Path(name).suffix.lower() not in images.extensions():
        name += images.extension(data)
    files.make_folders(place)
    write(data, place / name)
    for one in (place, folder, folder.parent):
        files.sync(one)
    return place / name
