"""Bound the cache logits of classes, so that a query reads only the keys of classes that can win.

If all keys of a class count at their mean affinity, its cache logit is a lower bound, because the exponential is
convex. The slack says by how much the exact logit can exceed it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.keys import KeyStream
from retrieval_tip.settings import Settings

SPREAD_CLASSES, SPREAD_KEYS = 8, 64
"""Numbers of the nearest classes per query, and of keys per class, for :meth:`ClassBounds.slack`."""
SPREAD_QUANTILE = 0.999
"""Quantile of the measured excess that is the slack. The largest values are outliers."""
MOST_SLACK = 1e9
"""Upper limit for the slack. At this value, every class can win."""


class ClassBounds:
    """Bounds on the cache logits of classes with one-hot values. The slack is measured once for each beta."""

    def __init__(self, keys: KeyStream) -> None:
        self.keys = keys
        self._slack: dict[float, float] = {}

    def count_at_means(self, points: Tensor, cache: Tensor, beta: float) -> None:
        """Fill ``cache``, of shape ``[q, c]``, with the lower bounds of queries."""
        tip.affinity(points, self.keys.means, out=cache)
        tip.at_mean(self.keys.counts, cache, beta, out=cache)

    def slack(self, beta: float) -> float:
        """Estimate by how much the cache logit of a class can exceed its lower bound, as a share of the bound.

        The excess is ``mean of exp(beta a_i) / exp(beta mean of a_i) - 1`` over the keys of a class. It is measured for
        a sample of keys that are used as queries and the classes nearest to each query. The result is the quantile
        :data:`SPREAD_QUANTILE` of the measured values.
        """
        if beta not in self._slack:
            self._slack[beta] = self._measured(beta)
        return self._slack[beta]

    def _measured(self, beta: float) -> float:
        keys = self.keys
        queries, ids = keys.sample()
        near = tip.affinity(queries, keys.means).masked_fill_(keys.counts == 0, -torch.inf)
        near.scatter_(1, ids[:, None], -torch.inf)
        highest, classes = near.topk(min(SPREAD_CLASSES, keys.n_classes), dim=1)
        affinity = self._affinities(queries, classes).double()
        centred = affinity - affinity.mean(2, keepdim=True)  # prevents underflow
        excess = (centred * beta).exp().mean(2) - 1
        excess = excess[highest > -torch.inf].clamp(0, MOST_SLACK)
        return float(excess.quantile(SPREAD_QUANTILE)) if len(excess) else 0.0

    def _affinities(self, queries: Tensor, classes: Tensor) -> Tensor:
        """Return the affinities of each query to evenly spaced keys of each of its ``classes``."""
        keys = self.keys
        affinity = queries.new_zeros(*classes.shape, SPREAD_KEYS)
        asked = classes.unique()
        counts = keys.counts[asked].long().tolist()
        n_read = [0] * len(asked)
        steps = torch.arange(SPREAD_KEYS, device=keys.device)
        for place, block, _ in keys.of_classes(asked.cpu().numpy()):
            rows = counts[place] * steps // SPREAD_KEYS - n_read[place]
            here = ((rows >= 0) & (rows < len(block))).nonzero()[:, 0]
            query, slot = (classes == asked[place]).nonzero(as_tuple=True)
            sampled = tip.affinity(queries[query], block[rows[here]])
            affinity[query[:, None], slot[:, None], here] = sampled
            n_read[place] += len(block)
        return affinity


def promising(
    terms: tip.Terms, settings: Settings, slack: float, most: int
) -> tuple[Tensor, Tensor]:
    """Select the classes whose keys each query should visit.

    In ``terms``, all keys are counted at the mean affinity of their class (see :func:`tip.at_mean`), so that with
    one-hot values, the logits ``L`` are lower bounds. If the keys of a class are visited, its cache logit increases by
    at most the fraction ``slack``, with rare exceptions. Therefore only classes with
    ``L_c + alpha slack cache_c >= max L`` can win.

    Returns the ``p = min(most, c)`` classes that have the largest ``L``, as an int64 tensor of shape ``[q, p]``,
    largest first. Also returns whether each of these classes can win, as a bool tensor of the same shape. For the first
    class, this is always true.
    """
    highest, classes = terms.logits(settings).topk(min(most, terms.text.shape[1]), dim=1)
    can = highest + settings.alpha * slack * terms.cache.gather(1, classes) >= highest[:, :1]
    can[:, :1] = True  # this must also hold if logits overflow
    return classes, can
