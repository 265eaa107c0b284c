"""Estimate how many unlabelled photos a classifier answers wrongly, and how much more labels would help.

The share of right answers to labelled photos says little about the rest, because suggested and reviewed photos were
chosen where the classifier is uncertain. But these photos tell how far its probabilities can be trusted. Each of them
is classified without its own label, and one temperature ``t`` for all answers is fitted to the ``q`` held-out labels,
with a share ``e`` of wrong ones::

    t = argmax  sum_i log((1 - e) p_i[y_i] + e / c),    p = softmax(z / t)

The expected accuracy on the rest is the mean of ``max p``. With few labels, each new label changes the fit and ``t``.
So a small classifier is also fitted without the last 5, 10, ... 25 labels, and the estimate is a weighted mean, in
which the whole classifier counts most. The odds of a wrong answer have a log-normal error, whose variance falls with
the number ``w`` of wrong held-out answers: ``SPREAD^2 + EVIDENCE / (w + 1)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrieval_tip import tip
from retrieval_tip.arrays import DoubleArray, IntArray
from retrieval_tip.data.source import spread
from retrieval_tip.errors import check_count
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows, probabilities_of
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.visible import without_folds
from retrieval_tip.model import Index
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.store.labels import images_of

WRONG = 0.02
"""Share ``e`` of labels that may be wrong.

