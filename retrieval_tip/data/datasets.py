"""The eleven datasets of the papers and four ImageNet variants, in the folder layout that CoOp uses."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retrieval_tip.data import folders
from retrieval_tip.data.sources import Source, of_images, open_source
from retrieval_tip.data.tables import MAX_TEXT, reading
from retrieval_tip.errors import InputError, UsageError, few, show
from retrieval_tip.files import read_regular

log = logging.getLogger(__name__)

MAX_LISTING = 1 << 26  # largest size of a list of classes or images, in bytes

PHOTO = ("a photo of a {}.",)
IMAGENET = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True)
class Dataset:
    """Facts about a dataset. Its class names are read from its files."""

    name: str  # as the papers write it
    folder: str  # path inside the folder of all datasets (``DATA`` in CoOp)
    listing: str  # file that names the classes: a CoOp split file, variants.txt or classnames.txt
    images: Mapping[str, str]  # image folder of each part, relative to ``folder``; "" stands for ``folder``
    classes: int  # number of classes
    templates: tuple[str, ...] = PHOTO  # prompt templates, whose features are averaged
    aliases: tuple[str, ...] = ()  # other accepted names


def _all(folder: str) -> dict[str, str]:
    return dict.fromkeys(("train", "val", "test"), folder)


# fmt: off
DATASETS = (
    # ImageNet results are usually reported on images/val, so it is the test part and there is no validation part.
    Dataset("ImageNet", "imagenet", "classnames.txt", {"train": "images/train", "test": "images/val"}, 1000, IMAGENET,
            ("imagenet-1k", "ilsvrc2012")),
    Dataset("Caltech101", "caltech-101", "split_zhou_Caltech101.json", _all("101_ObjectCategories"), 100,
            aliases=("caltech",)),
    Dataset("OxfordPets", "oxford_pets", "split_zhou_OxfordPets.json", _all("images"), 37,
            ("a photo of a {}, a type of pet.",), ("pets",)),
    Dataset("StanfordCars", "stanford_cars", "split_zhou_StanfordCars.json", _all(""), 196, aliases=("cars",)),
    Dataset("Flowers102", "oxford_flowers", "split_zhou_OxfordFlowers.json", _all("jpg"), 102,
            ("a photo of a {}, a type of flower.",), ("flowers", "oxford-flowers-102")),
    Dataset("Food101", "food-101", "split_zhou_Food101.json", _all("images"), 101,
            ("a photo of {}, a type of food.",), ("food",)),
    Dataset("FGVCAircraft", "fgvc_aircraft", "variants.txt", _all("images"), 100,
            ("a photo of a {}, a type of aircraft.",), ("fgvc", "aircraft")),
    Dataset("SUN397", "sun397", "split_zhou_SUN397.json", _all("SUN397"), 397, aliases=("sun",)),
    Dataset("DTD", "dtd", "split_zhou_DescribableTextures.json", _all("images"), 47, ("{} texture.",),
            ("describable-textures",)),
    Dataset("EuroSAT", "eurosat", "split_zhou_EuroSAT.json", _all("2750"), 10,
            ("a centered satellite photo of {}.",)),
    Dataset("UCF101", "ucf101", "split_zhou_UCF101.json", _all("UCF-101-midframes"), 101,
            ("a photo of a person doing {}.",), ("ucf",)),
    # These are test sets for an ImageNet index, with the prompts of ImageNet. The folders of V2 are numbered.
    Dataset("ImageNet-V2", "imagenetv2", "classnames.txt", {"test": "imagenetv2-matched-frequency-format-val"}, 1000,
            IMAGENET),
    Dataset("ImageNet-Sketch", "imagenet-sketch", "classnames.txt", {"test": "images"}, 1000, IMAGENET),
    Dataset("ImageNet-A", "imagenet-adversarial", "classnames.txt", {"test": "imagenet-a"}, 200, IMAGENET),
    Dataset("ImageNet-R", "imagenet-rendition", "classnames.txt", {"test": "imagenet-r"}, 200, IMAGENET),
)
# fmt: on


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " -_")


_BY_NAME = {_plain(name): row for row in DATASETS for name in (row.name, row.folder, *row.aliases)}


def names() -> list[str]:
    """Return the dataset names in the order of the papers, followed by the ImageNet variants."""
    return [row.name for row in DATASETS]


def facts(name: str) -> Dataset:
    """Return the facts about a dataset, given its name, folder or alias. Raises UsageError if the name is unknown.

    Case, spaces, hyphens and underscores are ignored.
    """
    row = _BY_NAME.get(_plain(name))
    if row is None:
        raise UsageError(f"dataset {name!r}: unknown; choose from {', '.join(names())}")
    return row


def open_dataset(name: str, root: str | os.PathLike[str], split: str) -> Source:
    """Open the labelled images of one part of a dataset.

    Args:
        name: The name of the dataset, as in :func:`facts`.
        root: The folder that contains all datasets, or the folder of this dataset.
        split: ``train``, ``val`` or ``test``. ImageNet has no ``val`` part, since its images/val is used as the test
            part. The ImageNet variants only have a ``test`` part.

    Raises UsageError if the name or the part is unknown. Raises InputError if a file or folder is missing or damaged.
    Missing images are reported when they are read.
    """
    dataset = facts(name)
    if split not in dataset.images:
        reason = " (its images/val is the test part)" if (dataset.name, split) == ("ImageNet", "val") else ""
        raise UsageError(f"{dataset.name}: no part {split!r}{reason}; choose --split from {', '.join(dataset.images)}")
    folder = _folder(dataset, Path(root))
    listing, images = folder / dataset.listing, folder / dataset.images[split]
    variants = folder / f"images_variant_{split}.txt" if dataset.listing == "variants.txt" else listing
    parts = [f"{part}/" if part else "its images" for part in dict.fromkeys(dataset.images.values())]
    expected = ", ".join([*parts, *dict.fromkeys((listing.name, variants.name))])
    for place, kind in ((folder, "folder"), (listing, "file"), (variants, "file"), (images, "folder")):
        if not (os.path.isdir(place) if kind == "folder" else os.path.isfile(place)):
            raise InputError(f"{show(place)}: no such {kind}; expected a folder with {expected}")
    if variants != listing:
        source = _variants(listing, variants, images)
    elif listing.suffix == ".txt":
        source = _class_folders(dataset, listing, images)
    else:
        source = open_source(listing, split=split, root=images)
    return replace(source, dataset=dataset.name)


def _folder(dataset: Dataset, root: Path) -> Path:
    """Return ``root`` if it has the name or the files of the dataset, and a folder inside it otherwise."""
    inside = root / dataset.folder
    if os.path.isdir(inside):
        return inside
    called_so = os.path.basename(os.path.abspath(root)) == dataset.folder
    holds = os.path.isfile(root / dataset.listing) and any(os.path.isdir(root / p) for p in dataset.images.values())
    return root if (called_so and os.path.isdir(root)) or holds else inside


def _variants(listing: Path, variants: Path, images: Path) -> Source:
    """Open a part of FGVC-Aircraft, whose lists contain an image number and a variant on each line."""
    class_names = [line for _, line in _lines(listing)]
    if twice := [name for name, times in Counter(class_names).items() if times > 1]:
        raise InputError(f"{show(listing)}: duplicate class name {twice[0]!r}")
    known = set(class_names)
    paths, labels = [], []
    for number, image, label in _pairs(variants, "an image number and a variant"):
        if label not in known:
            raise InputError(f"{show(variants)}: line {number}: variant {label!r} is not in {listing.name}")
        paths.append(os.path.join(images, f"{image}.jpg"))
        labels.append(label)
    return of_images(paths, show(variants), labels, class_names)


def _class_folders(dataset: Dataset, listing: Path, images: Path) -> Source:
    """Open class folders in the order of ``classnames.txt``, and label them with its class names."""
    names = _class_names(listing)
    if dataset.folder == "imagenetv2":
        names = {str(number): class_name for number, class_name in enumerate(names.values())}
    source = folders.read(images)
    if strange := [name for name in source.class_names if name not in names]:
        raise InputError(
            f"{source.name}: {listing.name} has no class name for {few(strange)}; expected one folder of images per "
            f"class: {few(list(names))}"
        )
    if (there := len(source.class_names)) < dataset.classes:
        log.warning("%s: has %d of the %d class folders of %s", source.name, there, dataset.classes, dataset.name)
    order = {name: position for position, name in enumerate(names)}
    source = source.take(np.argsort([order[label] for label in source.labels], kind="stable"))
    labels = [names[label] for label in source.labels]
    return of_images(source.paths or (), source.name, labels, tuple(dict.fromkeys(labels)))


def _class_names(listing: Path) -> dict[str, str]:
    """Map folders to class names. A second "missile", as in older lists, gets a ``_``, which prompts do not contain."""
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


def _pairs(file: Path, what: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the first word and the rest of each line."""
    for number, line in _lines(file):
        word, *rest = line.split(maxsplit=1)
        if not rest:
            raise InputError(f"{show(file)}: line {number}: expected {what}")
        yield number, word, rest[0]


def _lines(file: Path) -> list[tuple[int, str]]:
    with reading(show(file)):
        text = read_regular(file, MAX_LISTING).decode("utf-8-sig")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{show(file)}: empty")
    if long := [number for number, line in lines if len(line) > MAX_TEXT]:
        raise InputError(f"{show(file)}: line {long[0]} is longer than {MAX_TEXT} characters")
    return lines
