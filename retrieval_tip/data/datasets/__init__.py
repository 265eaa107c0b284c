"""The eleven datasets of the papers and four variants of ImageNet, by name, where CoOp lays them out on disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from retrieval_tip.data.datasets.facts import Dataset, facts, names
from retrieval_tip.data.datasets.layouts import READERS, lacking, look_into
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError

__all__ = ["Dataset", "check", "facts", "names", "open_dataset"]


def open_dataset(name: str, root: str | os.PathLike[str], split: str) -> Source:
    """Open the labelled images of a part of a dataset.

    ``name`` is as in :func:`facts`; ``root`` the folder of all datasets, or the dataset's own; ``split`` is ``train``,
    ``val`` or ``test``. ImageNet has no ``val``: its images/val is the test part, and its variants have only ``test``.

    Raises UsageError for an unknown name or part; InputError for a missing or damaged file or folder, with how it
    should look. Missing images are reported by the code that reads them.
    """
    dataset = facts(name)
    if split not in dataset.images:
        parts = ", ".join(dataset.images)
        reason = "; its images/val is its test part" if (dataset.name, split) == ("ImageNet", "val") else ""
        raise UsageError(f"{dataset.name} has no part {split!r}, it has {parts}{reason}; give another --split")
    folder = _folder(dataset, Path(root))
    missing = lacking(dataset, folder, (split,))
    if missing:
        raise InputError(missing[0] + (f" ({len(missing) - 1} more missing)" if len(missing) > 1 else ""))
    return replace(READERS[dataset.layout](dataset, folder, split), dataset=dataset.name)


def check(name: str, root: str | os.PathLike[str]) -> list[str]:
    """List what is missing or damaged in a dataset below ``root``, and how it should look, a line each.

    Checks folders, lists, the number of classes, and that a sample of the images of each part exists. Raises UsageError
    for an unknown name.
    """
    dataset = facts(name)
    folder = _folder(dataset, Path(root))
    problems = lacking(dataset, folder, tuple(dataset.images))
    if problems:
        return problems
    for split in dataset.images:
        try:
            problems += look_into(dataset, folder, split)
        except InputError as error:
            problems.append(str(error))
        except OSError as error:  # a folder that may not be entered
            problems.append(f"{error.filename or folder}: {error.strerror or error}")
    return list(dict.fromkeys(problems))


def _folder(dataset: Dataset, root: Path) -> Path:
    """Return the dataset's folder: in ``root``, or ``root`` itself if its name or its files are the dataset's."""
    inside = root / dataset.folder
    if os.path.isdir(inside):
        return inside
    called_so = os.path.basename(os.path.abspath(root)) == dataset.folder
    holds = os.path.isfile(root / dataset.listing) and any(os.path.isdir(root / p) for p in dataset.images.values())
    return root if (called_so and os.path.isdir(root)) or holds else inside
