"""Folders of photos: one folder per class, perhaps below ``train``, ``val`` and ``test``."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from retrieval_tip.data import images
from retrieval_tip.data.listing import Listing
from retrieval_tip.errors import InputError, counted, few, show

log = logging.getLogger(__name__)

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of the folders that hold each part of a dataset."""

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of labels in the image folders of Hugging Face."""

HEIC = frozenset({".heic", ".heif", ".hif"})
"""Photos of telephones, which only the extra ``heic`` reads."""


def subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """Return the folders in a folder that are not hidden, in name order."""
    return [entry for entry in images.entries(folder) if images.is_folder(entry)]


def table_in(folder: Path) -> Path | None:
    """Return the table of labels in a folder, if it has one of ``TABLES``."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def part_of(folder: Path, part: str | None) -> Path:
    """Return the folder of a part (``train`` by default) if a folder has parts instead of classes; else the folder.

    It has parts if all of its folders have names of parts and contain folders or a table of labels. A warning names
    the parts that are not used. Raises InputError if the part is missing.
    """
    called = {name: part for part, names in PARTS.items() for name in names}
    there = {called.get(entry.name.lower()): Path(entry.path) for entry in subfolders(folder)}
    if not there or None in there or not any(subfolders(path) or table_in(path) for path in there.values()):
        return folder
    wanted = called.get((part or "train").lower(), part or "train")
    names = [path.name for path in there.values()]
    if wanted not in there:
        raise InputError(f"{show(folder)}: has the parts {', '.join(names)}, and no {wanted}; --split names one")
    used = there[wanted]
    if others := [name for name in names if name != used.name]:
        log.warning("%s: its part %s is used, not %s", show(folder), show(used.name), ", ".join(map(show, others)))
    return used


def read(folder: Path) -> Listing:
    """Return the photos of a folder of class folders. A folder without photos is not a class.

    Warnings count the other files. Raises InputError if there is no photo, or two class folders show the same name.
    """
    found, classes = Listing(), []
    others: Counter[str] = Counter()
    empty: list[str] = []
    for entry in subfolders(folder):
        inside = [str(path) for path in images.find(Path(entry.path), others)]
        name = show(entry.name)
        if not inside:
            empty.append(name)
            continue
        if name in classes:
            raise InputError(f"{show(folder)}: two class folders show as {name}; rename the one that is not UTF-8")
        classes.append(name)
        found.paths += inside
        found.labels += [name] * len(inside)
    found.classes = classes
    stray = [entry.name for entry in images.entries(folder) if _is_file(entry)]
    if not classes:
        raise _none_found(folder, stray, others)
    if empty:
        log.warning("%s: folders without images are not classes: %s", show(folder), few(empty))
    if stray:
        log.warning("%s: %s beside the class folders left out", show(folder), counted(len(stray), "file"))
    if others:
        log.warning("%s: left out: %s", show(folder), kinds(others))
    return found


def kinds(others: Counter[str]) -> str:
    """Count the files that are not images by suffix, most frequent first, and name the extra that reads HEIC."""
    said = few([f"{number:,} {suffix or 'without a suffix'}" for suffix, number in others.most_common()])
    return said + ("; pip install 'retrieval-tip[heic]' reads HEIC" if HEIC & others.keys() else "")


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a file or a link to one; a link to itself is neither."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _none_found(folder: Path, stray: list[str], others: Counter[str]) -> InputError:
    direct = sum(Path(name).suffix.lower() in images.extensions() for name in stray)
    if direct:
        return InputError(
            f"{show(folder)}: no images in class folders, but {counted(direct, 'image')} directly in it; expected one "
            f"folder a class with images in it: is {show(folder.absolute().parent)} meant?"
        )
    others = others + Counter(Path(name).suffix.lower() for name in stray)
    here = f" (here: {kinds(others)})" if others else ""
    return InputError(f"{show(folder)}: no images; expected one folder a class with images in it{here}")
