"""Choose the features that are most useful to label.

A label helps with all photos that are similar to the labelled photo. The suggestions therefore maximise::

    sum_x u_x max_j s(x, j),   s(x, j) = max(0, cos(phi(x), phi(j)))^2

over all photos ``x``, where ``j`` is any suggested or labelled photo, and ``u_x`` is the uncertainty of ``x``. This is
facility location, solved greedily: MaxHerding (Bae et al., ECCV 2024), with uncertainty as in Uncertainty Herding (Bae
et al., ICLR 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from retrieval_tip import tip
from retrieval_tip.arrays import DoubleArray, FloatArray, IntArray, KeyArray, slices
from retrieval_tip.errors import check_count
from retrieval_tip.machine import check_memory
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features

POWER = 2
"""Exponent of the similarity."""
TRUST = 4
"""Number of labels of a class at which half of a probability is believed (see :func:`uncertainty_of`)."""
CROWD, CROWD_PER_PICK = 4096, 4
"""Number of photos that represent all photos in the sum, in total and at least for each suggestion."""
BLOCK, STALE = 512, 64
"""Number of candidates that are evaluated at a time, at first and later."""


@dataclass(frozen=True)
class Picks:
    """The ``rows`` of the suggested features, most useful first. Both arrays have shape ``[n]``.

    ``covers`` is the number of other features that are more similar to a suggestion than to any labelled feature and
    any other suggestion.
    """

    rows: IntArray
    covers: IntArray


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the similarities ``max(0, cos)^2`` of unit vectors, of shape ``[len(a), len(b)]``."""
    return (a @ b.T).clamp_(min=0).pow_(POWER)


def points_of(features: Features, metric: tip.Metric | None, mean: Tensor | float = 0.0) -> Tensor:
    """Return features as points in a metric. Without a metric, subtract a mean and scale them to unit norm."""
    f = torch.from_numpy(np.require(features, np.float32, "W"))
    return normalize(f - mean) if metric is None else metric.to("cpu")(f)


def uncertainty_of(
    probabilities: DoubleArray, class_ids: IntArray, counts: npt.NDArray[np.integer]
) -> DoubleArray:
    """Return the uncertainty ``1 - p n / (n + 4)`` of answers, of shape ``[m]``.

    ``p`` is the probability of an answer, and ``n`` is the number of labels of the answered class. A classifier that
    knows few photos of a class cannot yet tell which of its answers are wrong. Without labels, all uncertainties are 1.
    """
    n = counts[class_ids]
    uncertainty: DoubleArray = 1 - probabilities * n / (n + TRUST)
    return uncertainty


def suggest(
    features: Features,
    n: int,
    *,
    uncertainty: KeyArray | None = None,
    labelled: Features | None = None,
    metric: tip.Metric | None = None,
    files: Sequence[str] = (),
) -> Picks:
    """Choose ``n`` features to label next, or all features if there are fewer.

    If there are more than ``CROWD`` features, the sum runs over a random sample, drawn in proportion to the
    uncertainty. Any feature can be suggested. This needs twice the memory of the features.

    ``features`` and ``labelled``, the features of the labelled photos, have the shapes ``[m, d]`` and ``[k, d]``. The
    uncertainties, of shape ``[m]`` and from 0 to 1, default to 1. Without a ``metric``, the similarity is the cosine
    after subtracting the mean of ``features``.

    If some features are frames of videos, ``files`` has the file of each feature, or ``""``. Instead of a frame, the
    frame of its file is chosen that looks least like the others, and then the next.
    """
    check_count("n", n)
    raw = inputs.matrix(features, "features")
    m, d = raw.shape
    check_memory(8 * m * d, f"{m:,} features", "suggest from fewer photos")
    weights = (
        torch.ones(m) if uncertainty is None else torch.from_numpy(uncertainty.astype(np.float32))
    )
    mean = torch.from_numpy(raw.mean(axis=0, dtype=np.float64).astype(np.float32))
    points = points_of(raw, metric, mean)
    near = torch.zeros(m)
    if labelled is not None:
        known = points_of(labelled, metric, mean)
        for part in slices(m, BLOCK):
            near[part] = (points[part] @ known.T).amax(1).clamp_(min=0)
    rows = _greedy(points, weights, near, min(n, m))
    if files:
        rows = torch.tensor(_unusual_first(rows.tolist(), raw, files), dtype=torch.int64)
    return Picks(rows.numpy(), _covers(points, near, rows).numpy())


def _greedy(points: Tensor, weights: Tensor, near: Tensor, n: int) -> Tensor:
    """Return the ``n`` rows that a greedy choice selects, in order.

    Suggestions only reduce the gains of other photos, so earlier gains are upper bounds. Only the largest ones are
    evaluated again (Minoux, 1978).
    """
    m = len(points)
    size = max(CROWD, CROWD_PER_PICK * n)
    chosen, weights = _sampled(weights, size) if m > size else (slice(m), weights)
    crowd = points[chosen]
    covered = near[chosen] ** POWER

    def gains(candidates: Tensor) -> Tensor:
        return similarity(candidates, crowd).sub_(covered).clamp_(min=0) @ weights

    bounds = torch.cat([gains(points[part]) for part in slices(m, BLOCK)])
    picked = torch.zeros(m, dtype=torch.bool)
    rows = torch.empty(n, dtype=torch.int64)
    for place in range(n):
        exact = picked.clone()
        while not exact[best := bounds.argmax()]:
            stale = bounds.masked_fill(exact, -1).topk(min(STALE, m)).indices
            bounds[stale] = gains(points[stale]).masked_fill_(picked[stale], -1)
            exact[stale] = True
        rows[place] = best
        picked[best] = True
        bounds[best] = -1
        covered = torch.maximum(covered, similarity(points[best][None], crowd)[0])
    return rows


def _sampled(weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw ``size`` rows in proportion to their weights, and return the rows and their weights in the sum."""
    shares = (weights if weights.any() else torch.ones_like(weights)).double().cumsum(0)
    draws = (
        torch.arange(size) + torch.rand(size, generator=torch.Generator().manual_seed(0))
    ) / size
    return torch.searchsorted(shares, draws * shares[-1]).clamp_max(len(weights) - 1), torch.ones(
        size
    )


def _unusual_first(rows: Sequence[int], features: FloatArray, files: Sequence[str]) -> list[int]:
    frames = defaultdict[str, list[int]](list)
    for row, file in enumerate(files):
        frames[file].append(row)
    for file in {files[row] for row in rows} - {""}:
        own = np.array(frames[file])
        likeness = features[own] @ features[own].sum(axis=0)
        frames[file] = own[np.argsort(-likeness, kind="stable")].tolist()
    return [frames[files[row]].pop() if files[row] else row for row in rows]


def _covers(points: Tensor, near: Tensor, rows: Tensor) -> Tensor:
    """Count the other photos whose most similar suggestion or labelled photo is each of the rows."""
    covers = torch.zeros(len(rows), dtype=torch.int64)
    others = torch.ones(len(points), dtype=torch.bool)
    others[rows] = False
    for part in slices(len(points), BLOCK):
        closest, place = (points[part] @ points[rows].T).max(1)
        covers += torch.bincount(place[others[part] & (closest > near[part])], minlength=len(rows))
    return covers
