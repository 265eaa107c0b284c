"""The method: Tip-Adapter (Zhang et al., ECCV 2022, section 3) as functions of torch tensors.

Notation:

- ``f`` query features, ``[q, d]``, unit norm
- ``K`` keys, ``[n, d]``: features of the labelled shots, unit norm unless fine-tuned
- ``V`` values, ``[n, c]``: what each key adds to each class. One-hot labels, unless solved or trained
- ``W`` text weights of the classes, ``[c, d]``

:func:`answer` is the whole method. The other functions, and the rest of the package, compute the same numbers faster,
from fewer keys, or from more keys than fit in memory. Start here, then read ``retrieval/logits.py`` (which keys a query
uses), ``answering.py`` (from logits to predictions) and ``cache_model.py`` (the index that you edit and save).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from retrieval_tip.settings import Settings

LARGEST = torch.finfo(torch.float32).max
"""Largest factor that torch accepts. Where this limit matters, the logits overflow anyway."""


def answer(
    f: Tensor,
    K: Tensor,
    V: Tensor,
    W: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
    logit_scale: float = 100.0,
    phi: Callable[[Tensor], Tensor] = lambda x: x,
    offset: float | None = None,
) -> Tensor:
    """Return the logits ``[q, c]``. The class probabilities are ``softmax(logits / temperature)``.

    Plain Tip-Adapter has no metric (``phi(x) = x``), one-hot values and no ``offset``. All three can be fitted to the
    shots in closed form (:mod:`fit.closed_form`). :class:`settings.Settings` describes the other parameters.
    """
    A = phi(f) @ phi(K).T  # affinity
    C = torch.exp(-beta * (1 - A)) @ V  # cache
    if offset is not None:
        C = torch.log(1 + C.clamp(min=0) / offset)  # link
    return blend(logit_scale * f @ W.T, C, alpha)


@dataclass(frozen=True)
class Metric:
    """A metric ``phi(x) = unit((x - m) T)``, from features ``[q, d]`` to unit vectors ``[q, d]``, float32.

    ``mean`` is ``m`` ``[d]`` and ``transform`` is ``T`` ``[d, d]``, both float32. The metric applies to queries and
    keys, not to text weights.
    """

    mean: Tensor
    transform: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Apply the metric to features ``[q, d]``. A feature equal to the mean becomes 0."""
        return torch.nn.functional.normalize((features - self.mean) @ self.transform)

    def to(self, device: str) -> Metric:
        """Return this metric on another device."""
        return Metric(self.mean.to(device), self.transform.to(device))

    def double(self) -> Metric:
        """Return this metric in float64."""
        return Metric(self.mean.double(), self.transform.double())


