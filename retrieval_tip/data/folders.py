"""Read folders of photos that contain one folder per class, possibly inside ``train``, ``val`` and ``test``."""

from __future__ import annotations

import logging
import os
from collections import Counter
from itertools import chain
from pathlib import Path

from retrieval_tip.data import images
from retrieval_tip.data.source import Source, of_images
from retrieval_tip.errors import InputError, counted, few, install, show

log = logging.getLogger(__name__)

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
"""Folder names for each part of a dataset."""

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # label tables in Hugging Face image folders

HEIC = frozenset({".heic", ".heif", ".hif"})  # suffixes of phone photos that require the extra ``heic``


def subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """List the visible folders in a folder, sorted by name."""
    return [entry for entry in images.entries(folder) if images.is_folder(entry)]


def table_in(folder: Path) -> Path | None:
    """Return the first of ``TABLES`` that exists in a folder, or ``None``."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def part_of(folder: Path, part: str | None) -> Path:
    """Return the folder of a part, which defaults to ``train``, or ``folder`` itself if it has no parts.

    A folder has parts if each folder in it is named like a part, and one of them contains folders or a label table.
    Raises InputError if the part is missing.
    """
    called = {name: part for part, names in PARTS.items() for name in names}
    there = {called.get(entry.name.lower()): Path(entry.path) for entry in subfolders(folder)}
    if not there or None in there or not any(subfolders(path) or table_in(path) for path in there.values()):
        return folder
    wanted = called.get((part or "train").lower(), part or "train")
    names = [path.name for path in there.values()]
    if wanted not in there:
        raise InputError(f"{show(folder)}: there is no part {wanted!r}; choose one with --split: {', '.join(names)}")
    used = there[wanted]
    if others := [name for name in names if name != used.name]:
        log.warning("%s: using its part %s, ignoring %s", show(folder), show(used.name), ", ".join(map(show, others)))
    return used


def read(folder: Path) -> Source:
    """Open the photos in class folders, and warn about other files. Raises InputError if there are no photos."""
    others: Counter[str] = Counter()
    photos: dict[str, list[str]] = {}
    for entry in subfolders(folder):
        if (name := show(entry.name)) in photos:
            raise InputError(f"{show(folder)}: two class folders are called {name}; rename the one that is not UTF-8")
        photos[name] = [str(path) for path in images.find(Path(entry.path), others)]
    empty = [name for name, paths in photos.items() if not paths]
    stray = [entry.name for entry in images.entries(folder) if os.path.isfile(entry.path)]
    if len(empty) == len(photos):
        raise _none_found(folder, stray, others)
    if empty:
        log.warning("%s: ignored folders without images: %s", show(folder), few(empty))
    if stray:
        log.warning("%s: ignored %s outside the class folders", show(folder), counted(len(stray), "file"))
    if others:
        log.warning("%s: ignored files that are not images: %s", show(folder), kinds(others))
    labels = [name for name, paths in photos.items() for _ in paths]
    return of_images(list(chain.from_iterable(photos.values())), show(folder), labels, tuple(dict.fromkeys(labels)))


def kinds(others: Counter[str]) -> str:
    """Describe the numbers of files by suffix, starting with the most frequent suffix."""
    text = few([f"{number:,} {suffix or 'without a suffix'}" for suffix, number in others.most_common()])
    return text + (f"; to read HEIC, run {install('heic')}" if HEIC & others.keys() else "")


def _none_found(folder: Path, stray: list[str], others: Counter[str]) -> InputError:
    direct = sum(Path(name).suffix.lower() in images.extensions() for name in stray)
    if direct:
        return InputError(
            f"{show(folder)}: there are no class folders, but {counted(direct, 'image')} directly in it; give the "
            f"folder that contains one folder of images per class (perhaps {show(folder.absolute().parent)})"
        )
    others = others + Counter(Path(name).suffix.lower() for name in stray)
    here = f" (found {kinds(others)})" if others else ""
    return InputError(f"{show(folder)}: no images; expected one folder of images per class{here}")