This constant and the next five were chosen on draws 0 to 8 of benchmarks/label_progress.py, without its photos.
"""
SPREAD, EVIDENCE = 0.2, 2.5
"""Standard deviation and factor of a variance in the module docstring."""
OLDEST = 0.5
"""Weight of the classifier that lacks the most labels. The weight of the whole classifier is 1."""
STEPS, STEP, LEAST, SMALL = 6, 5, 20, 128
"""Number of classifiers, number of labels by which they differ, and the fewest labels and most photos of each."""
FACTORS = np.exp(np.linspace(-3, 3, 121))
"""Inverse temperatures to choose from, relative to that of the index."""
DOUBT = 0.01
"""Weight of the temperature of the index."""
MOST = 0.999
"""Largest probability that an answer is wrong, or right."""
DRAWS = 500
"""Number of draws of the number of wrong answers."""
SCREEN, BEST = 24, 3
"""Number of answers that a person reviews at a time, and of classes on a tile: the answer and two others."""
MOST_REST = 4096
"""Maximum number of unlabelled photos that are classified."""


@dataclass(frozen=True)
class Estimate:
    """The expected number of ``wrong`` answers to the unlabelled photos, and the ``accuracy`` that follows from it.

    With a probability of 95 %, the number is between ``least_wrong`` and ``most_wrong``, and the accuracy between
    ``low`` and ``high``. ``first_actions`` is the expected number of actions to review the ``SCREEN`` least certain
    ones: one to confirm them, one for each wrong answer, and another one unless its class is among the ``BEST``.
    """

    accuracy: float
    low: float
    high: float
    wrong: float
    least_wrong: int
    most_wrong: int
    first_actions: float

    def of_others(self, number: int) -> str:
        """Return how many of the other photos are wrong, now that ``number`` have no label, or "" if any number can be.

        The interval comes first, because its middle alone says too much.
        """
        least, most, wrong = (
            round(number * (1 - share)) for share in (self.high, self.low, self.accuracy)
        )
        if most - least >= number:
            return ""
        if number == 1:
            return f"The other photo is probably {'wrong' if most else 'right'}"
        others = f"of the other {number:,} photos are wrong"
        return (
            f"{least:,} to {most:,} {others} (about {wrong:,})"
            if least < most
            else f"Probably {most} {others}"
        )


def estimate_rest(index: Index, key_ids: Sequence[int], rest: Features) -> Estimate:
    """Estimate how many answers of a fitted index to the photos that are still unlabelled are wrong.

    ``key_ids`` are those of photos that were labelled one by one. Unknown ids are ignored. These photos are held out in
    parts (see :func:`held_out.held_out_probabilities`). For 500 keys of 1,280 values, this takes about 1 s. ``rest``
    holds the features of the unlabelled photos, of shape ``[m, d]``. At most :data:`MOST_REST` of them are used.
    Without labelled photos, any number can be wrong.
    """
    m = len(rest)
    rows = photo_rows(index, key_ids)
    if not len(rows) or not m:
        return Estimate(0.0, 0.0, 1.0, m, 0, m, 1 + 2 * min(m, SCREEN))
    few = rest[spread(m, MOST_REST)]
    parts, (errors, *_) = zip(
        *(_chances(one, key_ids, few) for one in (index, *_smaller(index, rows))), strict=True
    )
    mean = np.average(parts, 0, np.linspace(1, OLDEST, len(parts)))
    chances, missed = mean.clip(1 - MOST, MOST)
    share = float(chances.mean())
    z = np.random.default_rng(0).standard_normal(DRAWS)
    chance = np.random.default_rng(1)
    odds = share / (1 - share) * np.exp(z * math.sqrt(SPREAD**2 + EVIDENCE / (errors + 1)))
    numbers = chance.poisson(m * odds / (1 + odds)).clip(
        max=m
    )  # which vary at least as much as sums of draws
    wrong = m * share
    least, most = (int(number) for number in np.quantile(numbers, (0.025, 0.975), method="nearest"))
    first = np.argsort(chances)[-SCREEN:]
    actions = 1 + float((chances + missed)[first].sum())
    return Estimate(1 - share, 1 - most / m, 1 - least / m, wrong, least, most, actions)


def _smaller(index: Index, rows: IntArray) -> Iterator[Index]:
    """Yield a small index without the last photos, fitted to the others."""
    images = images_of(index.labels)
    last = rows[np.argsort(index.labels["key_id"].to_numpy()[rows])]
    for left in (
        range(STEP, min(STEPS * STEP, len(last) - LEAST + 1), STEP) if index.n <= SMALL else ()
    ):
        other = index.take(np.flatnonzero(~np.isin(images, images[last[-left:]])))
        yield closed_form.fit(other)[0]


def _chances(index: Index, key_ids: Sequence[int], rest: Features) -> tuple[DoubleArray, int]:
    """Return how probably each answer to the rest is wrong, and its class is not among the best, as ``[2, m]``.

    Also return how many held-out answers are wrong.
    """
    held = held_out_probabilities(index, photo_rows(index, key_ids))
    known = held.pred_probs[np.arange(len(held.labels)), held.labels] > 0
    own = held.labels[known]
    c = sum(count > 0 for count in index.counts)
    with np.errstate(divide="ignore"):  # a class that cannot win has the probability 0
        logs = np.log(held.pred_probs[known].astype(np.float64))
    likely = -DOUBT * np.log(FACTORS) ** 2
    for place, factor in enumerate(FACTORS):
        p = np.exp(factor * logs[np.arange(len(own)), own]) / np.exp(factor * logs).sum(1)
        likely[place] += np.log((1 - WRONG) * p + WRONG / c).sum()
    factor = FACTORS[likely.argmax()]
    raised = probabilities_of(index, rest).double().numpy() ** factor
    best = np.sort(raised)[:, : -BEST - 1 : -1].cumsum(1)[:, [0, -1]] / raised.sum(1, keepdims=True)
    return 1 - best.T, int((~held.right).sum())


def gain_of(index: Index, rest: Features, found: Estimate, more: int) -> float | None:
    """Estimate by how much the accuracy on unlabelled photos increases with ``more`` labels, as a fraction.

    ``found`` is the estimate for the same photos. They are classified again with the first half of the ``n`` labels, by
    key id. Where the answers differ, the probabilities of the index tell how many more were wrong. The share of wrong
    answers is assumed to fall by the same factor whenever the number of labels doubles. Returns ``None`` without
    photos, or with fewer than four labels.
    """
    check_count("more", more)
    n = index.n
    m = len(rest)
    order = np.argsort(index.labels["key_id"].to_numpy())
    half = next(without_folds(index, order[-1:], order[: n // 2]), None) if m and n >= 4 else None
    if half is None:
        return None
    features = rest[spread(m, MOST_REST)]
    before = probabilities_of(half[1], features).argmax(1, keepdim=True)
    p = tip.probabilities(index.logits(features).cpu(), index.settings.temperature)
    lost = float((p.amax(1) - p.gather(1, before)[:, 0]).double().mean())
    wrong = found.wrong / m
    doublings = math.log((n + more) / n) / math.log(n / (n // 2))
    return wrong - wrong * math.pow(wrong / (wrong + lost), doublings)
