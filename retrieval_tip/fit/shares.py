"""Choose the shares of several encoders, which say how much each of them counts."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from retrieval_tip.data.source import spread
from retrieval_tip.fit.folds import Folds, taken_keys
from retrieval_tip.fit.forms import Form

STEP = 4
"""The shares are about multiples of one divided by this number."""
COMPARED = 2048
"""Maximum number of keys to compare if no photo can be held out."""
REDUNDANT = 0.8
"""Correlation of affinities above which two encoders see the same. Two CNNs trained on the same photos have 0.77 and
two CLIP encoders 0.85, with one shot per class of Caltech101. The constant was chosen on shots that were held out.
"""

Shares = tuple[float, ...]


def shares_of(folds: Folds, form: Form) -> Shares:
    """Return the shares of least cross-entropy on held-out photos. They do not depend on the order of the encoders.

    Each encoder is tried alone. Then, as long as it lowers the cross-entropy, a quarter, a half or three quarters of
    all shares go to one more encoder. If no photo can be held out, see :func:`_without_folds`.
    """
    if not folds.can_judge:
        return _without_folds(folds)
    alone = [tuple(map(float, row)) for row in np.eye(len(folds.parts))]
    losses: dict[Shares, float] = {}

    def loss(shares: Shares) -> float:
        if shares not in losses:
            losses[shares] = folds.shared(shares).judge(form).loss
        return losses[shares]

    best = min(alone, key=loss)
    while True:
        more = [(one, step / STEP) for one, step in itertools.product(alone, range(1, STEP)) if not np.dot(best, one)]
        mixed = [tuple((1 - t) * a + t * b for a, b in zip(best, one, strict=True)) for one, t in more]
        found = min(mixed, key=loss, default=best)
        if loss(found) >= loss(best):
            return best
        best = found


def _without_folds(folds: Folds) -> Shares:
    """Return shares for shots that cannot be held out.

    Encoders differ in how alike any two photos are to them. Each affinity ``a`` is therefore measured as the contrast
    ``(a - m) / (1 - m)``, where ``m`` is the mean between classes, and all encoders get equal shares of it. Encoders
    that see the same (see :data:`REDUNDANT`) share theirs by the squares of the shares for which this contrast varies
    least between classes.
    """
    rows = torch.from_numpy(folds.ordered.rows[spread(len(folds.ids), COMPARED)])
    keys, ids = taken_keys(folds.keys, rows).double(), folds.ids[rows]
    others = ids[:, None] != ids
    if len(folds.parts) < 2 or not others.any():
        return tuple(folds.shares)
    parts = [torch.nn.functional.normalize(part) for part in keys.split([part.width for part in folds.parts], dim=1)]
    between = torch.stack([(part @ part.T)[others] for part in parts]).numpy()
    contrast = 1 / np.maximum(1 - between.mean(1), 1e-6)
    covariance = np.atleast_2d(np.cov(between * contrast[:, None]))
    spreads = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    counts = np.zeros(len(parts))
    for one in range(len(parts)):
        group = np.flatnonzero((covariance[one] > REDUNDANT * spreads[one] * spreads) | (np.arange(len(parts)) == one))
        least = np.linalg.solve(covariance[np.ix_(group, group)] + 1e-12 * np.eye(len(group)), np.ones(len(group)))
        least = least.clip(min=0)
        counts[one] = least[group == one][0] ** 2 / (least**2).sum()
    shares = counts * contrast
    rounded = (STEP * shares / shares.sum()).round()
    return tuple((rounded / rounded.sum()).tolist())
