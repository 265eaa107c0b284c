"""Choose the shares of several encoders, which say how much each of them counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retrieval_tip.arrays import DoubleArray
from retrieval_tip.data.source import spread
from retrieval_tip.fit.folds import Folds, taken_keys
from retrieval_tip.fit.forms import Form

STEP = 4
"""The shares that are compared are multiples of one divided by this number."""
FAVOUR = 2.0
"""How many nats of evidence the encoder that is best alone gets in advance."""
CLEAR = 5.0
"""How many nats of evidence below the best rule out some shares."""
LEAST = 0.05
"""Smallest share of an encoder. A smaller one becomes 0, so that the encoder does not run for every query."""
COMPARED = 2048
"""Maximum number of keys to compare if no photo can be held out."""
REDUNDANT = 0.8
"""Correlation of affinities above which two encoders see the same. Two CNNs trained on the same photos have 0.77 and
two CLIP encoders 0.85, with one shot per class of Caltech101. The constant was chosen on shots that were held out.
"""
PERMUTED, CONVINCED = 99, 90
"""Number of permutations to compare two encoders, and how many of them the agreement has to exceed."""
LEAST_CLASSES, ASKED = 4, 256
"""Minimum and maximum number of classes for this."""

Shares = tuple[float, ...]


def shares_of(splits: Sequence[Folds], form: Form) -> Shares:
    """Return the mean of all shares in quarters, weighted by how well they explain held-out photos.

    The weight of some shares is their posterior probability ``exp(-n L)``, where ``L`` is the cross-entropy in nats on
    the ``n`` held-out photos, in the mean of several ``splits`` of the photos. The best cell alone would overfit,
    because few photos tell the cells of the grid apart only by chance. Shares do not depend on the order of the
    encoders.
    """
    grid = itertools.product(range(STEP + 1), repeat=len(splits[0].parts))
    cells = np.array([cell for cell in grid if sum(cell) == STEP]) / STEP
    evidence = np.zeros(len(cells))
    for done, folds in enumerate(splits):
        losses = np.array(
            [folds.n * folds.shared(cell).judge(form).loss for cell in cells.tolist()]
        )
        evidence = (done * evidence - losses) / (done + 1)
        clear = evidence > evidence.max() - CLEAR
        cells, evidence = cells[clear], evidence[clear]
    alone = np.flatnonzero(cells.max(1) == 1)
    if len(alone):
        evidence[alone[evidence[alone].argmax()]] += FAVOUR
    weights = np.exp(evidence - evidence.max())
    shares = weights @ cells / weights.sum()
    shares[shares < LEAST] = 0
    return tuple((shares / shares.sum()).tolist())


def shares_without_folds(folds: Folds) -> Shares:
    """Return shares for shots that cannot be held out, where the encoder that is named first decides.

    Another encoder counts if it agrees with the first (see :func:`agree`). Encoders differ in how alike any two photos
    are to them. Each affinity ``a`` is therefore measured as the contrast ``(a - m) / (1 - m)``, where ``m`` is the
    mean between classes, and all encoders that count get equal shares of it. Encoders that see the same (see
    :data:`REDUNDANT`) share theirs by the squares of the shares for which this contrast varies least between classes.
    """
    rows = torch.from_numpy(folds.order.rows[spread(len(folds.ids), COMPARED)])
    keys = taken_keys(folds.keys, rows).double()
    ids = folds.ids[rows]
    others = ids[:, None] != ids
    parts = [
        torch.nn.functional.normalize(part)
        for part in keys.split([part.width for part in folds.parts], dim=1)
    ]
    means = [_class_means(part, ids) for part in parts]
    used = [0]
    used += [part for part in range(1, len(parts)) if agree(means[0], means[part])]
    shares = np.zeros(len(parts))
    if len(used) == 1:
        shares[used] = 1
        return tuple(shares.tolist())
    between = torch.stack([(parts[part] @ parts[part].T)[others] for part in used]).numpy()
    contrast = 1 / np.maximum(1 - between.mean(1), 1e-6)
    covariance = np.cov(between * contrast[:, None])
    spreads = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlated = covariance > REDUNDANT * spreads[:, None] * spreads
    np.fill_diagonal(correlated, True)
    counts = np.zeros(len(used))
    for part, row in enumerate(correlated):
        group = np.flatnonzero(row)
        regularised = covariance[np.ix_(group, group)] + 1e-12 * np.eye(len(group))
        least = np.linalg.solve(regularised, np.ones(len(group))).clip(min=0)
        counts[part] = least[group == part][0] ** 2 / (least**2).sum()
    contrasted = counts * contrast
    rounded = (STEP * contrasted / contrasted.sum()).round()
    shares[used] = rounded / rounded.sum()
    return tuple(shares.tolist())


def agree(first: DoubleArray, second: DoubleArray) -> bool:
    """Return whether two encoders find the same classes alike, given the unit mean features ``[c, d]`` of the classes.

    The classes of one encoder are permuted, as in Mantel's test (1967). The affinities between classes have to agree
    more than after most permutations, with p <= 0.1. Two useful encoders agree about classes, while a useless one
    agrees only by chance. Fewer than four classes are too few to tell.
    """
    c = len(first)
    if c < LEAST_CLASSES:
        return False
    affinities = _between(first)
    others = _between(second)
    agreement = (affinities * others).sum()
    draw = np.random.default_rng(0)
    less = 0
    for _ in range(PERMUTED):
        order = draw.permutation(c)
        less += agreement > (affinities * others[np.ix_(order, order)]).sum()
    return bool(less >= CONVINCED)


def _class_means(features: Tensor, ids: Tensor) -> DoubleArray:
    """Return the mean feature of each of at most :data:`ASKED` classes, scaled to norm 1, in the order of the rows."""
    classes = list(dict.fromkeys(ids.tolist()))[:ASKED]
    means = torch.stack([features[ids == class_id].mean(0) for class_id in classes])
    return torch.nn.functional.normalize(means).numpy()


def _between(means: DoubleArray) -> DoubleArray:
    """Return affinities between classes, as the differences to what the row and the column have in the mean.

    These are U-centred (Székely and Rizzo, 2014): each row sums to 0, and the diagonal is 0.
    """
    c = len(means)
    affinity = means @ means.T
    np.fill_diagonal(affinity, 0)
    sums = affinity.sum(0)
    centred = affinity - (sums[:, None] + sums) / (c - 2) + sums.sum() / ((c - 1) * (c - 2))
    np.fill_diagonal(centred, 0)
    return np.asarray(centred)
