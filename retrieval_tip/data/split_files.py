"""Read CoOp split files.

These are JSON files in which ``train``, ``val`` and ``test`` are lists of ``[path, label, class name]``.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from retrieval_tip.data import folders
from retrieval_tip.data.source import Source, of_images
from retrieval_tip.errors import InputError, few, show


def read(file: Path, data: object, split: str, root: str | os.PathLike[str] | None) -> Source:
    """Read one part of a split file with this JSON ``data``. The classes are sorted by label number.

    Paths are relative to ``root``, which defaults to the folder of the split file or the folder inside it that contains
    the images. Raises InputError if an entry is invalid.
    """
    name = f"{show(file)} ({split})"
    entries: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    for row, entry in enumerate(_part(file, data, split)):
        match entry:
            case [str() as path, int() as label, str() as class_name] if type(label) is int and class_name.strip():
                entries.append((path, show(class_name)))
            case _:
                raise InputError(f"{name}: entry {row} is not [path, label, class name]")
        if names.setdefault(label, class_name) != class_name:
            raise InputError(
                f"{name}: entry {row} gives label {label} the name {class_name!r}; an earlier one {names[label]!r}"
            )
    if not entries:
        raise InputError(f"{name}: empty")
    classes = [show(names[label]) for label in sorted(names)]
    if twice := [class_name for class_name, times in Counter(classes).items() if times > 1]:
        raise InputError(f"{name}: several labels have the class name {twice[0]!r}")
    folder = root or _image_root(file, [path for path, _ in entries])
    paths = [os.path.join(folder, path) for path, _ in entries]
    return of_images(paths, name, [label for _, label in entries], classes)


def _part(file: Path, data: object, split: str) -> list[object]:
    if not isinstance(data, dict) or split not in data:
        has = few(list(map(repr, data))) if isinstance(data, dict) else "none"
        raise InputError(f"{show(file)}: no part {split!r}; expected train, val and test, found {has}")
    return data[split] if isinstance(data[split], list) else [None]


def _image_root(file: Path, paths: list[str]) -> Path:
    """Return the folder (of the split file, or inside it) that contains the most images of a sample."""
    sample = paths[:: max(1, len(paths) // 16)]

    def held(folder: Path) -> int:
        return sum(os.path.isfile(folder / path) for path in sample)

    best = max([file.parent, *(Path(entry.path) for entry in folders.subfolders(file.parent))], key=held)
    if not held(best):
        raise InputError(f"{show(file)}: cannot find its images (such as {show(sample[0])[:200]}); give --root FOLDER")
    return best
