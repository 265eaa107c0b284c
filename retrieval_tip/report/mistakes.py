"""Collect the mistakes for a report, with thumbnails of the photos and nearby keys."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.data import images
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation.evaluate import Answers
from retrieval_tip.predictions import Neighbour
from retrieval_tip.report.judged import JudgedIndex

MISTAKES, PAIRS, EXAMPLES, NEIGHBOURS = 12, 8, 3, 5
"""Maximum numbers of mistakes in a list, of confused pairs, of photos per pair, and of keys per mistake."""


class Picture(NamedTuple):
    """The path of an image, the ``digest`` of its bytes if known, and its ``alt`` text."""

    path: str
    digest: str | None
    alt: str


class Chance(NamedTuple):
    """A class with its probability and the two parts of its logit. ``kind`` is ``answer``, ``true`` or empty."""

    name: str
    kind: str
    probability: float
    text: float
    cache: float


@dataclass(frozen=True)
class Mistake:
    """A wrong answer for an ``item``, with the most probable classes and the shots that caused the answer."""

    number: int
    item: str
    truth: str
    answer: str
    probability: float
    chances: list[Chance]
    picture: Picture
    keys: list[tuple[Neighbour, Picture]]


@dataclass(frozen=True)
class Pair:
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


def wrong_answers(answers: Answers, by: npt.NDArray[np.float64]) -> list[int]:
    """Return the positions of the wrong answers with the lowest values in ``by``."""
    wrong = np.flatnonzero(~answers.right)
    order: list[int] = wrong[np.argsort(by[wrong], kind="stable")][:MISTAKES].tolist()
    return order


class Mistakes(NamedTuple):
    """The worst mistakes (with the least probable true class), the most confident mistakes, and their number."""

    worst: list[Mistake]
    certain: list[Mistake]
    wrong: int


def mistakes(judged: JudgedIndex) -> Mistakes:
    """Explain the worst and the most confident mistakes."""
    answers = judged.answers
    worst, certain = (wrong_answers(answers, by) for by in (judged.details.log_truth, judged.details.log_doubt))
    places = list(dict.fromkeys([*worst, *certain]))
    made = dict(zip(places, _explained(judged, places), strict=True)) if places else {}
    wrong = int((~answers.right).sum())
    return Mistakes([made[place] for place in worst], [made[place] for place in certain], wrong)


def _explained(judged: JudgedIndex, places: Sequence[int]) -> list[Mistake]:
    cache, answers, some = judged.cache, judged.answers, judged.features[np.asarray(places)]
    names, explained = cache.class_names, []
    predictions = cache.classify(some, 3, neighbours=NEIGHBOURS)
    terms = cache.terms(some)
    photos = cache.settings.alpha * terms.photos(cache.settings)
    for row, (place, prediction) in enumerate(zip(places, predictions, strict=True)):
        truth, answer, sure = int(answers.truth[place]), int(answers.predicted[place]), float(answers.confidence[place])
        likely = zip(map(names.index, prediction.labels), prediction.probabilities, strict=True)
        likeliest = dict(likely) | {answer: sure, truth: math.exp(judged.details.log_truth[place])}
        kinds = {truth: "true", answer: "answer"}
        chances = [
            Chance(names[i], kinds.get(i, ""), p, float(terms.text[row, i]), float(photos[row, i]))
            for i, p in sorted(likeliest.items(), key=lambda pair: -pair[1])
        ]
        item = judged.test.sources[int(judged.details.positions[place])]
        against = [prediction.opposing] if prediction.opposing else []
        picture, keys = _of_item(judged, place), _with_pictures(judged, [*prediction.neighbours, *against])
        explained.append(Mistake(row + 1, item, names[truth], names[answer], sure, chances, picture, keys))
    return explained


def confusions(judged: JudgedIndex) -> list[Pair]:
    """Return the pairs of classes that are confused most often, with mistakes and nearby keys."""
    answers, names = judged.answers, judged.cache.class_names
    pairs = [(names.index(truth), names.index(answer), n) for truth, answer, n in judged.evaluation.confusions[:PAIRS]]
    if not pairs:
        return []
    places = []
    for truth, answer, _ in pairs:
        own = np.flatnonzero((answers.truth == truth) & (answers.predicted == answer))
        places.append(own[np.argsort(-answers.confidence[own], kind="stable")][:EXAMPLES])
    some = judged.features[np.concatenate(places)]
    predictions = iter(judged.cache.classify(some, 3, neighbours=NEIGHBOURS))
    described = []
    for (truth, answer, times), own in zip(pairs, places, strict=True):
        near = [key for _ in own for key in next(predictions).neighbours if key.label == names[answer]]
        keys = _with_pictures(judged, list({key.key_id: key for key in near}.values())[:EXAMPLES])
        items = [_of_item(judged, place) for place in own.tolist()]
        described.append(Pair(names[truth], names[answer], times, int((answers.truth == truth).sum()), items, keys))
    return described


def _of_item(judged: JudgedIndex, place: int) -> Picture:
    test, position = judged.test, int(judged.details.positions[place])
    path = test.paths[position] if test.paths is not None else test.sources[position]
    label = judged.cache.class_names[int(judged.answers.truth[place])]
    return Picture(path, judged.digests[place], f"test photo of {label}")


def _with_pictures(judged: JudgedIndex, keys: Sequence[Neighbour]) -> list[tuple[Neighbour, Picture]]:
    labels = judged.cache.labels.select(["key_id", "digest"])
    rows = labels.filter(pc.is_in(labels["key_id"], value_set=pa.array([key.key_id for key in keys], pa.int64())))
    digests = dict(zip(rows["key_id"].to_pylist(), rows["digest"].to_pylist(), strict=True))
    return [(key, Picture(key.source, digests.get(key.key_id), f"example of {key.label}")) for key in keys]


def thumbnail(path: str, digest: str | None, side: int) -> str | None:
    """Return an image as a base64 JPEG whose sides have at most ``side`` pixels.

    Return ``None`` if the image cannot be read or does not have this digest.
    """
    try:
        data = read_item(path)
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            return None
        return base64.b64encode(images.thumbnail(data, side)).decode()
    except (InputError, UsageError):
        return None
