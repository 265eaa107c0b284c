"""Tip-Adapter (Zhang et al., ECCV 2022, section 3), implemented as functions of torch tensors.

The code uses the notation of the paper:

- ``f`` ``[q, d]``: the features of the queries, which have unit norm.
- ``K`` ``[n, d]``: the keys, which are the features of the labelled shots. They have unit norm unless they were
  fine-tuned.
- ``V`` ``[n, c]``: the values, which determine how much each key adds to each class. By default, they are one-hot
  labels.
- ``W`` ``[c, d]``: the text weights of the classes.
- ``M`` ``[c, d]`` and ``b`` ``[c]``: the class means and the offsets of the :class:`Discriminant`, which is not part of
  the paper.

:func:`answer` is the whole method. The rest of the package computes the same numbers faster, from fewer keys, or from
more keys than fit in memory. If you are new to the code, start here. Then read ``retrieval/logits.py`` to see which
keys a query uses, and ``model.py`` for the index that answers and that you save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from retrieval_tip.settings import Settings

LARGEST = torch.finfo(torch.float32).max
"""Largest factor that torch accepts. With a larger alpha, the logits would overflow anyway."""


def answer(
    f: Tensor,
    K: Tensor,
    V: Tensor,
    W: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
    gamma: float = 0.0,
    logit_scale: float = 100.0,
    phi: Callable[[Tensor], Tensor] = lambda x: x,
    offset: float | None = None,
    M: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """Return the logits, of shape ``[q, c]``. The class probabilities are ``softmax(logits / temperature)``.

    Plain Tip-Adapter uses no metric (``phi(x) = x``), one-hot values, no ``offset`` and no discriminant. All of them
    can be fitted to the shots (see :mod:`fit.closed_form`). For the other parameters, see :class:`settings.Settings`.
    """
    A = phi(f) @ phi(K).T  # affinity
    C = torch.exp(-beta * (1 - A)) @ V  # cache
    if offset is not None:
        C = torch.log(1 + C.clamp(min=0) / offset)  # link
    if M is not None and b is not None:
        C = C + gamma * (phi(f) @ M.T + b)  # discriminant
    return logit_scale * f @ W.T + alpha * C


@dataclass(frozen=True)
class Metric:
    """A metric ``phi(x) = unit((x - m) T)``, which maps features to unit vectors.

    ``mean`` is the vector ``m``, of shape ``[d]``. The matrix ``T`` is given as ``whole``, of shape ``[d, d]``, or in a
    compact form: a ``factor`` of shape ``[1 + r, d]`` holds ``a`` and the rows of ``G`` in ``T = diag(a) (I - G^T G)``.
    Few keys only vary in few directions, which are the rows of ``G``. All are float32. The metric is applied to queries
    and keys, but not to text weights.
    """

    mean: Tensor
    whole: Tensor | None = None
    factor: Tensor | None = None

    @cached_property
    def transform(self) -> Tensor:
        """The matrix ``T``, of shape ``[d, d]``."""
        if self.factor is None:
            assert self.whole is not None
            return self.whole
        scale = self.factor[0]
        rows = self.factor[1:]
        transform = (-scale[:, None] * rows.T) @ rows
        transform.diagonal().add_(scale)
        return transform

    def __call__(self, features: Tensor) -> Tensor:
        """Apply the metric to features of shape ``[q, d]``. A feature that equals the mean is mapped to 0."""
        apart = features - self.mean
        if self.factor is None or 2 * len(self.factor) > len(self.mean):
            return torch.nn.functional.normalize(apart @ self.transform.to(features.dtype))
        scale = self.factor[0].to(features.dtype)
        rows = self.factor[1:].to(features.dtype)
        scaled = apart * scale
        return torch.nn.functional.normalize(scaled - scaled @ rows.T @ rows)

    def to(self, device: str) -> Metric:
        """Return this metric, or a copy of it on another device."""
        if self.mean.device == torch.device(device):  # it keeps its matrix
            return self
        whole = None if self.whole is None else self.whole.to(device)
        factor = None if self.factor is None else self.factor.to(device)
        return Metric(self.mean.to(device), whole, factor)


@dataclass(frozen=True)
class Discriminant:
    """The discriminant ``B = phi(f) M^T + b`` compares a query with the mean of the keys of each class.

    It is the linear discriminant of a Gaussian model (Wang et al., GDA-CLIP, ICLR 2024, equation 5): in the metric,
    the keys of each class spread equally in all directions around the class mean. ``means`` is ``M``, of shape
    ``[c, d]``, and ``offsets`` is ``b``, of shape ``[c]``.
    """

    means: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, key_sums: Tensor, counts: Tensor) -> Discriminant:
        """Compute the discriminant from the sums of the transformed keys, ``[c, d]``, and the number of keys, ``[c]``.

        The offsets are ``b_c = -(|M_c|^2 - v / n_c) / 2``, where ``v`` is the variance of the keys around their class
        means. The expected ``|M_c|^2`` exceeds the squared length of the true mean by ``v / n_c``. Without this
        correction, classes with few keys would be at a disadvantage. ``v`` is estimated under the assumption that keys
        have unit norm. A class without keys gets the average mean and offset of the other classes.
        """
        some = counts > 0
        means = key_sums / counts.clamp_min(1)[:, None]
        squares = (means * means).sum(1)
        free = counts.sum() - some.sum()
        variance = ((counts * (1 - squares)).sum() / free.clamp_min(1)).clamp_min(0)
        offsets = -(squares - variance / counts.clamp_min(1)) / 2
        if some.any():
            means = torch.where(some[:, None], means, means[some].mean(0))
            offsets = torch.where(some, offsets, offsets[some].mean())
        return cls(means, offsets)

    def __call__(self, points: Tensor) -> Tensor:
        """Return ``B``, of shape ``[q, c]``, for transformed queries ``phi(f)`` of shape ``[q, d]``."""
        return affinity(points, self.means).add_(self.offsets)


def affinity(features: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the inner products ``A = f K^T`` of the features and the keys, of shape ``[q, n]`` (equation 4).

    If the index has a metric, pass ``phi(f)`` and ``phi(K)``. The products have the dtype of the features.
    """
    return torch.mm(features, keys.T.to(features.dtype), out=out)


