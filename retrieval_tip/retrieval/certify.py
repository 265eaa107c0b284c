"""Which keys and classes a query may leave out: bounds of the logits, from what it has met.

Cache logits over some of the keys, the others left out or counted at their class's mean affinity
(:func:`tip.at_mean`), are lower bounds of those over all keys. ``L = text + alpha * cache`` is then a lower bound of
the logits, for one-hot values and settings of 0 or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.settings import Settings


def uncertain(terms: tip.Terms, settings: Settings, error: float) -> Tensor:
    """Return for which queries relative errors up to ``error`` in the cache logits may change the winner, ``[q]`` bool.

    Cache logits have to be 0 or more.
    """
    winner = terms.logits(settings).argmax(dim=1, keepdim=True)
    return _highest_other(terms, settings, error, winner) >= _at(terms, settings, winner, -error)


def promising(terms: tip.Terms, settings: Settings, slack: float, most: int) -> tuple[Tensor, Tensor]:
    """Return the classes whose keys a query should meet, from terms in which all keys count at their class's mean.

    With a class's keys themselves its cache logit grows by a fraction of ``slack``, hardly ever more. So only classes
    with ``L_c + alpha slack cache_c >= max L`` can win.

    Returns the ``p = min(most, c)`` classes of the largest ``L``, ``[q, p]`` int64, largest first, and which of them
    can win, ``[q, p]`` bool (always the first).
    """
    highest, classes = terms.logits(settings).topk(min(most, terms.text.shape[1]), dim=1)
    can = highest + settings.alpha * slack * terms.cache.gather(1, classes) >= highest[:, :1]
    can[:, :1] = True  # also where logits overflow
    return classes, can


def settled(terms: tip.Terms, settings: Settings, slack: float, classes: Tensor) -> Tensor:
    """Return for which queries only the :func:`promising` ``classes`` ``[q, p]`` can win, ``[q]`` bool."""
    return _highest_other(terms, settings, slack, classes) < _at(terms, settings, classes[:, :1])


def certificate(terms: tip.Terms, near: Nearest, totals: tip.Totals, settings: Settings) -> Tensor:
    """Return which predictions from retrieved keys provably equal those from all keys, ``[q]`` bool.

    ``terms`` are over the keys that were retrieved (``near``, ``[q, k]``), with or without the tail, before the link;
    either way the logits are a lower bound of the exact ones. Other keys have an affinity of at most ``s_k``, the
    smallest retrieved one, so the logit of class ``c`` can rise by at most
    ``alpha r_c (exp(-beta (1 - s_k)) - what the tail already counts)``. The prediction is proved where the winner's
    logit exceeds every other class's raised one by more than rounding can make: the relative error of a weight is
    ``1 + beta`` times that of an affinity, and text and cache may cancel out in a logit.

    Holds for one-hot values (trained ones may be negative, and then what is left out can lower a logit too) and exact
    retrieval; after approximate search it is evidence, not proof.
    """
    logits, affinity, class_ids = terms.logits(settings), near.affinity, near.class_ids
    alpha, beta, n_classes = settings.alpha, settings.beta, totals.counts.shape[0]
    filled = class_ids < n_classes
    smallest = torch.where(filled, affinity, torch.inf).amin(dim=1, keepdim=True)
    number, mean = totals.rest(affinity, class_ids)
    counted = tip.weight(mean, beta) if settings.tail else torch.zeros_like(mean)
    rise = torch.where(number > 0, number * (tip.weight(smallest, beta) - counted).clamp_min(0), 0)
    most = tip.cache_logits(affinity, class_ids, n_classes, beta)
    most = most + torch.where(number > 0, number * tip.weight(smallest, beta), 0)
    rounding = 16 * torch.finfo(logits.dtype).eps * (logits.abs() + alpha * (2 + beta) * most)
    winner = logits.argmax(dim=1, keepdim=True)
    raised = (logits + alpha * rise + rounding).scatter(1, winner, -torch.inf).amax(dim=1)
    return (logits - rounding).gather(1, winner).squeeze(1) > raised


def _highest_other(terms: tip.Terms, settings: Settings, slack: float, classes: Tensor) -> Tensor:
    """Return the largest upper bound of the logits of all but some ``classes`` ``[q, p]``, ``[q]``."""
    return terms.logits(settings, slack).scatter_(1, classes, -torch.inf).amax(dim=1)


def _at(terms: tip.Terms, settings: Settings, classes: Tensor, slack: float = 0.0) -> Tensor:
    """Return the logit of one class of each query, ``classes`` ``[q, 1]``, its cache a fraction ``slack`` larger."""
    chosen = tip.Terms(terms.text.gather(1, classes), terms.cache.gather(1, classes))
    return chosen.logits(settings, slack)[:, 0]
