"""Keep the photos that were dropped on a labelling session as ``FOLDER/NUMBER/NAME``.

A photo keeps its name, and its number also after a restart, so that an open page never labels another photo.
"""

from __future__ import annotations

import re
from pathlib import Path

from retrieval_tip import files
from retrieval_tip.data import images
from retrieval_tip.labelling.placing import remove_scratch, safe_name, write

_NUMBER = re.compile(r"[0-9]{1,9}")


def dropped_in(folder: Path) -> dict[int, str]:
    """Return the paths of the dropped photos by number. A path is empty if the photo was moved away.

    The temporary files of killed processes are removed.
    """
    entries = images.subfolders(folder) if folder.is_dir() else []
    numbers = {
        int(entry.name): Path(entry.path) for entry in entries if _NUMBER.fullmatch(entry.name)
    }
    remove_scratch(numbers.values())
    return {number: next(map(str, images.find(place)), "") for number, place in numbers.items()}


def keep(folder: Path, number: int, name: str, data: bytes) -> str:
    """Write a photo, and return its path. It is complete and on the disk as soon as it has its name."""
    name = safe_name(name)
    place = folder / str(number)
    if files.suffix_of(name) not in images.extensions():
        name += images.extension(data)
    files.make_folders(place)
    write(data, place / name)
    files.sync(place)
    files.sync(folder)
    return str(place / name)
