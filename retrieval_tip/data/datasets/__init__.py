"""The eleven datasets of the papers and four ImageNet variants, in the folder layout that CoOp uses."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from retrieval_tip.data.datasets.facts import Dataset, facts, names
from retrieval_tip.data.datasets.layouts import LAYOUTS, check
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import UsageError

__all__ = ["Dataset", "facts", "names", "open_dataset"]


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
    check(dataset, folder, split)
    return replace(LAYOUTS[dataset.layout].read(dataset, folder, split), dataset=dataset.name)


def _folder(dataset: Dataset, root: Path) -> Path:
    """Return ``root`` if it has the name or the files of the dataset, and a folder inside it otherwise."""
    inside = root / dataset.folder
    if os.path.isdir(inside):
        return inside
    called_so = os.path.basename(os.path.abspath(root)) == dataset.folder
    holds = os.path.isfile(root / dataset.listing) and any(os.path.isdir(root / p) for p in dataset.images.values())
    return root if (called_so and os.path.isdir(root)) or holds else inside
