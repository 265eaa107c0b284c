"""Cache logits with a gradient of their own: two matrix products a step, and never the one-hot one.

For queries ``f`` ``[q, d]``, keys ``K`` ``[n, d]`` of classes ``y`` ``[n]``, and values ``V`` ``[n, c]`` (one-hot rows
of ``y`` where none are trained)::

    forward     A^T = K f^T,  w = exp(-beta (1 - A^T))       [n, q]
                C = w^T V                                    a sum by class where V is one-hot
    backward    dA^T = beta w * (V dC^T)                     V dC^T picks a row of dC^T a key where V is one-hot
                dK = dA^T f,  df = dA K,  dV = w dC

Both directions take a block of keys at a time, small enough for the processor's cache: the optimiser uses its gradient
before the next one is computed, and the whole ``dK`` need not exist. :class:`RetrievedKeys` does the same where each
query meets its nearest keys only. The formula itself is :mod:`tip`'s; this module knows its derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.logits import slices

BLOCK = 2048
"""Keys at a time on a CPU (benchmarks/finetune.py)."""

GPU_BLOCK = 65536
"""Keys at a time on a GPU."""

GATHERED = 1 << 24
"""Values of retrieved keys that are gathered at a time: 64 MiB of float32."""


@dataclass(frozen=True)
class Block:
    """Gradients of the keys in rows ``part``: ``keys`` ``[m, d]`` and ``values`` ``[m, c]``, where asked for."""

    part: slice
    keys: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class AllKeys:
    """Keys ``[n, d]`` that every query meets, their ``class_ids`` ``[n]`` int64, and trained ``values`` ``[n, c]``.

    Matrices are multiplied in ``products`` (by default the dtype of the keys) and summed in float32 by the processor;
    everything else is in the dtype of the queries.
    """

    keys: Tensor
    class_ids: Tensor
    n_classes: int
    beta: float
    values: Tensor | None = None
    products: torch.dtype | None = None
    block: int = BLOCK

    def forward(self, features: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cache logits ``C`` ``[q, c]`` of queries ``[q, d]``, and the weights ``w`` ``[n, q]`` for the backward.

        These are put into ``memory`` (``n q`` numbers, or more) where it is given: fresh memory costs as much as them.
        """
        n, q = len(self.keys), len(features)
        weights = features.new_empty(n, q) if memory is None else memory[: n * q].view(n, q)
        queries = features.to(self._products)
        cache = features.new_zeros(self.n_classes, q)
        same = self._products == features.dtype
        for part in slices(len(self.keys), self.block):
            w = weights[part]
            affinity = tip.affinity(self.keys[part].to(self._products), queries, out=w if same else None)
            tip.weight(affinity if same else affinity.to(w.dtype), self.beta, out=w)
            if self.values is None:
                cache.index_add_(0, self.class_ids[part], w)
            else:
                cache.addmm_(self.values[part].T, w)
        return cache.T, weights

    def backward(
        self,
        d_cache: Tensor,
        features: Tensor,
        weights: Tensor,
        *,
        keys: bool = True,
        values: bool = False,
        d_features: Tensor | None = None,
    ) -> Iterator[Block]:
        """Gradients block by block, for ``d_cache`` ``[q, c]`` and the ``weights`` of :meth:`forward`.

        The gradient of the queries is added to ``d_features`` ``[q, d]`` where that is given. A block's keys and values
        may be changed as soon as it is there: no later one depends on them. It is to be used before the next one is
        asked for, which takes its memory.
        """
        queries = features.to(self._products)
        by_class = self.beta * d_cache.T.contiguous()
        memory = torch.empty(
            min(self.block, len(self.keys)), features.shape[1], dtype=self._products, device=features.device
        )
        for part in slices(len(self.keys), self.block):
            w = weights[part]
            d_values = w @ d_cache if values else None
            d_keys = None
            if keys or d_features is not None:
                met = by_class[self.class_ids[part]] if self.values is None else self.values[part] @ by_class
                d_affinity = met.mul_(w).to(self._products)
                if d_features is not None:
                    d_features += d_affinity.T @ self.keys[part].to(self._products)
                if keys:
                    d_keys = torch.mm(d_affinity, queries, out=memory[: len(w)]).to(features.dtype)
            yield Block(part, d_keys, d_values)

    @property
    def _products(self) -> torch.dtype:
        return self.products or self.keys.dtype


@dataclass(frozen=True)
class RetrievedKeys:
    """Keys ``[n, d]`` of which each query meets some; the others count at their class's mean affinity, as a tail.

    ``sums`` ``[c, d]`` and ``counts`` ``[c]`` are those of all keys of a class. The tail of a query depends on the keys
    that it did not retrieve alone, so the retrieved ones get their own gradient only.
    """

    keys: Tensor
    class_ids: Tensor
    sums: Tensor
    counts: Tensor
    beta: float

    def forward(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cache logits ``[q, c]`` from the keys in ``rows`` ``[q, k]`` (-1: none), and their weights ``[q, k]``."""
        n_classes = len(self.counts)
        empty = rows < 0
        rows = rows.clamp_min(0)
        step = max(1, GATHERED // (rows.shape[1] * self.keys.shape[1]))
        parts = zip(features.split(step), rows.split(step), strict=True)
        affinity = torch.cat([torch.einsum("qd,qkd->qk", f, self.keys[r]) for f, r in parts]).masked_fill_(empty, 0)
        ids = self.class_ids[rows].masked_fill_(empty, n_classes)
        totals = tip.Totals.of(features, self.sums, self.counts)
        cache = tip.cache_logits(affinity, ids, n_classes, self.beta, totals)
        return cache, tip.weight(affinity, self.beta).masked_fill_(empty, 0)

    def backward(self, d_cache: Tensor, features: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``[u]`` that were met, ascending, and the gradient ``[u, d]`` of their keys."""
        query, slot = (rows >= 0).nonzero(as_tuple=True)
        rows_met = rows[query, slot]
        d_affinity = d_cache[query, self.class_ids[rows_met]].mul_(weights[query, slot]).mul_(self.beta)
        met, place = rows_met.unique(return_inverse=True)
        if features.is_cuda:  # where a sparse product need not add up in the same order again
            gradient = features.new_zeros(len(met), features.shape[1])
            for part in torch.arange(len(query), device=query.device).split(max(1, GATHERED // features.shape[1])):
                tip.add_rows(gradient, place[part], d_affinity[part, None] * features[query[part]])
            return met, gradient
        outer = torch.sparse_coo_tensor(
            torch.stack([place, query]), d_affinity, (len(met), len(rows)), check_invariants=False
        )
        return met, torch.sparse.mm(outer.coalesce(), features)
