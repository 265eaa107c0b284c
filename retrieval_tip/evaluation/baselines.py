"""What else the same shots allow: the field's simple rivals, each linear in the features.

Letters: ``K`` ``[n, d]`` are the keys of an index, ``n_c`` of them of class c, and ``mu_c`` is the mean of these.
What a rival has to choose, it chooses by the folds of the shots that the closed form is chosen by
(:mod:`fit.closed_form`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.fit.closed_form import FOLDS, Folds, blend
from retrieval_tip.fit.forms import Within
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.store.labels import images_of

SCALE = 100.0
"""Of cosines to class means, as of CLIP's to text."""

CS = (10.0, 100.0, 1000.0, 10000.0)
"""Inverse strengths of a linear probe's penalty, for unit features."""

SINGLE_C = 1000.0
"""That of one photograph a class, which leaves nothing to choose by."""


@dataclass(frozen=True)
class Linear:
    """``logits = f W^T + b``: weights ``W`` ``[c, d]`` and bias ``b`` ``[c]``, float32."""

    weights: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """``[q, d]`` to ``[q, c]``."""
        return torch.as_tensor(features, dtype=torch.float32) @ self.weights.T + self.bias


def class_means(cache: CacheModel) -> Linear:
    """Nearest class mean: ``100 f unit(mu_c)^T``. A class without a key gets 0.

    Source: the nearest class mean classifier (Mensink et al., TPAMI 2013), of cosines.
    """
    folds = _folds(cache)
    means = normalize(_means(folds, torch.arange(cache.n)))
    return Linear(SCALE * means, torch.zeros(folds.c))


def linear_probe(cache: CacheModel) -> Linear:
    """Multinomial logistic regression: ``min over W, b of |W|^2 / 2 + C sum_i -log softmax(k_i W^T + b)[y_i]``.

    The C of :data:`CS` that is right most often on the folds, of equals the one of the least cross-entropy. Source: the
    linear probe of CLIP (Radford et al., ICML 2021), which chooses it on validation images.
    """
    folds = _folds(cache)
    right, losses = torch.zeros(len(CS)), torch.zeros(len(CS))
    for held in folds.held:
        for at, probe in enumerate(_probes(folds, held.rows, CS)):
            logits = probe.logits(held.features)
            right[at] += (logits.argmax(1) == held.ids).sum()
            losses[at] += cross_entropy(logits, held.ids, reduction="sum")
    best = max(range(len(CS)), key=lambda at: (float(right[at]), -float(losses[at])))
    return _probes(folds, torch.arange(cache.n), CS[: best + 1] if folds.held else (SINGLE_C,))[-1]


def discriminant(cache: CacheModel) -> Linear:
    """Gaussian discriminant analysis with one covariance: ``a text + b (f S^-1 mu_c^T - mu_c S^-1 mu_c^T / 2)``.

    ``S^-1`` is ``d ((n - 1) S + tr(S) I)^-1`` but for a factor, of the scatter ``S`` within classes (that of all, where
    each has one key). ``a`` and ``b`` are the most likely ones on the folds, 1 where there are none. Source: GDA-CLIP
    (Wang et al., ICLR 2024), which chooses ``b / a`` on validation images.
    """
    folds = _folds(cache)
    whole, a, b = _gaussian(folds, torch.arange(cache.n)), 1.0, 1.0
    if folds.held:
        features, ids = (torch.cat([getattr(held, name) for held in folds.held]) for name in ("features", "ids"))
        logits = torch.cat([_gaussian(folds, held.rows).logits(held.features) for held in folds.held])
        blended = blend(None if folds.text is None else features @ folds.text.T, logits, ids)
        a, b = blended.a, blended.b
    text = 0.0 if folds.text is None else a * folds.text
    return Linear(text + b * whole.weights, b * whole.bias)


def _folds(cache: CacheModel) -> Folds:
    """The shots, in the folds that a rival is chosen by."""
    text = cache.text_weights.cpu() * cache.settings.logit_scale if cache.has_text else None
    keys, ids = np.asarray(cache.keys[np.arange(cache.n)], dtype=np.float32), cache.class_ids.cpu().numpy()
    return Folds.of_shots(keys, ids, len(cache.class_names), text, images_of(cache.labels), FOLDS, cache.n)


def _means(folds: Folds, rows: Tensor) -> Tensor:
    """``mu`` ``[c, d]`` of some of the keys; 0 of a class without one."""
    keys, ids = folds.taken(rows)
    sums = torch.zeros(folds.c, keys.shape[1]).index_add_(0, ids, keys)
    return sums / torch.bincount(ids, minlength=folds.c).clamp_min(1)[:, None]


def _gaussian(folds: Folds, rows: Tensor) -> Linear:
    """The discriminant of some of the keys, without text."""
    means, d = _means(folds, rows).double(), folds.keys.shape[1]
    metric = Within(d / (len(rows) - 1 + d)).fit(folds.scatter(rows))
    weights = means if metric is None else means @ (metric.transform.double() @ metric.transform.double())
    return Linear(weights.float(), (weights * means).sum(1).div(-2).float())


def _probes(folds: Folds, rows: Tensor, cs: tuple[float, ...]) -> list[Linear]:
    """Linear probes of some of the keys, one a C, ascending: each starts from the one before."""
    keys, ids = folds.taken(rows)
    weights = torch.zeros(folds.c, keys.shape[1], requires_grad=True)
    bias = torch.zeros(folds.c, requires_grad=True)
    probes = []
    for c in cs:
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-8, line_search_fn="strong_wolfe"
        )

        def loss(c: float = c, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(keys @ weights.T + bias, ids) + weights.square().sum() / (2 * c * len(keys))
            value.backward()
            return value

        optimizer.step(loss)
        probes.append(Linear(weights.detach().clone(), bias.detach().clone()))
    return probes


STEPS = 300
"""Of L-BFGS for each C, at most."""
