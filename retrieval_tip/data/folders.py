"""Folders of photographs as people have them: one folder a class, perhaps in parts, with other things in between."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from retrieval_tip.data import images
from retrieval_tip.errors import InputError, counted, few, show

log = logging.getLogger(__name__)

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The parts of a dataset, and what their folders are called."""

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""In a folder, what says the labels of its images (Hugging Face's image folders)."""

HEIC = frozenset({".heic", ".heif", ".hif"})
"""What telephones take, and only the extra ``heic`` reads."""


@dataclass(frozen=True)
class ClassFolders:
    """The photographs ``paths`` of a folder in the order of its ``classes``, and the class of each (``labels``)."""

    classes: list[str]
    paths: list[str]
    labels: list[str]


def subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """The folders in a folder, in name order, without the hidden ones."""
    return [entry for entry in images.entries(folder) if images.is_folder(entry)]


def table_in(folder: Path) -> Path | None:
    """The file that says the labels of a folder's images, where it has one of ``TABLES``."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def part_of(folder: Path, part: str | None) -> Path:
    """The folder of a part (``train`` by default) where a folder has parts in place of classes; else the folder itself.

    It has where each of its folders is called like a part, and holds folders in turn or a table of its images. Which
    part is used, and which are not, is said. Raises InputError where it has not got this part.
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


def read(folder: Path) -> ClassFolders:
    """The classes and photographs of a folder of class folders. Folders without photographs are no classes.

    What was left out is said, by its kinds. Raises InputError where there is no photograph, or two class folders have
    names that show alike.
    """
    found = ClassFolders([], [], [])
    others: Counter[str] = Counter()
    empty: list[str] = []
    for entry in subfolders(folder):
        inside = [str(path) for path in images.find(Path(entry.path), others)]
        name = show(entry.name)
        if not inside:
            empty.append(name)
            continue
        if name in found.classes:
            raise InputError(f"{show(folder)}: two class folders show as {name}; rename the one that is not UTF-8")
        found.classes.append(name)
        found.paths.extend(inside)
        found.labels.extend([name] * len(inside))
    stray = [entry.name for entry in images.entries(folder) if _is_file(entry)]
    if not found.paths:
        raise _none_found(folder, stray, others)
    if empty:
        log.warning("%s: left out as classes, for they hold no images: %s", show(folder), few(empty))
    if stray:
        log.warning("%s: %s beside the class folders left out", show(folder), counted(len(stray), "file"))
    if others:
        log.warning("%s: left out: %s", show(folder), kinds(others))
    return found


def kinds(others: Counter[str]) -> str:
    """Files that are no images, by their suffixes, the most first, and what reads those that are photographs."""
    said = few([f"{number:,} {suffix or 'without a suffix'}" for suffix, number in others.most_common()])
    return said + ("; pip install 'retrieval-tip[heic]' reads HEIC" if HEIC & others.keys() else "")


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file or a link to one; a link to itself is neither."""
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
