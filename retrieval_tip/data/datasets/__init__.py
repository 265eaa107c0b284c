"""The papers' eleven datasets and four variants of ImageNet, in CoOp's folder layout."""

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
    """Open the labelled images of one part of a dataset.

    Args:
        name: see :func:`facts`.
        root: the folder of all datasets, or the dataset's own.
        split: ``train``, ``val`` or ``test``. ImageNet has no ``val``: its images/val is the test part. Its variants
            have only ``test``.

    Raises UsageError for an unknown name or part; InputError for a missing or damaged file or folder, with the expected
    layout. Missing images are reported when they are read.
    """
    dataset = facts(name)
    if split not in dataset.images:
        reason = " (its images/val is the test part)" if (dataset.name, split) == ("ImageNet", "val") else ""
        raise UsageError(f"{dataset.name}: no part {split!r}{reason}; choose --split from {', '.join(dataset.images)}")
    folder = _folder(dataset, Path(root))
    missing = lacking(dataset, folder, (split,))
    if missing:
        raise InputError(missing[0] + (f" ({len(missing) - 1} more missing)" if len(missing) > 1 else ""))
    return replace(READERS[dataset.layout](dataset, folder, split), dataset=dataset.name)


def check(name: str, root: str | os.PathLike[str]) -> list[str]:
    """List problems of a dataset below ``root``, one line each. Raises UsageError for an unknown name."""
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
        except OSError as error:  # no permission to enter a folder
            problems.append(f"{error.filename or folder}: {error.strerror or error}")
    return list(dict.fromkeys(problems))


def _folder(dataset: Dataset, root: Path) -> Path:
    """Return the dataset's folder: ``root`` itself if it has the name or the files of the dataset, else one in it."""
    inside = root / dataset.folder
    if os.path.isdir(inside):
        return inside
    called_so = os.path.basename(os.path.abspath(root)) == dataset.folder
    holds = os.path.isfile(root / dataset.listing) and any(os.path.isdir(root / p) for p in dataset.images.values())
    return root if (called_so and os.path.isdir(root)) or holds else inside
