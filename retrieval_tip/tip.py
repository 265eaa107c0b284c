"""The method, once: Tip-Adapter (Zhang et al., ECCV 2022, section 3) as functions of torch tensors.

Letters used throughout:

- ``f`` features of the queries, ``[q, d]``, unit norm
- ``K`` keys, ``[n, d]``: features of the labelled shots (unit norm, unless they were fine-tuned)
- ``V`` values of the keys, ``[n, c]``: what each gives to the classes. One-hot, 1 for its own class, unless they were
  solved or trained
- ``W`` text weights of the classes, ``[c, d]``

:func:`answer` is the whole method. Everything else here and in the package computes the same numbers faster, from fewer
keys, or for more keys than memory holds. Read this file first, then ``retrieval/logits.py`` (which keys a query meets),
``answering.py`` (from logits to predictions) and ``cache_model.py`` (the product).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from retrieval_tip.settings import Settings

LARGEST = torch.finfo(torch.float32).max
"""Torch refuses a larger factor. Where it matters the logits overflow anyway."""


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
    """Return the logits ``[q, c]``: the whole method. The softmax of the logits / temperature is the answer.

    Tip-Adapter has no metric (``phi(x) = x``), one-hot values and no ``offset`` ``o``. All three can be fitted to the
    shots in closed form (:mod:`fit.closed_form`); the other settings are those of :class:`settings.Settings`.
    """
    A = phi(f) @ phi(K).T  # affinity
    C = torch.exp(-beta * (1 - A)) @ V  # cache
    if offset is not None:
        C = torch.log(1 + C.clamp(min=0) / offset)  # link
    return blend(logit_scale * f @ W.T, C, alpha)


@dataclass(frozen=True)
class Metric:
    """A metric ``phi(x) = unit((x - m) T)``: features ``[q, d]`` to unit vectors ``[q, d]``, float32.

    ``mean`` ``m`` ``[d]`` and ``transform`` ``T`` ``[d, d]``, both float32. Queries and keys go through it alike, text
    weights do not.
    """

    mean: Tensor
    transform: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """``phi`` of features ``[q, d]``; one that equals the mean becomes 0."""
        return torch.nn.functional.normalize((features - self.mean) @ self.transform)

    def to(self, device: str) -> Metric:
        """The same on a device."""
        return Metric(self.mean.to(device), self.transform.to(device))

    def double(self) -> Metric:
        """Return the same metric in float64."""
        return Metric(self.mean.double(), self.transform.double())


def affinity(features: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Inner products ``A = f K^T``: features ``[q, d]`` and keys ``[n, d]`` to ``[q, n]`` (paper, equation 4).

    With a metric, of ``phi(f)`` and ``phi(K)``.
    """
    return torch.mm(features, keys.T, out=out)


