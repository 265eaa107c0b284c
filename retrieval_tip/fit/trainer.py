"""Training steps that fine-tune keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.model import Index
from retrieval_tip.settings import Recipe

BLOCK, GPU_BLOCK = 2048, 65536
"""Keys per block on a CPU, where a block should fit in the cache (benchmarks/finetune.py), and on a GPU."""
QUERIES = 256
"""Number of queries per batch in an evaluation."""


class Trainer:
    """The trained parts of an index, together with their optimiser.

    ``keys`` is a float32 copy of the keys (shape ``[n, d]``). ``values`` is a copy of the values (shape ``[n, c]``), or
    ``None`` if they are one-hot.
    """

    def __init__(self, index: Index, recipe: Recipe) -> None:
        self.index, self.products = index, getattr(torch, recipe.precision)
        self.keys = torch.from_numpy(np.array(index.keys, dtype=np.float32)).to(index.device)
        self.values = None if index.values is None else index.values.clone()
        if self.values is None and "values" in recipe.train:
            self.values = functional.one_hot(index.class_ids, len(index.class_names)).float()
        matrices = (("keys", self.keys), ("values", self.values))
        self._trained = {
            part: matrix.requires_grad_() for part, matrix in matrices if matrix is not None and part in recipe.train
        }
        self._block = BLOCK if index.device == "cpu" else GPU_BLOCK
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
        )

    def step(self, features: Tensor, ids: Tensor, lr: float) -> tuple[float, int]:
        """Take one training step, and return the mean cross-entropy before the step and the number of right answers.

        ``features`` have shape ``[b, d]``, and ``ids`` are their class ids. If the cross-entropy is not finite, the
        step changes nothing.
        """
        logits, ids = self._logits(features), ids.to(self.index.device)
        loss = functional.cross_entropy(logits, ids)
        hits = (logits.argmax(dim=1) == ids).sum()
        value, right = torch.stack([loss.detach(), hits.to(loss)]).tolist()  # synchronises with the GPU only once
        if math.isfinite(value):
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
        return value, int(right)

    @torch.no_grad()
    def evaluate(self, features: Tensor, ids: Tensor) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy on queries."""
        loss, right = 0.0, 0
        for f, y in zip(features.split(QUERIES), ids.to(self.index.device).split(QUERIES), strict=True):
            logits = self._logits(f)
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(dim=1) == y).sum())
        return loss / len(ids), right / len(ids)

    def _logits(self, features: Tensor) -> Tensor:
        """Compute the logits of queries. The keys are processed in blocks, so that only the weights need ``n q``."""
        features, settings, c = features.to(self.index.device), self.index.settings, len(self.index.class_names)
        queries, cache = features.to(self.products), features.new_zeros(len(features), c)
        ids = self.index.class_ids.split(self._block)
        values = [None] * len(ids) if self.values is None else map(tip.Values, self.values.split(self._block))
        for keys, own, part in zip(self.keys.split(self._block), ids, values, strict=True):
            affinity = tip.affinity(keys.to(self.products), queries).to(features.dtype).T  # one row per key is faster
            cache = cache + tip.cache_logits(affinity, own, c, settings.beta, values=part)
        text = tip.text_logits(features, self.index.text, settings.logit_scale)
        return tip.Terms(text, cache).logits(settings)

    def trained(self) -> dict[str, Tensor]:
        """Return CPU copies of the trained matrices by name."""
        return {part: matrix.detach().to("cpu", copy=True) for part, matrix in self._trained.items()}

    @torch.no_grad()
    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Restore the matrices that :meth:`trained` returned."""
        for part, matrix in self._trained.items():
            matrix.copy_(trained[part])


def cosine(step: int, steps: int, lr: float) -> float:
    """Return the learning rate of a step. It falls from ``lr`` to 0 as ``lr (1 + cos(pi step / steps)) / 2``."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2
