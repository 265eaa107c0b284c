"""Read the folder layouts of the datasets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

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
    listing, known = _variants(folder, split), set(class_names)
    paths, labels = [], []
    for number, image, label in _pairs(listing, "an image number and a variant"):
        if label not in known:
            raise InputError(f"{show(listing)}: line {number}: variant {label!r} is not in {dataset.listing}")
        paths.append(os.path.join(folder, dataset.images[split], f"{image}.jpg"))
        labels.append(label)
    return of_images(paths, show(listing), labels, class_names)


def _variants(folder: Path, split: str) -> Path:
    return folder / f"images_variant_{split}.txt"


def class_folders(dataset: Dataset, folder: Path, split: str) -> Source:
    """Open the class folders of a part in the order of ``classnames.txt``.

    Raises InputError if there are no images, or if a folder is not listed.
    """
    root, by_folder = folder / dataset.images[split], class_names_by_folder(folder / dataset.listing)
    if dataset.layout == "numbered class folders":
        by_folder = {str(number): class_name for number, class_name in enumerate(by_folder.values())}
    there = {entry.name for entry in subfolders(root)}
    if strange := sorted(there - by_folder.keys()):
        which = show(strange[0]) + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
        raise InputError(
            f"{show(root)}: {dataset.listing} has no class name for {which}; expected one folder of images per "
            f"class: {few(list(by_folder))}"
        )
    if len(there) < dataset.classes:
        log.warning("%s: has %d of the %d class folders of %s", show(root), len(there), dataset.classes, dataset.name)
    names = {name: class_name for name, class_name in by_folder.items() if name in there}
    paths, labels = [], []
    for name, class_name in names.items():
        if not (inside := [str(image) for image in images.find(root / name)]):
            log.warning("%s: no images in this class folder", show(root / name))
        paths += inside
        labels += [class_name] * len(inside)
    if not labels:
        raise InputError(f"{show(root)}: no images; expected {LAYOUTS[dataset.layout].images}")
    return of_images(paths, show(root), labels, list(names.values()))


def class_names_by_folder(listing: Path) -> dict[str, str]:
    """Map folders to class names, as listed in ``classnames.txt``. Each line contains a folder, a space and a name.

    If a name occurs twice, as "missile" does in older lists, ``_`` is appended to the second name. Prompts do not
    contain the ``_``. Raises InputError if a line is invalid.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for number, name, class_name in _pairs(listing, "a folder and its class name"):
        if name in names:
            raise InputError(f"{show(listing)}: line {number}: duplicate folder {name}")
        while class_name in taken:
            class_name += "_"
        taken.add(class_name)
        names[name] = class_name
    return names


class _Layout(NamedTuple):
    """A reader, and the expected content of the listing file and of the image folder."""

    read: Callable[[Dataset, Path, str], Source]
    listing: str
    images: str


_WNIDS = "one line per class, with its folder in ImageNet (n01440764) and its name"
LAYOUTS: Mapping[Layout, _Layout] = {
    "split file": _Layout(
        split_file,
        "CoOp's split file, with train, val and test as lists of [path, label, class name]",
        "the images named in the split file",
    ),
    "variant lists": _Layout(variant_lists, "one class name per line", "images named like 0034309.jpg"),
    "class folders": _Layout(class_folders, _WNIDS, "one folder of images per class (n01440764)"),
    "numbered class folders": _Layout(class_folders, _WNIDS, "one folder of images per class (0 to 999)"),
}


def check(dataset: Dataset, folder: Path, split: str) -> None:
    """Raise InputError if the folder, a listing file or the images of a part are missing."""
    layout, images_folder = LAYOUTS[dataset.layout], folder / dataset.images[split]
    files = {folder / dataset.listing: layout.listing}
    if dataset.layout == "variant lists":
        files[_variants(folder, split)] = "one line per image, with its number and its variant"
    if not os.path.isdir(folder):
        inside = [f"{part}/" if part else "its images" for part in dict.fromkeys(dataset.images.values())]
        inside += [file.name for file in files]
        raise InputError(f"{show(folder)}: no such folder; expected a folder with {', '.join(inside)}")
    missing = [
        f"{show(file)}: no such file; expected {look}" for file, look in files.items() if not os.path.isfile(file)
    ]
    if not os.path.isdir(images_folder):
        missing.append(f"{show(images_folder)}: no such folder; expected {layout.images}")
    if missing:
        raise InputError(missing[0] + (f" ({len(missing) - 1} more missing)" if len(missing) > 1 else ""))


def _pairs(file: Path, what: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the first word and the rest of each line. Raises InputError if a line has a single word."""
    for number, line in _lines(file):
        word, *rest = line.split(maxsplit=1)
        if not rest:
            raise InputError(f"{show(file)}: line {number}: expected {what}")
        yield number, word, rest[0]


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
