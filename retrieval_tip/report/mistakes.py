"""Collect the mistakes for a report, with thumbnails of the photos and nearby keys."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.data import images
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.predictions import Neighbour
from retrieval_tip.report.results import Results

MISTAKES, PAIRS, EXAMPLES, NEIGHBOURS = 12, 8, 3, 5
"""Maximum numbers of mistakes in a list, of confused pairs, of photos per pair, and of keys per mistake."""


class Picture(NamedTuple):
    """The path of an image, the ``digest`` of its bytes if known, and its ``alt`` text."""

    path: str
    digest: str | None
    alt: str


class Mistake(NamedTuple):
    """A wrong answer for an ``item``, with the most probable classes and the shots that caused the answer."""

    item: str
    truth: str
    answer: str
    probabilities: dict[str, float]
    picture: Picture
    keys: list[tuple[Neighbour, Picture]]


class Pair(NamedTuple):
    """Two classes that were confused.

    ``times`` of the ``total`` items of class ``truth`` were classified as ``answer``. ``items`` are examples of these
    mistakes, and ``keys`` are nearby keys.
    """

    truth: str
    answer: str
    times: int
    total: int
    items: list[Picture]
    keys: list[tuple[Neighbour, Picture]]


def worst(log_truth: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[int]:
    """Return the positions of the wrong answers whose true class has the lowest probability, lowest first."""
    wrong = np.flatnonzero(~right)
    order: list[int] = wrong[np.argsort(log_truth[wrong], kind="stable")][:MISTAKES].tolist()
    return order


def mistakes(results: Results) -> Iterator[Mistake]:
    """Explain the worst mistakes (see :func:`worst`), except for shots, which would explain themselves."""
    answers, names = results.answers, results.index.class_names
    places = results.new[worst(answers.log_truth[results.new], answers.right[results.new])].tolist()
    predictions = results.index.classify(results.block.features[places], "keep", top=3, neighbours=NEIGHBOURS)
    for place, prediction in zip(places, predictions, strict=True):
        truth, answer = names[answers.truth[place]], names[answers.predicted[place]]
        likely = dict(zip(prediction.labels, prediction.probabilities, strict=True))
        likely |= {truth: math.exp(answers.log_truth[place]), answer: float(answers.confidence[place])}
        ranked = dict(sorted(likely.items(), key=lambda pair: -pair[1]))
        keys = [*prediction.neighbours, *([prediction.opposing] if prediction.opposing else [])]
        item = results.test.sources[int(answers.positions[place])]
        yield Mistake(item, truth, answer, ranked, _of_item(results, place), _with_pictures(results, keys))


def confusions(results: Results) -> Iterator[Pair]:
    """Yield the pairs of classes that are confused most often, with mistakes and nearby keys.

    A mistake that occurred once says little about two classes, so it is left out.
    """
    answers, names = results.answers, results.answers.class_names
    for truth, answer, times in results.evaluation.confusions[:PAIRS]:
        if times > 1:
            asked = answers.truth == names.index(truth)
            own = np.flatnonzero(asked & (answers.predicted == names.index(answer)))
            own = own[np.argsort(-answers.confidence[own], kind="stable")][:EXAMPLES]
            asking = results.block.features[own[~answers.held_out[own]]]
            predictions = results.index.classify(asking, "keep", neighbours=NEIGHBOURS)
            near = {key.key_id: key for one in predictions for key in one.neighbours if key.label == answer}
            keys = _with_pictures(results, list(near.values())[:EXAMPLES])
            items = [_of_item(results, place) for place in own.tolist()]
            yield Pair(truth, answer, times, int(asked.sum()), items, keys)


def _of_item(results: Results, place: int) -> Picture:
    test, position = results.test, int(results.answers.positions[place])
    path = test.paths[position] if test.paths is not None else test.sources[position]
    label = results.answers.class_names[int(results.answers.truth[place])]
    return Picture(path, results.block.digests[place], f"test photo of {label}")


def _with_pictures(results: Results, keys: Sequence[Neighbour]) -> list[tuple[Neighbour, Picture]]:
    rows = results.index.rows.where("key_id", [key.key_id for key in keys])
    digests = dict(zip(rows["key_id"].to_pylist(), rows["digest"].to_pylist(), strict=True))
    return [(key, Picture(key.source, digests.get(key.key_id), f"example of {key.label}")) for key in keys]


def thumbnail(read: Callable[[str], bytes], path: str, digest: str | None, side: int) -> str | None:
    """Return an image as a base64 JPEG whose sides have at most ``side`` pixels.

    ``read`` returns the bytes of a path. Return ``None`` if the image cannot be read or does not have this digest.
    """
    try:
        data = read(path)
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            return None
        return base64.b64encode(images.thumbnail(data, side)).decode()
    except (InputError, UsageError):
        return None
