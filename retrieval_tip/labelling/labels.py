"""Save the labels of a labelling session in an index, and read what the index knows about the photos."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import normalize

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.remote import is_remote
from retrieval_tip.data.sources import Source, of_images
from retrieval_tip.errors import show
from retrieval_tip.index import places
from retrieval_tip.index.build import build_index
from retrieval_tip.labelling.queue import Picked
from retrieval_tip.model import Index
from retrieval_tip.store.labels import PICKED, WITHDRAWN

NONE = "none of these"
"""Class of photos that belong to no other class."""
GUESSES = 9
"""Maximum number of guesses per photo."""
ALIKE, MOST_ALIKE = 0.8, 12
"""Lowest cosine of near-identical photos after subtracting the mean of all photos, and their maximum number."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledPhoto:
    """A labelled photo: its key in the index, its label, how it was chosen, if known, and the digest of its bytes."""

    key_id: int
    label: str
    picked: Picked | None
    digest: str | None


@dataclass(frozen=True)
class Label:
    """The label of a photo, and how the photo was chosen. A label of ``None`` removes the label of the photo."""

    label: str | None
    picked: Picked


def picked_of(text: str | None) -> Picked:
    """Return how a photo was chosen, given the text in a journal."""
    return next((picked for picked in get_args(Picked) if picked == text), "suggested")


def absolute(path: str) -> str:
    """Return the absolute path of a photo. Links are kept, and addresses of object stores do not change."""
    return path if is_remote(path) else os.path.abspath(path)  # noqa: PTH100 - resolve() follows links


def known_photos(
    index: Index, numbers: Mapping[str, int], digests: Mapping[str, Sequence[int]]
) -> tuple[dict[int, LabelledPhoto], list[LabelledPhoto]]:
    """Return the labelled photos by number, and the keys whose label was withdrawn.

    A photo that has been read is recognised by its digest, and any other photo by its path until it is read.
    ``digests`` maps the digests of the photos that have been read to their numbers. ``numbers`` maps the absolute paths
    of the other photos, as text, to their numbers.
    """
    labels = index.labels
    picked = labels[PICKED] if PICKED in labels.column_names else pa.nulls(len(labels), pa.string())
    rows = labels.select(["key_id", "label", "digest", "source"]).append_column(PICKED, picked)
    wanted = {"source": numbers, "digest": digests, PICKED: [WITHDRAWN]}
    found = (pc.is_in(rows[name], value_set=pa.array(values, pa.string())) for name, values in wanted.items())
    known: dict[int, LabelledPhoto] = {}
    withdrawn = []
    for row in rows.filter(reduce(pc.or_, found)).to_pylist():
        one = LabelledPhoto(row["key_id"], row["label"], row[PICKED], row["digest"])
        if row[PICKED] == WITHDRAWN:
            withdrawn.append(one)
            continue
        for photo in [*digests.get(row["digest"], ()), *([numbers[row["source"]]] if row["source"] in numbers else [])]:
            known.setdefault(photo, one)
    return known, withdrawn


def build_from_labels(
    place: places.Place, photos: Source, reader: Reader, labels: Mapping[int, Label], classes: Sequence[str] = ()
) -> None:
    """Build a new index from labelled photos.

    ``labels`` maps the numbers of ``photos`` to their labels. An index of an encoder with text also knows the names of
    ``classes``. Raises the errors of :func:`build.build_index`.
    """
    assert photos.paths is not None
    names = [str(one.label) for one in labels.values()]
    has_text = reader.backbone is not None and reader.backbone.has_text
    own = dict.fromkeys([*(classes if has_text else ()), *names])
    paths = [photos.paths[photo] for photo in labels]
    source = of_images(paths, photos.name, names, list(own))
    items = source.items.set_column(0, "source", pa.array([show(absolute(path)) for path in paths], pa.string()))
    picked = pa.array([one.picked for one in labels.values()], pa.string())
    build_index(replace(source, items=items.append_column(PICKED, picked)), place, reader)


def guesses(index: Index, features: FloatArray) -> list[dict[str, float]]:
    """Return the most probable classes of each photo with their probabilities, most probable first."""
    answers = index.classify(features, "keep", top=GUESSES, neighbours=0, logits=False)
    return [dict(zip(one.labels, one.probabilities, strict=True)) for one in answers]


def alike(features: FloatArray, rows: Sequence[int]) -> list[list[int]]:
    """Return the rows of the photos that are near-identical to the photos at ``rows``, most similar first."""
    points = torch.from_numpy(features)
    points = normalize(points - points.mean(0))
    cosines = points[rows] @ points.T
    cosines[range(len(rows)), rows] = -1
    found = cosines.topk(min(MOST_ALIKE, len(points)))
    return [near[own >= ALIKE].tolist() for near, own in zip(found.indices, found.values, strict=True)]
