"""Estimate how many unlabelled photos a classifier already answers correctly, and how much more labels would help.

Suggested photos are not typical, because they are chosen where the classifier is uncertain. The estimates are therefore
based on ``n`` labelled photos that were drawn at random. Each photo is classified without its own label, so all
labels can train the classifier. Their right answers correct the probabilities ``p`` of the answers::

    accuracy = mean of p over the rest + n / (n + 10) (mean of right - mean of p, over the random photos)

The share of right answers alone would be too low, because the random photos are harder than the rest. Suggestions have
removed uncertain photos from the rest, and without its own label, a random photo belongs to a class with few labels. In
both cases, the probabilities are lower as well. This is the difference estimator of survey sampling (Cochran, 1977), or
prediction-powered inference (Angelopoulos et al., Science 2023). Its correction is shrunk if there are few random
photos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from retrieval_tip.bounds import check_count
from retrieval_tip.data.shots import spread
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.model import Index
from retrieval_tip.retrieval.inputs import Features

DOUBT = 10
"""Number of random photos from which half of the correction is believed."""
MOST_REST = 4096
"""Maximum number of unlabelled photos whose probabilities are averaged."""


@dataclass(frozen=True)
class Estimate:
    """The estimated ``accuracy`` on unlabelled photos, and its 95 % confidence interval.

    ``right`` counts the right answers to the ``n`` random photos. The interval follows Wilson (1927) for ``n``
    photos. Without random photos, it is 0 to 1.
    """

    right: int
    n: int
    accuracy: float
    low: float
    high: float


def estimate_rest(index: Index, random_ids: Sequence[int], rest: Features) -> Estimate:
    """Estimate the accuracy of a fitted index on photos that are still unlabelled.

    ``random_ids`` are the key ids of the labels that were drawn at random from the unlabelled photos. Unknown ids are
    ignored. These photos are held out in parts (see :func:`held_out.held_out_probabilities`). For 500 keys of 512
    values, this takes about 0.5 s. ``rest`` holds the features of the unlabelled photos, of shape ``[m, d]``, of which
    at most :data:`MOST_REST` are used.

    Raises InputError if ``rest`` is not finite or has the wrong shape.
    """
    rows = photo_rows(index, random_ids)
    if not len(rows):
        return Estimate(0, 0, 0.0, 0.0, 1.0)
    held = held_out_probabilities(index, rows)
    n, accuracy = len(rows), float(held.right.mean())
    if len(rest):
        correction = accuracy - float(held.pred_probs.max(1).mean(dtype=np.float64))
        answers = index.classify(
            rest[spread(len(rest), MOST_REST)], neighbours=0, norms="keep", logits=False
        ).to_arrow()
        accuracy = pc.mean(answers["probability"]).as_py() + n / (n + DOUBT) * correction
    accuracy = min(max(accuracy, 0.0), 1.0)
    return Estimate(int(held.right.sum()), n, accuracy, *wilson(accuracy, n))


def gain_of(index: Index, random_ids: Sequence[int], found: Estimate, more: int) -> float | None:
    """Estimate by how much the accuracy on unlabelled photos increases with ``more`` labels, as a fraction.

    ``found`` is the estimate for the same random photos, which are classified again with the first half of the ``n``
    labels, by key id. Accuracy is assumed to grow by the same amount ``g`` whenever the number of labels doubles, so
    the gain is ``g log2((n + more) / n)``. It is at least 0. Returns ``None`` if there are no random photos, or fewer
    than four labels.
    """
    check_count("more", more)
    n = index.n
    if not found.n or n < 4:
        return None
    first = np.sort(np.argsort(index.labels["key_id"].to_numpy())[: n // 2])
    by_half = held_out_probabilities(index, photo_rows(index, random_ids), first).right.mean()
    return max(0.0, found.right / found.n - float(by_half)) * math.log2((n + more) / n)
