"""Baselines: simple linear classifiers trained on the shots of an index.

Notation: ``K`` ``[n, d]`` are the keys of an index; ``mu_c`` is the mean of the ``n_c`` keys of class c. Baselines
choose their hyperparameters on the same folds of the shots as the closed form (:mod:`fit.closed_form`).
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
"""Scale of cosines to class means, like CLIP's for text."""

CS = (10.0, 100.0, 1000.0, 10000.0)
"""Inverse regularisation strengths of a linear probe, for unit features."""

SINGLE_C = 1000.0
"""Inverse strength with one shot per class, where nothing can be held out."""
STEPS = 300
"""Largest number of L-BFGS steps for each C."""


@dataclass(frozen=True)
class Linear:
    """``logits = f W^T + b``: weights ``W`` ``[c, d]`` and bias ``b`` ``[c]``, float32."""

    weights: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """Return logits ``[q, c]`` of features ``[q, d]``."""
        return torch.as_tensor(features, dtype=torch.float32) @ self.weights.T + self.bias


def class_means(cache: CacheModel) -> Linear:
    """Return the nearest class mean classifier: ``100 f unit(mu_c)^T``, 0 for classes without keys.

    Source: Mensink et al., TPAMI 2013, with cosines.
    """
    folds = _folds(cache)
    means = normalize(_means(folds, torch.arange(cache.n)))
    return Linear(SCALE * means, torch.zeros(folds.c))


def linear_probe(cache: CacheModel) -> Linear:
    """Fit logistic regression: ``min over W, b of |W|^2 / 2 + C sum_i -log softmax(k_i W^T + b)[y_i]``.

    Chooses the C of :data:`CS` with the highest accuracy on the folds; ties go to the lowest cross-entropy. Source: the
    linear probe of CLIP (Radford et al., ICML 2021), which chooses C on validation images.
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
    """Fit Gaussian discriminant analysis: ``a text + b (f S^-1 mu_c^T - mu_c S^-1 mu_c^T / 2)``.

    ``S^-1`` is ``d ((n - 1) S + tr(S) I)^-1`` up to a factor, for the scatter ``S`` within classes (or of all keys, if
    each class has one). ``a`` and ``b`` maximise the likelihood on the folds; without folds they are 1. Source:
    GDA-CLIP (Wang et al., ICLR 2024), which chooses ``b / a`` on validation images.
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
    text = cache.text_weights.cpu() * cache.settings.logit_scale if cache.has_text else None
    keys, ids = np.asarray(cache.keys[np.arange(cache.n)], dtype=np.float32), cache.class_ids.cpu().numpy()
    return Folds.of_shots(keys, ids, len(cache.class_names), text, images_of(cache.labels), FOLDS, cache.n)


def _means(folds: Folds, rows: Tensor) -> Tensor:
    """Return class means ``[c, d]`` of some of the keys; 0 for classes without keys."""
    keys, ids = folds.taken(rows)
    sums = torch.zeros(folds.c, keys.shape[1]).index_add_(0, ids, keys)
    return sums / torch.bincount(ids, minlength=folds.c).clamp_min(1)[:, None]


def _gaussian(folds: Folds, rows: Tensor) -> Linear:
    """Return the discriminant of some of the keys, without text."""
    means, d = _means(folds, rows).double(), folds.keys.shape[1]
    metric = Within(d / (len(rows) - 1 + d)).fit(folds.scatter(rows))
    weights = means if metric is None else means @ (metric.transform.double() @ metric.transform.double())
    return Linear(weights.float(), (weights * means).sum(1).div(-2).float())


def _probes(folds: Folds, rows: Tensor, cs: tuple[float, ...]) -> list[Linear]:
    """Fit linear probes to some of the keys, one for each ascending C; each starts from the previous one."""
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
