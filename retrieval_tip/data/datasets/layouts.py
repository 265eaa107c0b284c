"""Read the folder layouts of the datasets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval_tip.data import images
from retrieval_tip.data.datasets.facts import Dataset, Layout
from retrieval_tip.data.folders import subfolders
from retrieval_tip.data.sources import Source, of_images, open_source
from retrieval_tip.data.tables import MAX_TEXT
from retrieval_tip.errors import InputError, few, show
from retrieval_tip.files import read_regular

log = logging.getLogger(__name__)

MAX_LISTING = 1 << 26  # largest size of a list of classes or images, in bytes


def split_file(dataset: Dataset, folder: Path, split: str) -> Source:
    """Open a part of a CoOp split file. The paths in the file are relative to the image folder."""
    return open_source(folder / dataset.listing, split=split, root=str(folder / dataset.images[split]))


def variant_lists(dataset: Dataset, folder: Path, split: str) -> Source:
    """Open FGVC-Aircraft, whose lists contain an image number and a variant on each line.

    Raises InputError if a list is missing or damaged.
    """
    class_names = [line for _, line in _lines(folder / dataset.listing)]
    if twice := [name for name, times in Counter(class_names).items() if times > 1]:
        raise InputError(f"{show(folder / dataset.listing)}: duplicate class name {twice[0]!r}")
    known = set(class_names)
    listing = folder / f"images_variant_{split}.txt"
    paths, labels = [], []
    for number, line in _lines(listing):
        image, *rest = line.split(maxsplit=1)
        if not rest:
            raise InputError(f"{show(listing)}: line {number}: expected an image number and a variant")
        label = rest[0]
        if label not in known:
            raise InputError(f"{show(listing)}: line {number}: variant {label!r} is not in {dataset.listing}")
        paths.append(os.path.join(folder, dataset.images[split], f"{image}.jpg"))
        labels.append(label)
    return of_images(paths, show(listing), labels, class_names)


def class_folders(dataset: Dataset, folder: Path, split: str) -> Source:
    """Open the class folders of a part in the order of ``classnames.txt``. Raises InputError if there are no images."""
    root, folders = folder / dataset.images[split], named_folders(dataset, folder, split)
    if len(folders) < dataset.classes:
        log.warning("%s: has %d of the %d class folders of %s", show(root), len(folders), dataset.classes, dataset.name)
    inside = {class_name: [str(image) for image in images.find(path)] for class_name, path in folders.items()}
    for class_name in [class_name for class_name, own in inside.items() if not own]:
        log.warning("%s: no images in this class folder", show(folders[class_name]))
    labels = [class_name for class_name, own in inside.items() for _ in own]
    if not labels:
        raise InputError(f"{show(root)}: no images; expected {EXPECTED[dataset.layout][1]}")
    return of_images([path for own in inside.values() for path in own], show(root), labels, list(folders))


def named_folders(dataset: Dataset, folder: Path, split: str) -> dict[str, Path]:
    """Map class names to folders in the order of ``classnames.txt``. Raises InputError if a folder is not listed."""
    listing, root = folder / dataset.listing, folder / dataset.images[split]
    by_folder = class_names_by_folder(listing)
    if dataset.layout == "numbered class folders":
        by_folder = {str(number): class_name for number, class_name in enumerate(by_folder.values())}
    there = {entry.name for entry in subfolders(root)}
    if strange := sorted(there - by_folder.keys()):
        which = show(strange[0]) + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
        raise InputError(
            f"{show(root)}: {dataset.listing} has no class name for {which}; expected one folder of images per "
            f"class: {few(list(by_folder))}"
        )
    return {class_name: root / name for name, class_name in by_folder.items() if name in there}


def class_names_by_folder(listing: Path) -> dict[str, str]:
    """Map folders to class names, as listed in ``classnames.txt``. Each line contains a folder, a space and a name.

    If a name occurs twice, as "missile" does in older lists, ``_`` is appended to the second name. Prompts do not
    contain the ``_``. Raises InputError if a line is invalid.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for number, line in _lines(listing):
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise InputError(f"{show(listing)}: line {number}: expected a folder and its class name")
        if name in names:
            raise InputError(f"{show(listing)}: line {number}: duplicate folder {name}")
        class_name = rest[0]
        while class_name in taken:
            class_name += "_"
        taken.add(class_name)
        names[name] = class_name
    return names


READERS: Mapping[Layout, Callable[[Dataset, Path, str], Source]] = {
    "split file": split_file,
    "variant lists": variant_lists,
    "class folders": class_folders,
    "numbered class folders": class_folders,
}


def lacking(dataset: Dataset, folder: Path, splits: tuple[str, ...]) -> list[str]:
    """Return a message for each missing folder or listing file of these parts, with its expected content."""
    listing, images_look = EXPECTED[dataset.layout]
    files = {folder / dataset.listing: listing}
    if dataset.layout == "variant lists":
        line = "one line per image, with its number and its variant"
        files |= {folder / f"images_variant_{split}.txt": line for split in splits}
    if not os.path.isdir(folder):
        inside = [f"{part}/" if part else "its images" for part in dict.fromkeys(dataset.images.values())]
        inside += [file.name for file in files]
        return [f"{show(folder)}: no such folder; expected a folder with {', '.join(inside)}"]
    missing = [
        f"{show(file)}: no such file; expected {look}" for file, look in files.items() if not os.path.isfile(file)
    ]
    parts = dict.fromkeys(folder / dataset.images[split] for split in splits)
    return missing + [
        f"{show(part)}: no such folder; expected {images_look}" for part in parts if not os.path.isdir(part)
    ]


EXPECTED: Mapping[Layout, tuple[str, str]] = {
    "split file": (
        "CoOp's split file, with train, val and test as lists of [path, label, class name]",
        "the images named in the split file",
    ),
    "variant lists": ("one class name per line", "images named like 0034309.jpg"),
    "class folders": (
        "one line per class, with its folder (n01440764) and its name",
        "one folder of images per class (n01440764)",
    ),
    "numbered class folders": (
        "one line per class, with its folder in ImageNet (n01440764) and its name",
        "one folder of images per class (0 to 999)",
    ),
}
"""The listing file and the images that each layout expects."""


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = read_regular(file, MAX_LISTING).decode("utf-8-sig")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{show(file)}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{show(file)}: not UTF-8 text (byte {error.start})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{show(file)}: empty")
    if long := [number for number, line in lines if len(line) > MAX_TEXT]:
        raise InputError(f"{show(file)}: line {long[0]} is longer than {MAX_TEXT} characters")
    return lines
