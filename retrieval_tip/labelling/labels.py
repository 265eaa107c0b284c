"""Save the labels of a labelling session in an index, and read what the index knows about the photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import normalize

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, of_images
from retrieval_tip.index import changes, places
from retrieval_tip.index.build import build_index
from retrieval_tip.labelling.queue import Picked

PICKED = "picked"
"""Column of the label store that tells how a photo was chosen (see :data:`queue.Picked`)."""
NONE = "none of these"
"""Class of photos that belong to no other class."""
GUESSES = 9
"""Maximum number of guesses per photo."""
ALIKE, MOST_ALIKE = 0.8, 12
"""Lowest cosine of near-identical photos after subtracting the mean of all photos, and their maximum number."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledPhoto:
    """A labelled photo: its key in the index, its label, and how it was chosen, if known."""

    key_id: int
    label: str
    picked: Picked | None


@dataclass(frozen=True)
class Label:
    """The label of a photo, and how the photo was chosen."""

    label: str
    picked: Picked


def known_photos(index: AnsweringIndex, numbers: Mapping[str, int]) -> dict[int, LabelledPhoto]:
    """Return the labelled photos by number, given the number of each path."""
    labels = index.labels
    found = pc.is_in(labels["source"], value_set=pa.array(numbers, pa.string()))
    rows = np.flatnonzero(found.to_numpy())
    columns = [name for name in ("key_id", "label", "source", PICKED) if name in labels.column_names]
    known = labels.select(columns).take(pa.array(rows)).to_pylist()
    return {numbers[one["source"]]: LabelledPhoto(one["key_id"], one["label"], one.get(PICKED)) for one in known}


def save_labels(
    place: places.Place, photos: Source, encoder: Encoder, labels: Mapping[int, Label], classes: Sequence[str] = ()
) -> None:
    """Add labelled photos to an index as one new version, or build the index if it does not exist.

    ``labels`` maps the numbers of ``photos`` to their labels. A new index of an encoder with text also knows the names
    of ``classes``. Raises the errors of :func:`changes.add` and :func:`build.build_index`.
    """
    assert photos.paths is not None
    names = [one.label for one in labels.values()]
    has_text = encoder.backbone is not None and encoder.backbone.has_text
    own = dict.fromkeys([*(classes if has_text else ()), *names])
    source = of_images([photos.paths[photo] for photo in labels], photos.name, names, list(own))
    picked = pa.array([one.picked for one in labels.values()], pa.string())
    source = replace(source, items=source.items.append_column(PICKED, picked))
    if places.at(place).exists():
        changes.add(place, replace(source, class_names=tuple(dict.fromkeys(names))), encoder)
    else:
        build_index(source, place, encoder)


def guesses(index: AnsweringIndex, features: FloatArray) -> list[dict[str, float]]:
    """Return the most probable classes of each photo with their probabilities, most probable first."""
    answers = index.classify(features, GUESSES, neighbours=0, norms="keep")
    return [dict(zip(one.labels, one.probabilities, strict=True)) for one in answers]


def alike(features: FloatArray, rows: Sequence[int]) -> list[list[int]]:
    """Return the rows of the photos that are near-identical to the photos at ``rows``, most similar first."""
    points = torch.from_numpy(features)
    points = normalize(points - points.mean(0))
    cosines = points[rows] @ points.T
    cosines[range(len(rows)), rows] = -1
    found = cosines.topk(min(MOST_ALIKE, len(points)))
    return [near[own >= ALIKE].tolist() for near, own in zip(found.indices, found.values, strict=True)]
