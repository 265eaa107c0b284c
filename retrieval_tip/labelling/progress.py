"""Estimate how many unlabelled photos a classifier already answers correctly, and how much more labels would help.

Suggested photos are not typical, because they are chosen where the classifier is uncertain. The estimates are therefore
based on labelled photos that were drawn at random. Each of them is classified without its own label, so all labels can
train the classifier. The share of right answers is corrected with the probabilities of the answers ``p``::

    accuracy = mean of right over the random photos + mean of p over the rest - mean of p over the random photos

The rest is easier than the random photos, for two reasons. Suggestions have removed uncertain photos from the rest, and
without its own label, a random photo belongs to a class with few labels. In both cases, the probabilities are lower as
well. This is the difference estimator of survey sampling (Cochran, 1977), and prediction-powered inference
(Angelopoulos et al., Science 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.answering import spread
from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.fit.closed_form import prior_for, wilson
from retrieval_tip.fit.folds import Folds, Held, taken_keys
from retrieval_tip.fit.forms import Form
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.store.labels import images_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PARTS = 8
"""Number of parts of the random photos. Each part is held out once, so the fit is repeated this many times."""
MOST_REST = 4096
"""Maximum number of unlabelled photos whose probabilities are averaged."""


@dataclass(frozen=True)
class Estimate:
    """The estimated ``accuracy`` on unlabelled photos, and its 95 % confidence interval.

    ``right`` counts the right answers to the ``n`` random photos. The interval is that of Wilson (1927) for ``n``
    photos. Without random photos, it is 0 to 1.
    """

    right: int
    n: int
    accuracy: float
    low: float
    high: float


def estimate_rest(index: CacheModel, random_ids: Sequence[int], rest: Features) -> Estimate:
    """Estimate the accuracy of a fitted index on photos that are still unlabelled.

    The random photos are held out in :data:`PARTS` parts. The metric and the values are refitted to all other keys,
    while alpha, beta and the temperature stay. All keys of a photo are held out together. The index does not change.
    For 500 keys of 512 values, this takes about 0.5 s.

    Args:
        index: the index.
        random_ids: the key ids of the labels that were drawn at random from the unlabelled photos. Unknown ids are
            ignored.
        rest: the features of the unlabelled photos, of shape ``[m, d]``. At most :data:`MOST_REST` are used, which are
            spaced evenly.

    Raises InputError if ``rest`` is not finite or has the wrong shape.
    """
    rows = _rows(index, random_ids)
    right, chances = _held_out(index, rows, np.arange(index.n))
    if not len(rows):
        return Estimate(0, 0, 0.0, 0.0, 1.0)
    accuracy = float(right.mean())
    if len(rest):
        accuracy += _mean_probability(index, rest[spread(len(rest), MOST_REST)]) - float(chances.mean())
    accuracy = min(max(accuracy, 0.0), 1.0)
    return Estimate(int(right.sum()), len(rows), accuracy, *wilson(accuracy, len(rows)))


def _mean_probability(index: CacheModel, features: Features) -> float:
    parts = (index.logits(features[part]) for part in index.parts(len(features)))
    return float(torch.cat([tip.probabilities(part, index.settings.temperature).amax(1) for part in parts]).mean())


def gain_of(index: CacheModel, random_ids: Sequence[int], more: int) -> float | None:
    """Estimate by how much the accuracy on unlabelled photos increases with ``more`` labels, as a fraction.

    The random photos are classified with all ``n`` labels and with the first half of the labels, by key id. Accuracy
    is assumed to grow by the same amount ``g`` whenever the number of labels doubles, so the gain is
    ``g log2((n + more) / n)``. It is at least 0. Returns ``None`` if there are no random photos, or fewer than four
    labels.
    """
    check_count("more", more)
    rows, n = _rows(index, random_ids), index.n
    if not len(rows) or n < 4:
        return None
    first = np.sort(np.argsort(index.labels["key_id"].to_numpy())[: n // 2])
    by_all, by_half = (_held_out(index, rows, kept)[0].mean() for kept in (np.arange(n), first))
    return max(0.0, float(by_all - by_half)) * math.log2((n + more) / n)


def _rows(index: CacheModel, key_ids: Sequence[int]) -> IntArray:
    """Return the first row of each photo that has one of these key ids."""
    rows = np.flatnonzero(np.isin(index.labels["key_id"].to_numpy(), np.asarray(key_ids, dtype=np.int64)))
    _, first = np.unique(images_of(index.labels)[rows], return_index=True)
    return rows[np.sort(first)]


def _held_out(index: CacheModel, rows: IntArray, kept: IntArray) -> tuple[npt.NDArray[np.bool_], FloatArray]:
    """Classify each photo by the ``kept`` keys, except the keys of its own part.

    Returns whether the answers are right, and their probabilities.
    """
    ids, images, settings = index.class_ids.cpu(), images_of(index.labels), index.settings
    right, chances = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
    order = np.random.default_rng(0).permutation(len(rows))
    parts, held = [], []
    for part in np.array_split(order, min(PARTS, len(rows)) or 1):
        others = kept[~np.isin(images[kept], images[rows[part]])]
        if len(part) and len(others):  # without any other key, the answers are wrong
            own = torch.from_numpy(rows[part])
            held.append(Held(taken_keys(index.keys, own), ids[own], torch.from_numpy(others)))
            parts.append(part)
    if not held:
        return right, chances
    text = index.text_weights.cpu() * settings.logit_scale if index.has_text else None
    prior, c = prior_for(index), len(index.class_names)
    class_prior = "even" if index.fitted is None else index.fitted.class_prior
    folds = Folds(index.keys, ids, c, text, held, index.sums, class_prior, prior=prior)
    words, cache, discriminant = folds.terms(Form.of(index.fitted, settings.beta))
    linked = tip.log_cache(cache, settings.log_offset)
    terms = tip.Terms(torch.zeros_like(linked) if words is None else words, linked, discriminant)
    logits = terms.logits(settings)
    if words is None:  # a class without keys would be unknown
        known = torch.stack([torch.bincount(ids[part.rows], minlength=c) > 0 for part in held])
        logits[~known.repeat_interleave(torch.tensor([len(part.ids) for part in held]), dim=0)] = -torch.inf
    highest, answers = tip.probabilities(logits, settings.temperature).max(1)
    places = np.concatenate(parts)
    right[places], chances[places] = (answers == folds.ids_held).numpy(), highest.numpy()
    return right, chances
