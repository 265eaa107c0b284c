"""Answer the photos of a folder with the help of the most similar photos of the folder.

The probabilities ``P(x)`` of a photo become a mean of its own and of those of its 5 nearest photos ``y``::

    (1 - a) P(x) + a sum_y w(x, y) P(y),   w(x, y) = softmax_y(cos(phi(x), phi(y)) / 0.1)

in the metric ``phi`` of the index. A labelled photo has the probability 1 for its label. The labelled photos choose the
weight ``a``, which may be 0. To do so, each is answered by an index that was fitted without it, in its metric.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from retrieval_tip import tip
from retrieval_tip.data.reader import FloatArray
from retrieval_tip.evaluation.held_out import without_parts
from retrieval_tip.labelling.suggest import BLOCK, IntArray, points_of
from retrieval_tip.model import Index
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.retrieval.logits import slices

NEAREST, SPREAD = 5, 0.1
"""Number of nearest photos, and the difference between two cosines that changes a weight by the factor e."""
WEIGHTS = (0.0, 0.25, 0.5)
"""The possible weights of the nearest photos."""
LEAST = 1e-3
"""Lowest probability that counts, so that a single photo cannot decide the weight."""


def smoothed(index: Index, features: Features, labels: Mapping[int, int]) -> tuple[FloatArray, float]:
    """Return the smoothed probabilities of all photos of a folder, of shape ``[m, c]``, and the weight ``a``.

    ``features`` has the shape ``[m, d]``, and ``labels`` maps the rows of labelled photos to the ids of their keys in
    the index. Raises InputError if ``features`` is not finite or has the wrong shape.
    """
    raw = inputs.matrix(features, "features")
    place = {key_id: row for row, key_id in enumerate(index.labels["key_id"].to_pylist())}
    rows, keys = np.array([*labels], dtype=np.int64), np.array([place[one] for one in labels.values()], dtype=np.int64)
    weight = _weight(index, raw, rows, keys)
    ids = index.class_ids.cpu()[keys]
    own, near = _answers(index, raw, np.arange(len(raw)), rows, ids)
    found = own.lerp(near, weight)
    found[rows] = own[rows]
    return found.numpy(), weight


def _weight(index: Index, features: FloatArray, rows: IntArray, keys: IntArray) -> float:
    """Return the weight for which the labels are most likely, each held out. If several are equal, the least wins."""
    scores, ids = torch.zeros(len(WEIGHTS), dtype=torch.float64), index.class_ids.cpu()[keys]
    first = np.unique(keys, return_index=True)[1]  # copies of a photo have the same key
    for part, others in without_parts(index, keys[first]):
        held, kept = first[part], ~np.isin(keys, keys[first[part]])
        own, near = _answers(others, features, rows[held], rows[kept], ids[kept])
        possible = torch.tensor(others.counts)[ids[held]].gt(0) | index.has_text
        for place, weight in enumerate(WEIGHTS):
            chances = own.lerp(near, weight).gather(1, ids[held][:, None])[possible]
            scores[place] += chances.double().clamp_min(LEAST).log().sum()
    return WEIGHTS[int(scores.argmax())]


def _answers(index: Index, features: FloatArray, rows: IntArray, known: IntArray, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the photos at ``rows``, and the mean ones of the photos nearest to each.

    ``known`` are the rows of labelled photos, and ``ids`` their class ids.
    """
    points, n = normalize(points_of(features, index.metric)), min(NEAREST, len(features) - 1)
    near, weights = np.empty((len(rows), n), dtype=np.int64), torch.empty(len(rows), n)
    for part in slices(len(rows), BLOCK):
        cosines = points[rows[part]] @ points.T
        cosines[np.arange(len(cosines)), rows[part]] = -torch.inf
        found = cosines.topk(n)
        near[part], weights[part] = found.indices.numpy(), (found.values / SPREAD).softmax(dim=1)
    needed, places = np.unique(np.concatenate([rows[:, None], near], axis=1), return_inverse=True)
    logits = index.logits(features[needed]).cpu()
    if not index.has_text:  # a class without keys would be unknown
        logits[:, np.array(index.counts) == 0] = -torch.inf
    chances = tip.probabilities(logits, index.settings.temperature)
    among = np.isin(known, needed)
    chances[np.searchsorted(needed, known[among])] = one_hot(ids[among], chances.shape[1]).float()
    own, *others = (chances[column] for column in places.reshape(len(rows), -1).T)
    mean = sum((chance * weight[:, None] for chance, weight in zip(others, weights.T, strict=True)), torch.zeros(()))
    return own, mean if others else own