def weight(affinity: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return the weight ``exp(-beta (1 - A))`` that each key adds to the cache logit of its class (equation 4).

    ``beta`` is the sharpness. If it is 0, every key has weight 1. The larger it is, the more the nearest keys dominate.
    """
    return (
        torch.sub(affinity, 1, out=out).mul_(beta).exp_()
    )  # this is the largest array, so allocate it at most once


def at_mean(number: Tensor, mean: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    """Return the tail ``r_c exp(-beta (1 - m_c))``, the weight of ``r_c`` keys at their mean affinity ``m_c``.

    Because the exponential is convex, the tail never exceeds the exact sum over these keys.
    """
    return weight(mean, beta, out=out).mul_(number)


def sum_by_class(values: Tensor, class_ids: Tensor, n_classes: int) -> Tensor:
    """Sum values of shape ``[q, k]`` over the keys of each class, and return the sums, of shape ``[q, c]``.

    ``class_ids`` has the shape ``[k]`` if all queries use the same keys, and ``[q, k]`` otherwise. Slots with the class
    id ``c`` are empty and are ignored.
    """
    q = values.shape[0]
    if class_ids.ndim == 1:  # with one row per key, each addition reads contiguous memory
        return add_rows(values.new_zeros(n_classes + 1, q), class_ids, values.T)[:n_classes].T
    sums = values.new_zeros(q, n_classes + 1)
    if values.is_cuda:  # for the same reason as in add_rows
        queries = torch.arange(q, device=values.device)[:, None]
        return sums.index_put_((queries, class_ids), values, accumulate=True)[:, :n_classes]
    return sums.scatter_add_(1, class_ids, values)[:, :n_classes]


def add_rows(sums: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Add ``rows[i]`` to ``sums[places[i]]`` in place. The order of the additions is deterministic.

    On a GPU, ``index_add_`` adds rows in thread order, but ``index_put_`` sorts first.
    """
    if sums.is_cuda:
        return sums.index_put_((places,), rows, accumulate=True)
    return sums.index_add_(0, places, rows)


@dataclass(frozen=True)
class Totals:
    """Statistics over all keys of each class, which are used to estimate the contribution of unretrieved keys.

    ``counts`` holds the number of keys ``n_c`` of each class. Its shape is ``[c]``, or ``[q, c]`` if queries use
    different keys. ``affinities``, of shape ``[q, c]``, holds the sums of the affinities to all keys of a class,
    ``n_c f mu_c``.
    """

    counts: Tensor
    affinities: Tensor

    @classmethod
    def of(cls, features: Tensor, key_sums: Tensor, counts: Tensor) -> Totals:
        """Compute the totals of queries for classes whose keys sum to ``key_sums``, of shape ``[c, d]``."""
        return cls(counts.to(features.dtype), affinity(features, key_sums))

    def rest(self, affinity: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number ``r_c`` and the mean affinity ``m_c`` of the remaining keys of each class.

        Their mean affinity is ``m_c = (n_c f mu_c - sum of given affinities of c) / r_c``, or 0 if ``r_c`` is 0. Both
        results have the shape ``[q, c]``.
        """
        n_classes = self.counts.shape[-1]
        number = self.counts - sum_by_class(torch.ones_like(affinity), class_ids, n_classes)
        total = self.affinities - sum_by_class(affinity, class_ids, n_classes)
        some = number > 0
        return number, torch.where(some, total / torch.where(some, number, 1), 0)


@dataclass(frozen=True)
class Values:
    """Solved or trained values, the contribution of each key to each class. One-hot rows give plain Tip-Adapter.

    - ``matrix`` ``[n, c]``: row i holds the values ``V_i`` of key i, in the dtype of the weights.
    - ``rows`` ``[q, k]`` int64: the row of each retrieved key. Empty slots may hold any row. If ``rows`` is ``None``,
      column j of the affinity belongs to row j.
    - ``sums`` ``[c, c]``: row g holds the sum of the values of all keys of class g. It is only needed to compute a
      tail.
    """

    matrix: Tensor
    rows: Tensor | None = None
    sums: Tensor | None = None

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of ``weights[:, i] V_i`` over all keys i. No array of shape ``[q, k, c]`` is allocated."""
        if self.rows is None:
            return weights @ self.matrix
        if not self.rows.shape[1]:  # embedding_bag does not accept an empty bag
            return weights.new_zeros(len(weights), self.matrix.shape[1])
        return embedding_bag(self.rows, self.matrix, per_sample_weights=weights, mode="sum")


def cache_logits(
    affinity: Tensor,
    class_ids: Tensor,
    n_classes: int,
    beta: float,
    tail: Totals | None = None,
    values: Values | None = None,
) -> Tensor:
    """Return the cache logits ``C``, which are the sums of the key weights in each class (equation 5).

    ``C[:, c] = sum over keys i of class c of exp(-beta (1 - A[:, i]))``, in the dtype of ``affinity``. The shape of the
    result is ``[q, c]``.

    - To use all keys, pass an ``affinity`` of shape ``[q, n]`` and ``class_ids`` of shape ``[n]``. You can also call
      the function on disjoint blocks of keys and add up the results.
    - To use retrieved keys, pass ``affinity`` and ``class_ids`` of shape ``[q, k]``. Empty slots have the class id
      ``c``.
    - ``tail`` adds ``r_c exp(-beta (1 - m_c))`` for the keys of class c that were not retrieved, where ``m_c`` is their
      mean affinity. The tail never exceeds their exact sum.
    - ``values`` replaces the one-hot labels, so that ``C = exp(-beta (1 - A)) V``. If there is a tail, an unretrieved
      key i of class g adds ``exp(-beta (1 - m_g)) V_i``.

    Raises ValueError if there is a tail and the values have no ``sums``.
    """
    weights = weight(affinity, beta)
    rest = None if tail is None else tail.rest(affinity, class_ids)
    if values is None:
        cache = sum_by_class(weights, class_ids, n_classes)
        return cache if rest is None else cache + at_mean(*rest, beta)
    filled = class_ids < n_classes
    if rest is None:
        return values.weighted(weights.where(filled, 0))
    if values.sums is None:
        raise ValueError(
            "values: no sums; a tail needs the sum of the values of each class, [c, c]"
        )
    number, mean = rest
    # The tail is computed for all keys of a class, and its weights are taken off the retrieved ones.
    tail_weights = weight(mean, beta).where(number > 0, 0)
    classes = class_ids.clamp_max(n_classes - 1).expand_as(weights)
    above = (weights - tail_weights.gather(1, classes)).where(filled, 0)
    return values.weighted(above) + tail_weights @ values.sums


def log_cache(cache: Tensor, offset: float | None) -> Tensor:
    """Apply the link ``log(1 + max(C, 0) / o)`` to cache logits in place. If the offset ``o`` is ``None``, do nothing.

    With solved values, ``C`` is close to the probability of each class, which the logarithm turns into a logit. The
    order of classes with ``C > 0`` does not change.
    """
    return cache if offset is None else cache.clamp_min_(0).div_(offset).log1p_()


def text_logits(features: Tensor, text_weights: Tensor, logit_scale: float) -> Tensor:
    """Return CLIP's zero-shot logits ``logit_scale * f W^T``, of shape ``[q, c]``."""
    return affinity(features, text_weights).mul_(logit_scale)


@dataclass(frozen=True)
class Terms:
    """The terms of the logits, each of shape ``[q, c]``.

    ``text`` holds the zero-shot logits. ``cache`` holds the cache logits after the link. ``discriminant`` is ``B``, or
    ``None`` if gamma is 0. They are not yet multiplied by alpha and gamma.
    """

    text: Tensor
    cache: Tensor
    discriminant: Tensor | None = None

    def logits(self, settings: Settings) -> Tensor:
        """Return the logits ``text + alpha * (cache + gamma * discriminant)``, of shape ``[q, c]`` (equation 6)."""
        return torch.add(self.text, self.photos(settings), alpha=min(settings.alpha, LARGEST))

    def photos(self, settings: Settings) -> Tensor:
        """Return what the shots contribute, ``cache + gamma * discriminant``."""
        if self.discriminant is None:
            return self.cache
        return torch.add(self.cache, self.discriminant, alpha=settings.gamma)

    def strongest(self, counts: Tensor) -> Tensor:
        """Return the largest cache logit, of shape ``[q]``, of the classes whose number of keys is above 0."""
        return self.cache[:, counts > 0].amax(1)

    def queries(self, part: slice) -> Terms:
        """Return the terms of some queries, which share their memory."""
        return Terms(
            self.text[part],
            self.cache[part],
            None if self.discriminant is None else self.discriminant[part],
        )


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``softmax(logits / T)`` as a float32 tensor of shape ``[q, c]``. The temperature T must be above 0.

    The temperature never changes the ranking, and the result is finite for every temperature.
    """
    return (
        ((logits - logits.amax(dim=1, keepdim=True)).double() / temperature).softmax(dim=1).float()
    )
