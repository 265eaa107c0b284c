"""Bounds of the logits, which show the keys and classes that a query may skip.

Suppose cache logits cover some keys, and the others are omitted or count at their class's mean affinity
(:func:`tip.at_mean`). They are then lower bounds of the cache logits over all keys, and ``L = text + alpha * cache`` is
a lower bound of the logits. This holds for one-hot values and non-negative settings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.settings import Settings


def uncertain(terms: tip.Terms, settings: Settings, error: float) -> Tensor:
    """Return whether relative errors up to ``error`` in the cache logits could change the winner, ``[q]`` bool.

    Cache logits must be non-negative.
    """
    winner = terms.logits(settings).argmax(dim=1, keepdim=True)
    return _highest_other(terms, settings, error, winner) >= _logit_of(terms, settings, winner, -error)


def promising(terms: tip.Terms, settings: Settings, slack: float, most: int) -> tuple[Tensor, Tensor]:
    """Return the classes whose keys each query should visit; in ``terms``, all keys count at their class's mean.

    Visiting the keys of a class raises its cache logit by at most a fraction ``slack``, with rare exceptions. So only
    classes with ``L_c + alpha slack cache_c >= max L`` can win.

    Returns the ``p = min(most, c)`` classes of the largest ``L``, ``[q, p]`` int64, largest first, and whether each can
    win, ``[q, p]`` bool (always true for the first).
    """
    highest, classes = terms.logits(settings).topk(min(most, terms.text.shape[1]), dim=1)
    can = highest + settings.alpha * slack * terms.cache.gather(1, classes) >= highest[:, :1]
    can[:, :1] = True  # also where logits overflow
    return classes, can


def settled(terms: tip.Terms, settings: Settings, slack: float, classes: Tensor) -> Tensor:
    """Return whether only the :func:`promising` ``classes`` ``[q, p]`` can win, ``[q]`` bool."""
    return _highest_other(terms, settings, slack, classes) < _logit_of(terms, settings, classes[:, :1])


def certificate(terms: tip.Terms, near: Nearest, totals: tip.Totals, settings: Settings) -> Tensor:
    """Return whether the prediction from retrieved keys provably equals the one from all keys, ``[q]`` bool.

    ``terms`` cover the retrieved keys (``near``, ``[q, k]``), with or without the tail, before the link; both give a
    lower bound of the exact logits. Each of the other ``r_c`` keys of class ``c`` has at most the smallest retrieved
    affinity ``s_k``. So the logit of ``c`` can rise by at most ``alpha r_c (exp(-beta (1 - s_k)) - t_c)``, where
    ``t_c`` is the weight of each in the tail. The prediction is proved if the winner's logit exceeds all raised ones by
    more than rounding can explain: a weight's relative error is ``1 + beta`` times that of its affinity, and text and
    cache may cancel in a logit.

    The proof needs one-hot values, because a key with negative trained values can also lower a logit. It needs exact
    retrieval, too; after an approximate search it is only evidence.
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
    """Return the largest upper bound of the logits outside ``classes`` ``[q, p]``, ``[q]``."""
    return terms.logits(settings, slack).scatter_(1, classes, -torch.inf).amax(dim=1)


def _logit_of(terms: tip.Terms, settings: Settings, classes: Tensor, slack: float = 0.0) -> Tensor:
    """Return each query's logit ``[q]`` for its class in ``classes`` ``[q, 1]``, with the cache raised by ``slack``."""
    chosen = tip.Terms(terms.text.gather(1, classes), terms.cache.gather(1, classes))
    return chosen.logits(settings, slack)[:, 0]
