"""Linear classifiers that are trained on the shots of an index and serve as baselines.

In the formulas, ``K`` is the matrix of keys (shape ``[n, d]``), and ``mu_c`` is the mean of the keys of class c. The
hyperparameters are selected on the same folds of the shots as those of the closed-form fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from retrieval_tip.fit.blend import HeldTerms
from retrieval_tip.fit.closed_form import FOLDS
from retrieval_tip.fit.folds import Folds
from retrieval_tip.fit.forms import Within
from retrieval_tip.model import Index
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.retrieval.ridge import class_weights

SCALE = 100.0
"""Scale of the cosines to class means. It equals the scale that CLIP uses for text."""

CS = (10.0, 100.0, 1000.0, 10000.0)
"""Inverse regularisation strengths to try for a linear probe on unit features."""

SINGLE_C = 1000.0
"""Inverse regularisation strength if each class has one shot, because no shot can then be held out."""
STEPS = 300
"""Maximum number of L-BFGS steps for each C."""


@dataclass(frozen=True)
class Linear:
    """A linear classifier ``logits = f W^T + b``.

    The weights ``W`` have shape ``[c, d]`` and the bias ``b`` has shape ``[c]``. Both are float32.
    """

    weights: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """Return the logits of ``q`` features as a tensor of shape ``[q, c]``."""
        return torch.as_tensor(features, dtype=torch.float32) @ self.weights.T + self.bias


def class_means(cache: Index) -> Linear:
    """Return the nearest class mean classifier ``100 f unit(mu_c)^T``.

    A class without keys has the logit 0. See Mensink et al., TPAMI 2013, who use distances instead of cosines.
    """
    folds = _folds(cache)
    means = normalize(_means(folds, torch.arange(cache.n)))
    return Linear(SCALE * means, torch.zeros(folds.c))


def linear_probe(cache: Index) -> Linear:
    """Fit logistic regression, which minimises ``|W|^2 / 2 + C sum_i w_i -log softmax(k_i W^T + b)[y_i]`` over W and b.

    The weights ``w`` have mean 1 and give every class the same total weight. The C from :data:`CS` with the highest
    mean accuracy over classes on the folds is selected. Ties go to the lowest cross-entropy. This is the linear probe
    of CLIP (Radford et al., ICML 2021), which selects C on validation images instead.
    """
    folds = _folds(cache)
    right, losses = torch.zeros(len(CS)), torch.zeros(len(CS))
    for held in folds.held:
        weights = _weights(folds, torch.arange(cache.n))[held.ids]
        for at, probe in enumerate(_probes(folds, held.rows, CS)):
            logits = probe.logits(held.features)
            right[at] += (weights * (logits.argmax(1) == held.ids)).sum()
            losses[at] += (weights * cross_entropy(logits, held.ids, reduction="none")).sum()
    best = max(range(len(CS)), key=lambda at: (float(right[at]), -float(losses[at])))
    return _probes(folds, torch.arange(cache.n), CS[: best + 1] if folds.held else (SINGLE_C,))[-1]


def discriminant(cache: Index) -> Linear:
    """Fit Gaussian discriminant analysis, which gives ``a text + b (f S^-1 mu_c^T - mu_c S^-1 mu_c^T / 2)``.

    ``S^-1`` is ``d ((n - 1) S + tr(S) I)^-1`` up to a constant factor, where ``S`` is the within-class scatter. If each
    class has one key, ``S`` is the scatter of all keys. ``a`` and ``b`` maximise the log-likelihood on the folds. If
    there are no folds, both are 1. This is GDA-CLIP (Wang et al., ICLR 2024), which selects ``b / a`` on validation
    images instead.
    """
    folds = _folds(cache)
    whole, a, b = _gaussian(folds, torch.arange(cache.n)), 1.0, 1.0
    if folds.held:
        features, ids = (
            torch.cat([getattr(held, name) for held in folds.held]) for name in ("features", "ids")
        )
        logits = torch.cat(
            [_gaussian(folds, held.rows).logits(held.features) for held in folds.held]
        )
        blended = HeldTerms(
            None if folds.text is None else features @ folds.text.T, logits, None, ids
        ).blend()
        a, b = blended.a, blended.b
    text = 0.0 if folds.text is None else a * folds.text
    return Linear(text + b * whole.weights, b * whole.bias)


def _folds(cache: Index) -> Folds:
    keys = np.asarray(cache.keys[np.arange(cache.n)], dtype=np.float32)
    return replace(Folds.of(cache), keys=keys).with_shots(FOLDS, cache.n)


def _weights(folds: Folds, rows: Tensor) -> Tensor:
    """Return a weight for each class. The keys in ``rows`` then have the same total weight in every class."""
    return class_weights(torch.bincount(folds.ids[rows], minlength=folds.c))


def _means(folds: Folds, rows: Tensor) -> Tensor:
    """Return the class means of the keys in ``rows``. The mean of a class that has no keys is 0."""
    keys, ids = folds.taken(rows)
    sums = torch.zeros(folds.c, keys.shape[1]).index_add_(0, ids, keys)
    return sums / torch.bincount(ids, minlength=folds.c).clamp_min(1)[:, None]


def _gaussian(folds: Folds, rows: Tensor) -> Linear:
    """Return the discriminant of the keys in ``rows``, excluding the text term."""
    means, d = _means(folds, rows).double(), folds.keys.shape[1]
    metric = Within(d / (len(rows) - 1 + d)).fit(folds.scatter(rows))
    weights = (
        means
        if metric is None
        else means @ (metric.transform.double() @ metric.transform.double().T)
    )
    return Linear(weights.float(), (weights * means).sum(1).div(-2).float())


def _probes(folds: Folds, rows: Tensor, cs: tuple[float, ...]) -> list[Linear]:
    """Fit a linear probe to the keys in ``rows`` for each C. Each starts from the previous one, so C must ascend."""
    keys, ids = folds.taken(rows)
    balance = _weights(folds, rows)[ids]
    weights = torch.zeros(folds.c, keys.shape[1], requires_grad=True)
    bias = torch.zeros(folds.c, requires_grad=True)
    probes = []
    for c in cs:
        optimizer = torch.optim.LBFGS(
            [weights, bias],
            max_iter=STEPS,
            tolerance_grad=1e-6,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        def loss(c: float = c, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            losses = cross_entropy(keys @ weights.T + bias, ids, reduction="none")
            value = (balance * losses).mean() + weights.square().sum() / (2 * c * len(keys))
            value.backward()
            return value

        optimizer.step(loss)
        probes.append(Linear(weights.detach().clone(), bias.detach().clone()))
    return probes
