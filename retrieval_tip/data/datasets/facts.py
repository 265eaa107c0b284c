"""The folder and the prompts of each dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from retrieval_tip.errors import UsageError

Layout = Literal["split file", "variant lists", "class folders", "numbered class folders"]

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
    layout: Layout  # how its images are listed
    images: Mapping[str, str]  # image folder of each part, relative to ``folder``; "" stands for ``folder``
    listing: str  # file that names the classes (split file, variants.txt or classnames.txt)
    classes: int  # number of classes
    templates: tuple[str, ...]  # prompt templates, whose features are averaged
    aliases: tuple[str, ...] = ()  # other accepted names


def _all(folder: str) -> dict[str, str]:
    return dict.fromkeys(("train", "val", "test"), folder)


# fmt: off
DATASETS = (
    # ImageNet results are usually reported on images/val, so it is the test part and there is no validation part.
    Dataset("ImageNet", "imagenet", "class folders", {"train": "images/train", "test": "images/val"},
            "classnames.txt", 1000, IMAGENET, aliases=("imagenet-1k", "ilsvrc2012")),
    Dataset("Caltech101", "caltech-101", "split file", _all("101_ObjectCategories"),
            "split_zhou_Caltech101.json", 100, PHOTO, aliases=("caltech",)),
    Dataset("OxfordPets", "oxford_pets", "split file", _all("images"),
            "split_zhou_OxfordPets.json", 37, ("a photo of a {}, a type of pet.",), aliases=("pets",)),
    Dataset("StanfordCars", "stanford_cars", "split file", _all(""),
            "split_zhou_StanfordCars.json", 196, PHOTO, aliases=("cars",)),
    Dataset("Flowers102", "oxford_flowers", "split file", _all("jpg"),
            "split_zhou_OxfordFlowers.json", 102, ("a photo of a {}, a type of flower.",),
            aliases=("flowers", "oxford-flowers-102")),
    Dataset("Food101", "food-101", "split file", _all("images"),
            "split_zhou_Food101.json", 101, ("a photo of {}, a type of food.",), aliases=("food",)),
    Dataset("FGVCAircraft", "fgvc_aircraft", "variant lists", _all("images"),
            "variants.txt", 100, ("a photo of a {}, a type of aircraft.",),
            aliases=("fgvc", "aircraft")),
    Dataset("SUN397", "sun397", "split file", _all("SUN397"),
            "split_zhou_SUN397.json", 397, PHOTO, aliases=("sun",)),
    Dataset("DTD", "dtd", "split file", _all("images"),
            "split_zhou_DescribableTextures.json", 47, ("{} texture.",),
            aliases=("describable-textures",)),
    Dataset("EuroSAT", "eurosat", "split file", _all("2750"),
            "split_zhou_EuroSAT.json", 10, ("a centered satellite photo of {}.",)),
    Dataset("UCF101", "ucf101", "split file", _all("UCF-101-midframes"),
            "split_zhou_UCF101.json", 101, ("a photo of a person doing {}.",), aliases=("ucf",)),
    # These are test sets for an ImageNet index, with the prompts of ImageNet.
    Dataset("ImageNet-V2", "imagenetv2", "numbered class folders",
            {"test": "imagenetv2-matched-frequency-format-val"},
            "classnames.txt", 1000, IMAGENET),
    Dataset("ImageNet-Sketch", "imagenet-sketch", "class folders", {"test": "images"},
            "classnames.txt", 1000, IMAGENET),
    Dataset("ImageNet-A", "imagenet-adversarial", "class folders", {"test": "imagenet-a"},
            "classnames.txt", 200, IMAGENET),
    Dataset("ImageNet-R", "imagenet-rendition", "class folders", {"test": "imagenet-r"},
            "classnames.txt", 200, IMAGENET),
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
