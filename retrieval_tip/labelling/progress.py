"""Estimate how many unlabelled photos a classifier answers wrongly, and how much more labels would help.

The share of right answers to labelled photos says little about the rest, because suggested and reviewed photos were
chosen where the classifier is uncertain. But these photos tell how often an answer with probability ``p`` is right,
which is modelled as in Platt scaling (1999)::

    P(right | p) = sigmoid(a + b logit(p))

Each labelled photo is classified without its own label, so all labels can train the classifier. The answers to the rest
are then independent draws, whose probabilities depend on the posterior of ``a`` and ``b``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval_tip import tip
from retrieval_tip.data.source import spread
from retrieval_tip.errors import check_count
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows, probabilities_of
from retrieval_tip.fit.folds import without_parts
from retrieval_tip.model import Index
from retrieval_tip.retrieval.inputs import Features

Floats = npt.NDArray[np.float64]

OFFSET, SLOPE = (0.0, 1.5), (0.5, 0.3)
"""Mean and standard deviation of the prior of ``a`` and of ``log b``.

This constant and the next three were chosen on draws 0 to 8 of benchmarks/label_progress.py, without its photos.
"""
BELIEF = 1 / 3
"""Weight of a held-out photo. It is below 1, because the errors of a classifier have common causes."""
EASIER = 0.25
"""By how much ``a`` is higher for the rest than for held-out photos, which lack their own label and some others."""
LEAST = 0.01
"""Smallest probability that an answer is wrong or right, before it is corrected."""
DRAWS = 500
"""Number of draws from the posterior."""
SCREEN = 24
"""Number of answers that a person reviews at a time."""
MOST_REST = 4096
"""Maximum number of unlabelled photos that are classified."""


@dataclass(frozen=True)
class Estimate:
    """The expected number of ``wrong`` answers to the unlabelled photos, and the ``accuracy`` that follows from it.

    With a probability of 95 %, the number is between ``least_wrong`` and ``most_wrong``, and the accuracy between
    ``low`` and ``high``. ``first_wrong`` is the expected number of wrong answers among the ``SCREEN`` least certain
    ones.
    """

    accuracy: float
    low: float
    high: float
    wrong: float
    least_wrong: int
    most_wrong: int
    first_wrong: float

    def of_others(self, number: int) -> str:
        """Return how many of the other photos are wrong, now that ``number`` have no label, or "" if any number can be.

        The interval comes first, because its middle alone says too much.
        """
        least, most, wrong = (round(number * (1 - share)) for share in (self.high, self.low, self.accuracy))
        if most - least >= number:
            return ""
        if number == 1:
            return f"The other photo is probably {'wrong' if most else 'right'}"
        others = f"of the other {number:,} photos are wrong"
        return f"{least:,} to {most:,} {others} (about {wrong:,})" if least < most else f"Probably {most} {others}"


def estimate_rest(index: Index, key_ids: Sequence[int], rest: Features) -> Estimate:
    """Estimate how many answers of a fitted index to the photos that are still unlabelled are wrong.

    ``key_ids`` are those of photos that were labelled one by one. Unknown ids are ignored. These photos are held out in
    parts (see :func:`held_out.held_out_probabilities`). For 500 keys of 1,280 values, this takes about 1 s. ``rest``
    holds the features of the unlabelled photos, of shape ``[m, d]``. At most :data:`MOST_REST` of them are used.
    Without labelled photos, any number can be wrong.
    """
    m, rows = len(rest), photo_rows(index, key_ids)
    if not len(rows) or not m:
        return Estimate(0.0, 0.0, 1.0, m, 0, m, min(m, SCREEN))
    held, chance = held_out_probabilities(index, rows), np.random.default_rng(0)
    a, b = _posterior(_logit(held.pred_probs.max(1)), held.right, chance)
    answers = index.classify(rest[spread(m, MOST_REST)], neighbours=0, norms="keep", logits=False).to_arrow()
    p = 1 / (1 + np.exp(a[:, None] + b[:, None] * _logit(answers["probability"].to_numpy())))
    expected = m * p.mean(1)
    numbers = chance.poisson(expected).clip(max=m)  # which vary at least as much as sums of draws
    wrong = float(expected.mean())
    least, most = (int(number) for number in np.quantile(numbers, (0.025, 0.975), method="nearest"))
    first = float(np.sort(p.mean(0))[-SCREEN:].sum())
    return Estimate(1 - wrong / m, 1 - most / m, 1 - least / m, wrong, least, most, first)


def _logit(probabilities: npt.NDArray[np.floating]) -> Floats:
    p = probabilities.astype(np.float64).clip(LEAST, 1 - LEAST)
    logits: Floats = np.log(p / (1 - p))
    return logits


def _posterior(logits: Floats, right: npt.NDArray[np.bool_], chance: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw ``a`` and ``b`` for the rest from their posterior, given the answers to held-out photos."""
    grid = np.meshgrid(np.linspace(-3, 3, 31), np.linspace(-3, 3, 15))
    (a, log_b), priors = (one.ravel() for one in grid), (grid[0] ** 2 + grid[1] ** 2).ravel()
    a, b = OFFSET[0] + OFFSET[1] * a, np.exp(SLOPE[0] + SLOPE[1] * log_b)
    signed = np.where(right, 1, -1) * (a[:, None] - EASIER + b[:, None] * logits)
    logs = -BELIEF * np.logaddexp(0, -signed).sum(1) - priors / 2
    weights = np.exp(logs - logs.max())
    drawn = chance.choice(len(a), DRAWS, p=weights / weights.sum())
    return a[drawn], b[drawn]


def gain_of(index: Index, rest: Features, found: Estimate, more: int) -> float | None:
    """Estimate by how much the accuracy on unlabelled photos increases with ``more`` labels, as a fraction.

    ``found`` is the estimate for the same photos. They are classified again with the first half of the ``n`` labels, by
    key id. Where the answers differ, the probabilities of the index tell how many more were wrong. The share of wrong
    answers is assumed to fall by the same factor whenever the number of labels doubles. Returns ``None`` without
    photos, or with fewer than four labels.
    """
    check_count("more", more)
    n, m = index.n, len(rest)
    order = np.argsort(index.labels["key_id"].to_numpy())
    half = next(without_parts(index, order[-1:], order[: n // 2]), None) if m and n >= 4 else None
    if half is None:
        return None
    features = rest[spread(m, MOST_REST)]
    before = probabilities_of(half[1], features).argmax(1, keepdim=True)
    p = tip.probabilities(index.logits(features).cpu(), index.settings.temperature)
    lost = float((p.amax(1) - p.gather(1, before)[:, 0]).double().mean())
    wrong, doublings = found.wrong / m, math.log((n + more) / n) / math.log(n / (n // 2))
    return wrong - wrong * math.pow(wrong / (wrong + lost), doublings)