def weight(affinity: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """The weight of one key in the cache logit of its class: ``exp(-beta (1 - A))``, elementwise (paper, equation 4).

    ``beta`` is the sharpness: at 0 every key counts 1, and the larger it is the more only near keys count.
    """
    return torch.sub(affinity, 1, out=out).mul_(beta).exp_()  # one allocation at most: this is the largest array


def at_mean(number: Tensor, mean: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """The tail: ``r_c`` keys of a class at their mean affinity ``m_c``, ``r_c exp(-beta (1 - m_c))``, elementwise.

    The exponential is convex, so this never exceeds what they add at their own affinities.
    """
    return weight(mean, beta, out=out).mul_(number)


def sum_by_class(values: Tensor, class_ids: Tensor, n_classes: int, out: Tensor | None = None) -> Tensor:
    """Sum values over the keys of each class, ``[q, k]`` to ``[q, c]``, without the one-hot product.

    ``class_ids`` is ``[k]`` where all queries meet the same keys, or ``[q, k]`` where each met its own. The id ``c``
    marks an empty slot and is left out. With ``out`` ``[q, c]`` the sums are added to it; all queries meet the same
    keys then, and no slot is empty.
    """
    if out is not None:
        add_rows(out.T, class_ids, values.T)
        return out
    q = values.shape[0]
    if class_ids.ndim == 1:  # keys along the rows: each addition is one contiguous run over the queries
        return add_rows(values.new_zeros(n_classes + 1, q), class_ids, values.T)[:n_classes].T
    sums = values.new_zeros(q, n_classes + 1)
    if values.is_cuda:  # as in add_rows
        queries = torch.arange(q, device=values.device)[:, None]
        return sums.index_put_((queries, class_ids), values, accumulate=True)[:, :n_classes]
    return sums.scatter_add_(1, class_ids, values)[:, :n_classes]


def add_rows(sums: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """``sums[places[i]] += rows[i]`` ``[m, ...]``, in place and always in one order.

    On a GPU ``index_add_`` adds as its threads come, so that the last bit differs from run to run; there what
    ``index_put_`` adds up is sorted first.
    """
    if sums.is_cuda:
        return sums.index_put_((places,), rows, accumulate=True)
    return sums.index_add_(0, places, rows)


@dataclass(frozen=True)
class Totals:
    """Facts of all keys of each class before any is retrieved: enough to estimate those that are not.

    ``counts`` ``[c]`` (or ``[q, c]``, where queries meet different keys): the number of keys ``n_c``. ``affinities``
    ``[q, c]``: the sum of the affinities to all keys of the class, ``n_c f mu_c``, which costs one product with the
    ``c`` sums of keys instead of the ``n`` keys.
    """

    counts: Tensor
    affinities: Tensor

    @classmethod
    def of(cls, features: Tensor, key_sums: Tensor, counts: Tensor) -> Totals:
        """Totals of queries ``f`` ``[q, d]`` for classes whose keys sum to ``key_sums`` ``[c, d]``."""
        return cls(counts.to(features.dtype), affinity(features, key_sums))

    def rest(self, affinity: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Number ``r_c`` and mean affinity ``m_c`` of the keys of each class that are not among the given ones.

        ``m_c = (n_c f mu_c - sum of the given affinities of c) / r_c``, exact up to rounding; both ``[q, c]``.
        Where ``r_c`` is 0 the mean is 0.
        """
        n_classes = self.counts.shape[-1]
        number = self.counts - sum_by_class(torch.ones_like(affinity), class_ids, n_classes)
        total = self.affinities - sum_by_class(affinity, class_ids, n_classes)
        some = number > 0
        return number, torch.where(some, total / torch.where(some, number, 1), 0)


@dataclass(frozen=True)
class Values:
    """Values: what each key gives to each class, in place of 1 to its own: values that were solved or trained.

    ``matrix`` ``[n, c]``: row i is ``V_i``, of the dtype of the weights; one-hot rows are plain Tip-Adapter. ``rows``
    ``[q, k]`` int64: the row of each retrieved key (any row for an empty slot); ``None`` where column j of the affinity
    is row j. ``sums`` ``[c, c]``: row g is the sum of the values of all keys of class g; only a tail needs it.
    """

    matrix: Tensor
    rows: Tensor | None = None
    sums: Tensor | None = None

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum over the given keys i of weights[:, i] V_i``: ``[q, k]`` to ``[q, c]``, without a ``[q, k, c]``."""
        if self.rows is None:
            return weights @ self.matrix
        if not self.rows.shape[1]:  # which embedding_bag refuses
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
    """Cache logits ``C[:, c] = sum over the given keys i of class c of exp(-beta (1 - A[:, i]))`` (equation 5).

    - ``k = all``: ``affinity`` ``[q, n]`` to every key and ``class_ids`` ``[n]``. Exact. Sums over disjoint blocks of
      keys add up.
    - ``k = N``: ``affinity`` and ``class_ids`` ``[q, N]`` of the retrieved keys.
    - with ``tail``: the ``r_c`` keys of class ``c`` that were not retrieved count at their mean affinity ``m_c``, as
      ``r_c exp(-beta (1 - m_c))`` (:func:`at_mean`), which never exceeds what they would add.
    - with ``values``: key i gives ``V_i`` in place of 1 to its own class, ``C = exp(-beta (1 - A)) V``. With a tail
      too, a key of class g that was not retrieved gives ``exp(-beta (1 - m_g)) V_i``.
    - with ``out`` ``[q, c]``, as for a block of all keys: what these give is added to it, and ``affinity`` becomes
      their weights. Both are fastest as transposes of contiguous tensors, keys along the rows.

    Returns ``[q, c]`` of the dtype of ``affinity``. Empty slots have the class id ``c``. Raises ValueError for a tail
    with values that lack ``sums``.
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
    """``sum over the given keys i of (w_i - t[:, y_i]) V_i + t sums``, ``t[:, g]`` the weight of a key left of class g.

    ``t sums`` counts every key at the weight of one that is left; what was given of its class takes that back.
    """
    filled = class_ids < n_classes
    if tail is None:
        return values.weighted(weights.where(filled, 0))
    if values.sums is None:
        raise ValueError("values: without sums; a tail needs the sum of the values of each class, [c, c]")
    number, mean = tail.rest(affinity, class_ids)
    left = weight(mean, beta).where(number > 0, 0)
    own = left.gather(1, class_ids.clamp_max(n_classes - 1).expand_as(weights))
    return values.weighted((weights - own).where(filled, 0)) + left @ values.sums


def ridge_values(gram: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Values that answer the keys themselves: ``V = (G + lambda I)^-1 Y``, kernel ridge regression.

    ``gram`` ``G = exp(-beta (1 - phi(K) phi(K)^T))`` ``[n, n]``, ``targets`` ``[n, c]``, one-hot for keys of their own
    class; ``ridge`` ``lambda`` above 0. By Cholesky's factorisation in the dtype of ``gram``, whose memory is used.
    Source: ProKeR (Bendou et al., CVPR 2025, equation 6); with the identity in place of the inverse it is Tip-Adapter.
    Raises torch.linalg.LinAlgError where the system cannot be solved in that dtype.
    """
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram))


def log_cache(cache: Tensor, offset: float | None) -> Tensor:
    """``log(1 + max(C, 0) / o)`` of cache logits ``[q, c]``, in their memory: what solved values give spans decades.

    With one-hot targets ``C`` is near the chance of each class, and a logarithm makes a logit of it; the offset ``o``
    says below which chance classes are no longer told apart. It changes no order but of classes below 0. Without an
    offset they stay as they are.
    """
    return cache if offset is None else cache.clamp_min_(0).div_(offset).log1p_()


def text_logits(features: Tensor, text_weights: Tensor, logit_scale: float, out: Tensor | None = None) -> Tensor:
    """CLIP's zero-shot logits ``logit_scale * f W^T``: ``[q, d]`` and ``[c, d]`` to ``[q, c]``."""
    return affinity(features, text_weights, out=out).mul_(logit_scale)


def blend(text_logits: Tensor, cache_logits: Tensor, alpha: float) -> Tensor:
    """The classifier's logits, text plus ``alpha`` (the residual ratio) times cache (paper, equation 6)."""
    return torch.add(text_logits, cache_logits, alpha=min(alpha, LARGEST))


@dataclass(frozen=True)
class Terms:
    """Terms of the logits of ``q`` queries: ``text`` and ``cache`` (after the link, without alpha), ``[q, c]`` each."""

    text: Tensor
    cache: Tensor

    def logits(self, settings: Settings, slack: float = 0.0) -> Tensor:
        """Return the logits ``[q, c]``: ``text + alpha * cache``.

        With ``slack``, an upper bound of them for a cache that may be larger by this fraction.
        """
        return blend(self.text, self.cache, settings.alpha * (1 + slack))


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``softmax(logits / T)``, ``[q, c]`` to ``[q, c]`` float32. The temperature T > 0 changes no ranking.

    Finite for every T: the winner's logit is subtracted first, and the division is in float64.
    """
    return ((logits - logits.amax(dim=1, keepdim=True)).double() / temperature).softmax(dim=1).float()
