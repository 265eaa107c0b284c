"""Cache logits with a hand-written gradient, which avoids the product with one-hot values.

This module adds the derivative to the formula in :mod:`tip`. The queries ``f`` have shape ``[q, d]``, the keys ``K``
have shape ``[n, d]``, and the class ids ``y`` of the keys have shape ``[n]``. The values ``V`` have shape ``[n, c]``;
their rows are one-hot vectors of ``y`` unless they are trained::

    forward     A^T = K f^T,  w = exp(-beta (1 - A^T))       [n, q]
                C = w^T V                                    a per-class sum if V is one-hot
    backward    dA^T = beta w * (V dC^T)                     V dC^T selects a row of dC^T per key if V is one-hot
                dK = dA^T f,  df = dA K,  dV = w dC

Both directions process the keys in blocks that fit into the CPU cache. Autograd on the plain formula takes 1.2 times as
long in float32 and 1.6 times as long in bfloat16 (for 16,000 keys of 1,024 values on one thread).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.retrieval.logits import slices

BLOCK = 2048
"""Keys per block on a CPU (benchmarks/finetune.py)."""
GPU_BLOCK = 65536
"""Keys per block on a GPU."""


@dataclass
class AllKeys:
    """A cache over all keys.

    ``keys`` has shape ``[n, d]``, and ``class_ids`` is an int64 tensor of shape ``[n]``. The optional trained
    ``values`` have shape ``[n, c]``. Matrices are multiplied in the dtype ``products``, which defaults to the dtype of
    the keys, and summed in float32. All other operations use the dtype of the queries. :meth:`backward` overwrites the
    ``grad`` of trained keys and values.
    """

    keys: Tensor
    class_ids: Tensor
    n_classes: int
    beta: float
    values: Tensor | None = None
    products: torch.dtype | None = None
    block: int = BLOCK
    _memory: Tensor = field(init=False, repr=False, default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return the cache logits of queries, and keep their weights for :meth:`backward`.

        The queries have shape ``[q, d]`` and the logits have shape ``[q, c]``.
        """
        n, q = len(self.keys), len(features)
        if len(self._memory) < n * q:  # allocating costs as much as computing the weights
            self._memory = features.new_empty(n * q)
        weights = self._weights(q)
        queries, cache = features.to(self._products), features.new_zeros(self.n_classes, q)
        same = self._products == features.dtype
        for part in slices(n, self.block):
            w = weights[part]
            affinity = tip.affinity(self.keys[part].to(self._products), queries, out=w if same else None)
            tip.weight(affinity if same else affinity.to(w.dtype), self.beta, out=w)
            if self.values is None:
                cache.index_add_(0, self.class_ids[part], w)
            else:
                cache.addmm_(self.values[part].T, w)
        return cache.T

    @torch.no_grad()
    def backward(self, d_cache: Tensor, features: Tensor, d_features: Tensor | None = None) -> None:
        """Write the gradients of the keys and values.

        ``d_cache`` is the gradient of the logits that the latest :meth:`forward` returned. If ``d_features`` is given,
        the gradient of the queries is added to it.
        """
        d_keys, d_values = self.keys.grad, None if self.values is None else self.values.grad
        queries, weights = features.to(self._products), self._weights(len(features))
        by_class = self.beta * d_cache.T.contiguous()
        for part in slices(len(self.keys), self.block):
            w = weights[part]
            if d_values is not None:
                torch.mm(w, d_cache, out=d_values[part])
            if d_keys is None and d_features is None:
                continue
            met = by_class[self.class_ids[part]] if self.values is None else self.values[part] @ by_class
            d_affinity = met.mul_(w).to(self._products)
            if d_features is not None:
                d_features += d_affinity.T @ self.keys[part].to(self._products)
            if d_keys is None:
                continue
            if d_keys.dtype == self._products:
                torch.mm(d_affinity, queries, out=d_keys[part])
            else:
                d_keys[part] = d_affinity @ queries

    def _weights(self, q: int) -> Tensor:
        return self._memory[: len(self.keys) * q].view(-1, q)

    @property
    def _products(self) -> torch.dtype:
        return self.products or self.keys.dtype
