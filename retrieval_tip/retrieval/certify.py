"""Bounds on the logits, which are used to decide which keys and classes a query can skip.

Suppose that the cache logits are computed from some of the keys, and that the other keys are omitted or counted at the
mean affinity of their class (see :func:`tip.at_mean`). The results are then lower bounds on the cache logits over all
keys, and ``L = text + alpha * (cache + gamma * discriminant)`` is a lower bound on the logits. This holds if values are
one-hot and settings are non-negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.settings import Settings


def uncertain(terms: tip.Terms, settings: Settings, error: float) -> Tensor:
    """Return, for each query, whether relative errors of up to ``error`` in the cache logits could change the winner.

    The cache logits must be non-negative.
    """
    winner = terms.logits(settings).argmax(dim=1, keepdim=True)
    return _highest_other(terms, settings, error, winner) >= _logit_of(terms, settings, winner, -error)


def promising(terms: tip.Terms, settings: Settings, slack: float, most: int) -> tuple[Tensor, Tensor]:
    """Select the classes whose keys each query should visit.

    In ``terms``, all keys are counted at the mean affinity of their class. If the keys of a class are visited, its
    cache logit increases by at most the fraction ``slack``, with rare exceptions. Therefore only classes with
    ``L_c + alpha slack cache_c >= max L`` can win.

    Returns the ``p = min(most, c)`` classes that have the largest ``L``, as an int64 tensor of shape ``[q, p]``,
    largest first. Also returns whether each of these classes can win, as a bool tensor of the same shape. For the first
    class, this is always true.
    """
    highest, classes = terms.logits(settings).topk(min(most, terms.text.shape[1]), dim=1)
    can = highest + settings.alpha * slack * terms.cache.gather(1, classes) >= highest[:, :1]
    can[:, :1] = True  # this must also hold if logits overflow
    return classes, can


def class_certificate(terms: tip.Terms, settings: Settings, slack: float, classes: Tensor) -> Tensor:
    """Return, for each query, whether no class other than the :func:`promising` ``classes`` can win."""
    return _highest_other(terms, settings, slack, classes) < _logit_of(terms, settings, classes[:, :1])


def certificate(terms: tip.Terms, near: Nearest, totals: tip.Totals, settings: Settings) -> Tensor:
    """Return, for each query, whether the retrieved keys provably give the same prediction as all keys.

    ``terms`` are computed from the retrieved keys ``near`` before the link is applied, and may include the tail. They
    are a lower bound on the exact logits.

    The affinity of every other key is at most ``s_k``, the smallest affinity of a retrieved key. Class ``c`` has
    ``r_c`` other keys, so its logit can rise by at most ``alpha r_c (exp(-beta (1 - s_k)) - t_c)``, where ``t_c`` is
    the weight of such a key in the tail. The prediction is proved if the winning logit exceeds all other raised logits
    by more than the rounding error. The relative rounding error of a weight is ``1 + beta`` times the error of its
    affinity.

    The proof requires one-hot values, because negative values can lower a logit, and an exact search.
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
    """Return the largest upper bound on the logits of all classes that are not in ``classes``."""
    return terms.logits(settings, slack).scatter_(1, classes, -torch.inf).amax(dim=1)


def _logit_of(terms: tip.Terms, settings: Settings, classes: Tensor, slack: float = 0.0) -> Tensor:
    return terms.each(lambda term: term.gather(1, classes)).logits(settings, slack)[:, 0]