def affinity(features: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the inner products ``A = f K^T`` ``[q, n]`` of features ``[q, d]`` and keys ``[n, d]`` (equation 4).

    With a metric, pass ``phi(f)`` and ``phi(K)``.
    """
    return torch.mm(features, keys.T, out=out)


def weight(affinity: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return ``exp(-beta (1 - A))``, elementwise: how much each key adds to the cache logit of its class (equation 4).

    ``beta`` is the sharpness. At 0, every key has weight 1; the larger ``beta``, the more the nearest keys dominate.
    """
    return torch.sub(affinity, 1, out=out).mul_(beta).exp_()  # the largest array: allocate it once at most


def at_mean(number: Tensor, mean: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return the tail ``r_c exp(-beta (1 - m_c))``, elementwise: ``r_c`` keys, all at their mean affinity ``m_c``.

    The exponential is convex, so the tail never exceeds the exact sum over these keys.
    """
    return weight(mean, beta, out=out).mul_(number)


def sum_by_class(values: Tensor, class_ids: Tensor, n_classes: int, out: Tensor | None = None) -> Tensor:
    """Sum values ``[q, k]`` over the keys of each class, to ``[q, c]``, without a one-hot product.

    ``class_ids`` is ``[k]`` if all queries use the same keys, else ``[q, k]``. Slots with the id ``c`` are empty and
    ignored. With ``out`` ``[q, c]``, add the sums to it; this needs shared keys and no empty slots.
    """
    if out is not None:
        add_rows(out.T, class_ids, values.T)
        return out
    q = values.shape[0]
    if class_ids.ndim == 1:  # one row per key: each addition is one contiguous run over the queries
        return add_rows(values.new_zeros(n_classes + 1, q), class_ids, values.T)[:n_classes].T
    sums = values.new_zeros(q, n_classes + 1)
    if values.is_cuda:  # as in add_rows
        queries = torch.arange(q, device=values.device)[:, None]
        return sums.index_put_((queries, class_ids), values, accumulate=True)[:, :n_classes]
    return sums.scatter_add_(1, class_ids, values)[:, :n_classes]


def add_rows(sums: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows[i]`` to ``sums[places[i]]`` in place, always in the same order.

    On a GPU ``index_add_`` adds in thread order, so the last bit varies between runs; ``index_put_`` sorts first.
    """
    if sums.is_cuda:
        return sums.index_put_((places,), rows, accumulate=True)
    return sums.index_add_(0, places, rows)


@dataclass(frozen=True)
class Totals:
    """Statistics over all keys of each class, from which the contribution of unretrieved keys is estimated.

    ``counts`` is the number of keys ``n_c``, ``[c]``, or ``[q, c]`` if queries use different keys. ``affinities``
    ``[q, c]`` is the sum of affinities to all keys of a class, ``n_c f mu_c``. It costs one product with ``c`` key sums
    instead of ``n`` keys.
    """

    counts: Tensor
    affinities: Tensor

    @classmethod
    def of(cls, features: Tensor, key_sums: Tensor, counts: Tensor) -> Totals:
        """Return the totals of queries ``[q, d]`` for classes whose keys sum to ``key_sums`` ``[c, d]``."""
        return cls(counts.to(features.dtype), affinity(features, key_sums))

    def rest(self, affinity: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number ``r_c`` and mean affinity ``m_c`` of each class's keys other than the given ones.

        ``m_c = (n_c f mu_c - sum of given affinities of c) / r_c``, exact up to rounding, and 0 if ``r_c`` is 0. Both
        are ``[q, c]``.
        """
        n_classes = self.counts.shape[-1]
        number = self.counts - sum_by_class(torch.ones_like(affinity), class_ids, n_classes)
        total = self.affinities - sum_by_class(affinity, class_ids, n_classes)
        some = number > 0
        return number, torch.where(some, total / torch.where(some, number, 1), 0)


@dataclass(frozen=True)
class Values:
    """Solved or trained values: what each key adds to each class. One-hot rows give plain Tip-Adapter.

    ``matrix`` ``[n, c]`` holds ``V_i`` in row i, in the dtype of the weights. ``rows`` ``[q, k]`` int64 is the row of
    each retrieved key (any row for an empty slot); ``None`` if column j of the affinity is row j. ``sums`` ``[c, c]``
    holds in row g the sum of the values of class g's keys; only a tail needs it.
    """

    matrix: Tensor
    rows: Tensor | None = None
    sums: Tensor | None = None

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum over keys i of ``weights[:, i] V_i``, ``[q, k]`` to ``[q, c]``, without a ``[q, k, c]``."""
        if self.rows is None:
            return weights @ self.matrix
        if not self.rows.shape[1]:  # embedding_bag refuses an empty bag
            return weights.new_zeros(len(weights), self.matrix.shape[1])
        return embedding_bag(self.rows, self.matrix, per_sample_weights=weights, mode="sum")


def cache_logits(
    affinity: Tensor,
    class_ids: Tensor,
    n_classes: int,
    beta: float,
    tail: Totals | None = None,
    values: Values | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the cache logits ``C``: the sum of key weights in each class, ``[q, c]`` (equation 5).

    ``C[:, c] = sum over keys i of class c of exp(-beta (1 - A[:, i]))``, in the dtype of ``affinity``.

    - All keys: ``affinity`` ``[q, n]`` and ``class_ids`` ``[n]``. Exact; the results of disjoint blocks add up.
    - Retrieved keys: ``affinity`` and ``class_ids`` ``[q, k]``. An empty slot has the class id ``c``.
    - ``tail`` adds ``r_c exp(-beta (1 - m_c))`` for the keys of class c that were not retrieved, at their mean affinity
      ``m_c``. This never exceeds their exact sum.
    - ``values`` replaces the one-hot labels: ``C = exp(-beta (1 - A)) V``. With a tail, an unretrieved key i of class g
      adds ``exp(-beta (1 - m_g)) V_i``.
    - ``out`` ``[q, c]``, for a block of all keys: add the logits to it and turn ``affinity`` into weights, in place.
      Fastest if both are transposes of contiguous tensors, one row per key.

    Raises ValueError for a tail with values that lack ``sums``.
    """
    if out is not None:
        weights = weight(affinity, beta, out=affinity)
        return (
            sum_by_class(weights, class_ids, n_classes, out) if values is None else out.addmm_(weights, values.matrix)
        )
    weights = weight(affinity, beta)
    if values is not None:
        return _valued(weights, affinity, class_ids, n_classes, beta, tail, values)
    cache = sum_by_class(weights, class_ids, n_classes)
    if tail is not None:
        number, mean = tail.rest(affinity, class_ids)
        cache = cache + at_mean(number, mean, beta)
    return cache


def _valued(
    weights: Tensor,
    affinity: Tensor,
    class_ids: Tensor,
    n_classes: int,
    beta: float,
    tail: Totals | None,
    values: Values,
) -> Tensor:
    """Return ``sum over keys i of (w_i - t[:, y_i]) V_i + t sums``, where ``t[:, g]`` is the tail weight of class g.

    ``t sums`` counts every key at the tail weight; the first term corrects the retrieved ones.
    """
    filled = class_ids < n_classes
    if tail is None:
        return values.weighted(weights.where(filled, 0))
    if values.sums is None:
        raise ValueError("values: no sums; a tail needs the sum of the values of each class, [c, c]")
    number, mean = tail.rest(affinity, class_ids)
    left = weight(mean, beta).where(number > 0, 0)
    own = left.gather(1, class_ids.clamp_max(n_classes - 1).expand_as(weights))
    return values.weighted((weights - own).where(filled, 0)) + left @ values.sums


def ridge_values(gram: Tensor, targets: Tensor, ridge: float | Tensor) -> Tensor:
    """Solve for the values that classify the keys themselves: ``V = (G + diag(lambda))^-1 Y``, kernel ridge regression.

    ``gram`` is ``G = exp(-beta (1 - phi(K) phi(K)^T))``, of shape ``[n, n]``, and is overwritten. ``targets`` ``Y``, of
    shape ``[n, c]``, are the one-hot labels. ``ridge`` is ``lambda`` > 0: one number, or one for each key. Cholesky
    factorisation solves the system in the dtype of ``gram``.

    Source: ProKeR (Bendou et al., CVPR 2025, equation 6). With the identity for the inverse, this is Tip-Adapter.
    Raises torch.linalg.LinAlgError if the system cannot be solved in that dtype.
    """
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram))


def log_cache(cache: Tensor, offset: float | None) -> Tensor:
    """Apply the link ``log(1 + max(C, 0) / o)`` to cache logits ``[q, c]`` in place. Without an offset, do nothing.

    Solved values give a ``C`` near the probability of each class, over several decades; the logarithm makes it a logit.
    Probabilities well below the offset ``o`` are no longer told apart. The order of classes with ``C > 0`` stays.
    """
    return cache if offset is None else cache.clamp_min_(0).div_(offset).log1p_()


def text_logits(features: Tensor, text_weights: Tensor, logit_scale: float, out: Tensor | None = None) -> Tensor:
    """Return CLIP's zero-shot logits ``logit_scale * f W^T`` ``[q, c]``."""
    return affinity(features, text_weights, out=out).mul_(logit_scale)


def blend(text_logits: Tensor, cache_logits: Tensor, alpha: float) -> Tensor:
    """Return the classifier's logits: text plus ``alpha`` (the residual ratio) times cache (equation 6)."""
    return torch.add(text_logits, cache_logits, alpha=min(alpha, LARGEST))


@dataclass(frozen=True)
class Terms:
    """The two terms of the logits, ``[q, c]`` each: ``text``, and ``cache`` after the link and without alpha."""

    text: Tensor
    cache: Tensor

    def logits(self, settings: Settings, slack: float = 0.0) -> Tensor:
        """Return the logits ``text + alpha * cache`` ``[q, c]``.

        With ``slack``, return an upper bound for a cache that may be larger by this fraction.
        """
        return blend(self.text, self.cache, settings.alpha * (1 + slack))


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``softmax(logits / T)`` ``[q, c]`` float32. The temperature T > 0 never changes the ranking.

    The result is finite for every T: the largest logit is subtracted first, and the division is in float64.
    """
    return ((logits - logits.amax(dim=1, keepdim=True)).double() / temperature).softmax(dim=1).float()
